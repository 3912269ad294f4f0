"""The table of studies: what each compares, how long its videos are, and which clips it makes.

An arm is a name and what is set differently from the checkpoint's own sampler. All arms of a study make the same clips
(prompt and seed i are a function of i alone), so their differences are paired.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import numpy as np

from longlive_jax.data.sprites import Combination, combinations_of


@dataclasses.dataclass(frozen=True)
class Arm:
    """One arm.

    Attributes:
      settings: changes to the sampler.
      load: arguments for `LongLivePipeline.from_pretrained`.
      checkpoint: which one it runs: "given" or "before" (streaming long tuning).
    """

    name: str
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    load: dict[str, Any] = dataclasses.field(default_factory=dict)
    checkpoint: str = "given"


@dataclasses.dataclass(frozen=True)
class Study:
    """One study.

    Attributes:
      reference: the arm that others are compared with.
      seconds: length of a video.
      points: times at which it is read, in seconds: the last second of a video of that length.
      switch_at: time of its prompt switch; such a study is read around that instead.
    """

    name: str
    arms: tuple[Arm, ...]
    reference: str
    seconds: float
    points: tuple[float, ...] = ()
    switch_at: float | None = None


def evenly(steps: int) -> list[int]:
    """A few-step list of that many steps: 4 -> 1000 750 500 250."""
    return [round(1000 * (steps - i) / steps) for i in range(steps)]


NO_SWITCH = "no switch"
DRIFT_POINTS = (5.0, 30.0, 60.0, 120.0, 240.0)

STUDIES = {
    study.name: study
    for study in (
        Study(
            "switch",
            (
                Arm("recache", {"switch": "recache", "sink": "keep"}),
                Arm("recache, new sink", {"switch": "recache", "sink": "refresh"}),
                Arm("keep", {"switch": "keep"}),
                Arm("clear", {"switch": "clear"}),
                Arm(NO_SWITCH),  # what the model does anyway: the first prompt goes on
            ),
            reference="recache",
            seconds=10.0,
            switch_at=5.0,
        ),
        Study(
            "memory",
            (
                *(Arm(f"sink 3, window {w}", {"sink_frames": 3, "window": w}) for w in (6, 9, 12, 21)),
                *(Arm(f"sink 0, window {w}", {"sink_frames": 0, "window": w}) for w in (6, 9, 12, 21)),
            ),
            reference="sink 3, window 12",
            seconds=30.0,
            points=(30.0,),
        ),
        Study(
            "steps",
            # `renoise` is the sampler of few-step models, `euler` follows the flow as the teacher's does.
            tuple(
                Arm(f"{solver} {n}", {"solver": solver, "steps": evenly(n), "warp": True})
                for solver, counts in (("renoise", (8, 4, 2, 1)), ("euler", (16, 4)))
                for n in counts
            ),
            reference="renoise 4",
            seconds=5.0,
            points=(5.0,),
        ),
        Study(
            "drift",
            tuple(Arm(f"sink {s}", {"sink_frames": s}) for s in (3, 0)),
            reference="sink 3",
            seconds=240.0,
            points=DRIFT_POINTS,
        ),
        Study(
            "int8",
            (
                Arm("float32", load={"dtype": "float32"}),
                Arm("bfloat16", load={"dtype": "bfloat16"}),
                Arm("int8", load={"quantize": "int8"}),
            ),
            reference="bfloat16",
            seconds=5.0,
            points=(5.0,),
        ),
        Study(
            "tuning",
            (Arm("with long tuning"), Arm("without long tuning", checkpoint="before")),
            reference="with long tuning",
            seconds=240.0,
            points=DRIFT_POINTS,
        ),
    )
}


@dataclasses.dataclass(frozen=True)
class Clip:
    """Clip number `index`: its prompt, for a switch its second prompt, and its seed (the index)."""

    index: int
    before: Combination
    after: Combination | None = None


def clips_of(study: Study, indices: list[int]) -> list[Clip]:
    """The clips of these numbers. Combinations are of the test set; past its end they come again with other seeds."""
    if study.switch_at is None:
        pool = _shuffled()
        return [Clip(i, pool[i % len(pool)]) for i in indices]
    pairs = _pairs()
    return [Clip(i, *pairs[i % len(pairs)]) for i in indices]


@cache
def _shuffled() -> tuple[Combination, ...]:
    pool = combinations_of("test")
    return tuple(pool[i] for i in np.random.default_rng(0).permutation(len(pool)))


@cache
def _pairs() -> tuple[tuple[Combination, Combination], ...]:
    """Switches of background and colour, everything else kept; both prompts are of the test set."""
    rng, pairs = np.random.default_rng(1), []
    for before in _shuffled():
        others = [c for c in combinations_of("test") if _only_place_and_colour_differ(before, c)]
        if others:
            pairs.append((before, others[int(rng.integers(len(others)))]))
    return tuple(pairs)


def _only_place_and_colour_differ(a: Combination, b: Combination) -> bool:
    kept = all(getattr(a, name) == getattr(b, name) for name in ("shape", "size", "motion"))
    return kept and a.background != b.background and a.colour != b.colour
