"""Prompts of the sprites world: the canonical form, paraphrases in natural English, and reading them back.

One table holds every wording; paraphrases draw from it, and `parse` reads by keyword, so that free text works as well.
"""

import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from longlive_jax.data.sprites import ATTRIBUTES, Combination, all_combinations

# First wording of each value is the canonical one. Motions: (with "it ...", with "... ing").
_MOTIONS: dict[str, tuple[tuple[str, str], ...]] = {
    "still": (
        ("stays still", "staying still"),
        ("does not move", "not moving"),
        ("rests in one place", "resting in one place"),
        ("stands motionless", "standing motionless"),
    ),
    **{
        way: (
            (f"drifts {way}", f"drifting {way}"),
            (f"moves {way}", f"moving {way}"),
            (f"glides {towards}", f"gliding {towards}"),
            (f"floats {way}wards", f"floating {way}wards"),
        )
        for way, towards in (
            ("left", "to the left"),
            ("right", "to the right"),
            ("up", "straight up"),
            ("down", "straight down"),
        )
    },
    "bounces": (
        ("bounces around", "bouncing around"),
        ("bounces off the walls", "bouncing off the walls"),
        ("bounces from edge to edge", "bouncing from edge to edge"),
        ("ricochets around", "ricocheting around"),
    ),
    "orbits": (
        ("moves in circles", "moving in circles"),
        ("circles around the middle", "circling around the middle"),
        ("orbits the centre", "orbiting the centre"),
        ("goes round and round", "going round and round"),
    ),
}
_WORDINGS: dict[str, dict[str, tuple[str, ...]]] = {
    "background": {
        "night": ("a night sky", "the night sky", "a dark night sky", "a starless night"),
        "meadow": ("a green meadow", "a grassy meadow", "a meadow", "green grass"),
        "desert": ("a sandy desert", "a desert", "desert sand", "sand dunes"),
        "ocean": ("a blue ocean", "the ocean", "a blue sea", "deep water"),
        "snow": ("a field of snow", "a snowy field", "white snow", "a snow field"),
        "dusk": ("a dusk sky", "a purple dusk", "the sky at dusk", "a twilight sky"),
    },
    "colour": {
        "red": ("red", "crimson", "scarlet"),
        "orange": ("orange", "amber", "tangerine"),
        "yellow": ("yellow", "golden", "lemon yellow"),
        "green": ("green", "bright green", "emerald"),
        "blue": ("blue", "bright blue", "cobalt"),
        "purple": ("purple", "violet"),
    },
    "shape": {
        "circle": ("circle", "disc", "ball", "dot"),
        "square": ("square", "box", "block"),
        "triangle": ("triangle", "pyramid"),
        "star": ("star", "five-pointed star"),
    },
    "size": {
        "small": ("small", "little", "tiny"),
        "large": ("large", "big", "huge"),
    },
}
_NO_SHAPE = ("shape", "sprite", "thing", "object")

# By (motion stated, background stated). {a_thing} is the noun with its article and adjectives.
_TEMPLATES = {
    (True, True): (
        "{a_thing} {moves} over {place}",
        "over {place}, {a_thing} {moves}",
        "{a_thing} {moving} over {place}",
        "against {place}, {a_thing} is {moving}",
        "{place} with {a_thing} {moving} in front of it",
        "there is {a_thing} over {place} and it {moves}",
        "{a_thing} that {moves} above {place}",
        "pixel art of {a_thing} {moving} over {place}",
        "a short clip of {a_thing} which {moves}, with {place} behind it",
    ),
    (True, False): (
        "{a_thing} {moves}",
        "{a_thing} {moving}",
        "pixel art of {a_thing} that {moves}",
        "there is {a_thing} and it {moves}",
    ),
    (False, True): (
        "{a_thing} over {place}",
        "over {place}, {a_thing}",
        "{place} with {a_thing} in front of it",
        "a picture of {a_thing} against {place}",
    ),
    (False, False): ("{a_thing}", "pixel art of {a_thing}", "there is {a_thing}"),
}  # fmt: skip
DROP_SHARE = 0.3  # share of paraphrases that leave attributes out; each then goes with DROP_EACH
DROP_EACH = 0.35


def canonical(combination: Combination) -> str:
    """The canonical prompt: "a {size} {colour} {shape} {motion phrase} over a {background}" (sprites world)."""
    c = combination
    place = _WORDINGS["background"][c.background][0]
    return f"a {c.size} {c.colour} {c.shape} {_MOTIONS[c.motion][0][0]} over {place}"


def _pick(options: Sequence, rng: np.random.Generator):
    return options[int(rng.integers(len(options)))]


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _thing(combination: Combination, stated: frozenset[str], clause: bool, rng: np.random.Generator) -> str:
    """The sprite with its article: "a small red disc", "a red object"; as a clause, "a disc that is small and red"."""

    def word(attribute: str) -> str:
        return _pick(_WORDINGS[attribute][getattr(combination, attribute)], rng)

    noun = word("shape") if "shape" in stated else _pick(_NO_SHAPE, rng)
    adjectives = [word(a) for a in ("size", "colour") if a in stated]
    if len(adjectives) == 2 and clause:
        return f"{_with_article(noun)} that is {' and '.join(adjectives)}"
    if len(adjectives) == 2 and rng.random() < 0.2:
        adjectives[0] += ","
    return _with_article(" ".join([*adjectives, noun]))


def paraphrase(combination: Combination, rng: np.random.Generator) -> tuple[str, frozenset[str]]:
    """Another wording of a combination: word order, synonyms and dropped attributes.

    Returns:
      The prompt, and the names of the attributes that it states; a dropped one may take any value. At least one is
      stated.
    """
    stated = frozenset(ATTRIBUTES)
    if rng.random() < DROP_SHARE:
        stated = frozenset(a for a in ATTRIBUTES if rng.random() >= DROP_EACH) or frozenset({_pick([*ATTRIBUTES], rng)})
    template = _pick(_TEMPLATES["motion" in stated, "background" in stated], rng)
    # "a disc that is red that bounces" reads badly: the clause stands only where a verb or the end follows.
    clause = re.search(r"\{a_thing\}( \{moves\}|$| over \{place\}$)", template) is not None and rng.random() < 0.3
    moves, moving = _pick(_MOTIONS[combination.motion], rng)
    prompt = template.format(
        a_thing=_thing(combination, stated, clause, rng),
        moves=moves,
        moving=moving,
        place=_pick(_WORDINGS["background"][combination.background], rng),
    )
    return prompt, stated


# Reading back ---------------------------------------------------------------------------------------------------------

# In this order, each match is taken out of the text before the next pattern reads it: "blue ocean" must not leave a
# colour, and "moves in circles" must not leave a shape.
_COLOUR_WORDS = {
    "red": "red|crimson|scarlet",
    "orange": "orange|amber|tangerine",
    "yellow": "yellow|golden|gold|lemon",
    "green": "green|emerald",
    "blue": "blue|cobalt|azure",
    "purple": "purple|violet",
}
_ANY_COLOUR = "|".join(_COLOUR_WORDS.values())
_PLACES = {
    "night": "night(?:time)?|midnight",
    "meadow": "meadows?|grass(?:y|land)?|lawn",
    "desert": "deserts?|dunes?|sand(?:y)?",
    "ocean": "oceans?|seas?|water",
    "snow": "snow(?:y|field)?",
    "dusk": "dusk|twilight|sunset",
}
_MOTION_WORDS = {
    "orbits": r"(?:in|round in) (?:a )?circles?|circl(?:es|ing) (?:a?round|about)|circling|orbit(?:s|ing)?"
    r"|round and round|in (?:a )?loops?",
    "bounces": r"bounc(?:e|es|ing|y)|ricochet(?:s|ing)?",
    "still": r"still|motionless|(?:not|n't) mov(?:e|ing)|(?:rests?|resting|stays?|staying) (?:in|put)|unmoving"
    r"|stationary",
    "left": r"left(?:wards?)?",
    "right": r"right(?:wards?)?",
    "up": r"up(?:wards?)?|ris(?:es|ing)",
    "down": r"down(?:wards?)?|fall(?:s|ing)",
}
_PATTERNS: dict[str, dict[str, re.Pattern[str]]] = {
    "background": {value: re.compile(rf"\b(?:{words})\b") for value, words in _PLACES.items()},
    "motion": {value: re.compile(rf"\b(?:{words})(?!\w)") for value, words in _MOTION_WORDS.items()},
    "colour": {value: re.compile(rf"\b(?:{words})\b") for value, words in _COLOUR_WORDS.items()},
    "shape": {
        "circle": re.compile(r"\b(?:circles?|discs?|disks?|balls?|dots?)\b"),
        "square": re.compile(r"\b(?:squares?|box|boxes|blocks?)\b"),
        "triangle": re.compile(r"\b(?:triangles?|pyramids?)\b"),
        "star": re.compile(r"\bstars?\b"),
    },
    "size": {
        "small": re.compile(r"\b(?:small|little|tiny|mini)\b"),
        "large": re.compile(r"\b(?:large|big|huge|giant)\b"),
    },
}
# A colour right before a place's noun is the place's, not the sprite's. An adjective may stand between: "green, grassy
# meadow".
_PLACE_COLOUR = re.compile(
    rf"\b(?:{_ANY_COLOUR}),? (?:(?:open|calm|deep|grassy|wide) )?(?=(?:{'|'.join(_PLACES.values())})\b)"
)


def parse(prompt: str) -> dict[str, str]:
    """The attributes that a prompt states, by keyword; unknown words are ignored (sprites world).

    Args:
      prompt: canonical, a paraphrase, or free English text.

    Returns:
      Attribute name -> value for those stated; where two values of one attribute are named, the first in the text.
    """
    text = _PLACE_COLOUR.sub("", " ".join(prompt.lower().replace("-", " ").split()))
    stated: dict[str, str] = {}
    for attribute, patterns in _PATTERNS.items():
        found = [(match.start(), value) for value, p in patterns.items() if (match := p.search(text))]
        if found:
            stated[attribute] = min(found)[1]
        for pattern in patterns.values():
            text = pattern.sub(" ", text)
    return {attribute: stated[attribute] for attribute in ATTRIBUTES if attribute in stated}


def matches(combination: Combination, stated: Mapping[str, str]) -> bool:
    """Whether a combination has every attribute that a prompt states."""
    return all(getattr(combination, attribute) == value for attribute, value in stated.items())


# For tokenizers -------------------------------------------------------------------------------------------------------


def all_prompts(paraphrases: int = 4, seed: int = 0) -> Iterator[str]:
    """Prompts to train a tokenizer on: each combination's canonical prompt, then `paraphrases` others of it.

    Held-out combinations are included: their words all occur in training prompts, only not together.
    """
    rng = np.random.default_rng(seed)
    for combination in all_combinations():
        yield canonical(combination)
        for _ in range(paraphrases):
            yield paraphrase(combination, rng)[0]
