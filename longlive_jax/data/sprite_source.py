"""Clips of the sprites world as a grain data source: a record is a pure function of (seed, index).

Use it with `grain.MapDataset.source(SpriteSource(...)).batch(n)`, or call `make_clip` without grain.
"""

import operator
from dataclasses import dataclass, replace
from typing import Any, SupportsIndex

import numpy as np

from longlive_jax.data.sprite_prompts import canonical, paraphrase
from longlive_jax.data.sprites import ATTRIBUTES, Combination, combinations_of, is_test, render
from longlive_jax.errors import UserError

CANONICAL_SHARE = 0.5  # of training prompts; the others are paraphrases

KEPT = 0.5
"""Chance of an attribute to stay as it is where a training clip's prompt changes.

People change a word or two. Of two unrelated combinations one in 49 has both sprites at rest, and a student that has
hardly seen that goes on drawing the past.
"""


def clip_combination(seed: int, index: int, split: str) -> Combination:
    """The combination that clip `index` of a split shows."""
    return _draw(seed, index, split)[0]


def _draw(seed: int, index: int, split: str) -> tuple[Combination, np.random.Generator]:
    combinations = combinations_of(split)
    if seed < 0 or index < 0:
        raise UserError(f"sprites: seed {seed} and index {index} must be 0 or more")
    rng = np.random.default_rng([seed, index, int(split == "test")])
    return combinations[int(rng.integers(len(combinations)))], rng


def changed(combination: Combination, rng: np.random.Generator) -> Combination:
    """What a training clip of this combination may change to: each attribute stays with chance `KEPT`."""
    while True:
        kept = {name: rng.random() < KEPT for name in ATTRIBUTES}
        drawn = {name: str(rng.choice(values)) for name, values in ATTRIBUTES.items() if not kept[name]}
        after = replace(combination, **drawn)
        if not is_test(after):
            return after


def make_clip(seed: int, index: int, num_frames: int, split: str = "train") -> dict[str, Any]:
    """One clip of the sprites world with its prompt, the same for the same arguments.

    Args:
      seed, index: name the clip; both 0 or more.
      num_frames: frames T at 16 a second.
      split: "train" (half canonical prompts, half paraphrases) or "test" (held-out combinations, canonical prompts).

    Returns:
      {"frames": uint8 [T, 64, 64, 3], "prompt": str}. The prompt and the start do not depend on T.
    """
    combination, rng = _draw(seed, index, split)
    # The prompt draws from its own generator: how many numbers a paraphrase takes must not move the sprite.
    words = rng.spawn(1)[0]
    plain = split == "test" or words.random() < CANONICAL_SHARE
    prompt = canonical(combination) if plain else paraphrase(combination, words)[0]
    return {"frames": render(combination, num_frames, rng), "prompt": prompt}


@dataclass(frozen=True)
class SpriteSource:
    """Random-access source of sprite clips for grain.

    Attributes:
      num_frames: frames T of each clip.
      length: records; make it larger than a run needs rather than repeating.
      seed: names the whole set of clips.
      split: "train" or "test".
    """

    num_frames: int
    length: int = 1_000_000
    seed: int = 0
    split: str = "train"

    def __post_init__(self) -> None:
        combinations_of(self.split)
        if self.num_frames < 1 or self.length < 1:
            raise UserError(f"sprites: num_frames {self.num_frames} and length {self.length} must be 1 or more")

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, record_key: SupportsIndex) -> dict[str, Any]:
        index = operator.index(record_key)
        if not 0 <= index < self.length:
            raise IndexError(f"sprites: record {index} is outside 0..{self.length - 1}")
        return make_clip(self.seed, index, self.num_frames, self.split)
