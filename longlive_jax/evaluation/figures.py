"""The figures of the sprites world, from readings of clips: adherence, drift, switch latency, continuity."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from jaxtyping import Float

from longlive_jax.data.sprites import ATTRIBUTES, BACKGROUNDS, COLOURS, FPS, Combination
from longlive_jax.errors import UserError
from longlive_jax.evaluation.sprites import (
    MOTION_WINDOW,
    Reading,
    background_distances,
    colour_distances,
    torus,
    vote,
)

Stated = Combination | Mapping[str, str]
"""What a prompt says: a combination, or some of its attributes."""


def _stated(wanted: Stated) -> dict[str, str]:
    return asdict(wanted) if isinstance(wanted, Combination) else dict(wanted)


def adherence(readings: Sequence[Reading], combinations: Sequence[Stated]) -> dict[str, float]:
    """Share of clips whose attribute is right, per attribute, and under "all" that of clips right in all of them.

    Args:
      readings: one a clip.
      combinations: what each was asked for: a combination, or the attributes that its prompt states (`parse`). An
        attribute that a prompt leaves open is not counted; one that no prompt states is nan.
    """
    if len(readings) != len(combinations):
        raise UserError(f"adherence: {len(readings)} readings for {len(combinations)} prompts; give one of each a clip")
    rights: dict[str, list[bool]] = {attribute: [] for attribute in (*ATTRIBUTES, "all")}
    for reading, wanted in zip(readings, combinations, strict=True):
        stated = _stated(wanted)
        for attribute, value in stated.items():
            rights[attribute].append(getattr(reading, attribute) == value)
        rights["all"].append(all(getattr(reading, attribute) == value for attribute, value in stated.items()))
    return {attribute: float(np.mean(right)) if right else math.nan for attribute, right in rights.items()}


def colour_errors(reading: Reading, combination: Stated) -> tuple[Float[np.ndarray, " t"], Float[np.ndarray, " t"]]:
    """Colour error of the background and of the sprite against the prompt's palette, frame by frame.

    Returns:
      RGB distances (Euclidean, 0 to 441), [T] each; nan where no sprite is seen or the prompt leaves the colour open.
    """
    stated = _stated(combination)
    background = sprite = np.full(len(reading.track), np.nan)
    if "background" in stated:
        background = background_distances(reading.background_rgb)[:, list(BACKGROUNDS).index(stated["background"])]
    if "colour" in stated:
        sprite = colour_distances(reading.sprite_rgb)[:, list(COLOURS).index(stated["colour"])]
    return background, sprite


def _last_start(attribute: str, until: int) -> int:
    """First frame after those whose reading of the attribute uses only frames before `until`."""
    return until - MOTION_WINDOW + 1 if attribute == "motion" else until


def _split(before: Stated, after: Stated) -> tuple[dict[str, str], dict[str, str]]:
    """Attributes that a switch changes (their new values), and those that it keeps; both prompts must state them."""
    old, new = _stated(before), _stated(after)
    both = {attribute: new[attribute] for attribute in new if attribute in old}
    changed = {attribute: value for attribute, value in both.items() if old[attribute] != value}
    return changed, {attribute: value for attribute, value in both.items() if attribute not in changed}


def _check_switch(reading: Reading, switch_frame: int, until: int | None) -> int:
    until = len(reading.track) if until is None else until
    if not 0 < switch_frame <= until - MOTION_WINDOW or until > len(reading.track):
        raise UserError(
            f"switch figures: a switch at frame {switch_frame} read until frame {until} of {len(reading.track)}; "
            f"it needs a frame before it and {MOTION_WINDOW} after it"
        )
    return until


def switch_latencies(
    reading: Reading, switch_frame: int, before: Stated, after: Stated, *, until: int | None = None
) -> dict[str, float]:
    """Seconds from a switch until each changed attribute reads as the new prompt's for good; inf if it never does.

    "For good" is up to `until` (the next switch; default: the end), after a running vote of 5 frames. Motion at a frame
    is read from the 16 frames that follow, so it may read as new up to half a second early; never below 0. The latency
    of the switch is the largest value.
    """
    until = _check_switch(reading, switch_frame, until)
    latencies = {}
    for attribute, value in _split(before, after)[0].items():
        values = vote(reading.frames[attribute][: _last_start(attribute, until)])[switch_frame:]
        wrong = [t for t, v in enumerate(values) if v != value]
        late = wrong[-1] + 1 if wrong else 0
        latencies[attribute] = late / FPS if late < len(values) else math.inf
    return latencies


@dataclass(frozen=True)
class Continuity:
    """How smoothly a clip goes through a switch.

    Attributes:
      kept: unchanged attribute -> whether 90 % of the frames from 1 s before the switch to 2 s after it read right.
      largest_jump: largest centroid step between neighbouring frames within 1 s of the switch, pixels; inf where no
        sprite is seen there.
      median_jump: the clip's median step, pixels.
    """

    kept: dict[str, bool]
    largest_jump: float
    median_jump: float


def continuity(
    reading: Reading, switch_frame: int, before: Stated, after: Stated, *, until: int | None = None
) -> Continuity:
    """Continuity of a clip around a prompt switch at `switch_frame`; `until` is the next switch's frame, if any."""
    until = _check_switch(reading, switch_frame, until)
    kept = {}
    for attribute, value in _split(before, after)[1].items():
        values = vote(reading.frames[attribute][: _last_start(attribute, until)])
        values = values[max(0, switch_frame - FPS) : switch_frame + 2 * FPS]
        kept[attribute] = sum(v == value for v in values) >= 0.9 * len(values)
    # Steps between neighbouring frames that show a sprite: one that vanishes and comes back elsewhere has jumped.
    seen = np.flatnonzero(~np.isnan(reading.track[:, 0]))
    steps = np.hypot(*torus(np.diff(reading.track[seen], axis=0)).T)
    close = steps[np.abs(seen[1:] - switch_frame) <= FPS]
    return Continuity(
        kept=kept,
        largest_jump=float(close.max()) if len(close) else math.inf,
        median_jump=float(np.median(steps)) if len(steps) else math.nan,
    )
