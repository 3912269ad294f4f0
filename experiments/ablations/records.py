"""What is written down of a clip: a line of JSON, from which `report.py` makes every figure."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from longlive_jax.config import FPS
from longlive_jax.data.sprite_prompts import canonical
from longlive_jax.data.sprites import ATTRIBUTES, Combination
from longlive_jax.evaluation.figures import colour_errors, continuity, switch_latencies
from longlive_jax.evaluation.sprites import read, torus, vote
from longlive_jax.pipeline import LongLivePipeline
from rollouts import last_second, pixels, switched_latents, video_latents
from studies import NO_SWITCH, Arm, Clip, Study

Record = dict[str, Any]
Frames = np.ndarray
"""A few frames of a clip to look at, uint8 [n, H, W, 3]."""

CHANGED = ("background", "colour")
AROUND = (-16, -4, -1, 0, 1, 2, 4, 8, 16, 32, 48, 71)
"""Frames from the switch that are kept to look at."""


def point_records(pipe: LongLivePipeline, study: Study, arm: Arm, clips: list[Clip]) -> list[tuple[Record, Frames]]:
    """The clips of one arm, read at the study's points."""
    prompts, seeds = [canonical(c.before) for c in clips], [c.index for c in clips]
    latents, sampler = video_latents(pipe, prompts, seeds, study.seconds, arm.settings)
    at: list[Record] = [{} for _ in clips]
    shown: list[list[Frames]] = [[] for _ in clips]
    for point in study.points:
        frames = last_second(pipe, latents, sampler.block_frames, point)
        for i, clip in enumerate(clips):
            at[i][f"{point:g}"] = reading_of(frames[i], clip.before)
            shown[i].append(frames[i][[0, -1]])
    return [
        ({"arm": arm.name, "clip": clip.index, "prompt": prompts[i], "at": at[i]}, np.concatenate(shown[i]))
        for i, clip in enumerate(clips)
    ]


def switch_records(
    pipe: LongLivePipeline, study: Study, arms: list[Arm], clips: list[Clip]
) -> list[tuple[Record, Frames]]:
    """The clips of all arms of a switch study, which have what comes before the switch in common."""
    texts = [(canonical(c.before), canonical(c.after)) for c in clips]
    policies = {arm.name: None if arm.name == NO_SWITCH else arm.settings for arm in arms}
    head, tails, sampler = switched_latents(
        pipe, texts, [c.index for c in clips], study.seconds, study.switch_at, policies
    )
    shared, cache = pixels(pipe, head, sampler.block_frames)
    switch = shared.shape[1]
    found = []
    for name, tail in tails.items():
        frames = np.concatenate([shared, pixels(pipe, tail, sampler.block_frames, cache)[0]], axis=1)
        for i, clip in enumerate(clips):
            record = {"arm": name, "clip": clip.index, "prompts": texts[i], "switch_frame": switch}
            record |= around_the_switch(frames[i], switch, clip, switched=name != NO_SWITCH)
            found.append((record, frames[i][[min(max(0, switch + t), len(frames[i]) - 1) for t in AROUND]]))
    return found


def reading_of(frames: Frames, wanted: Combination) -> Record:
    """What a second of video shows, and whether that is what was asked for."""
    reading = read(frames)
    background, sprite = colour_errors(reading, wanted)
    return {
        "read": {name: getattr(reading, name) for name in ATTRIBUTES},
        "right": {name: getattr(reading, name) == getattr(wanted, name) for name in ATTRIBUTES},
        "background_error": _mean(background),
        "sprite_error": _mean(sprite),
    }


def around_the_switch(frames: Frames, switch: int, clip: Clip, *, switched: bool) -> Record:
    """How a clip goes through its switch; one that does not switch is read against its first prompt throughout."""
    reading, after = read(frames), clip.after if switched else clip.before
    smooth = continuity(reading, switch, clip.before, after)
    latencies = switch_latencies(reading, switch, clip.before, after)
    # Over the switch itself; where either frame shows no sprite there is no step.
    step = np.hypot(*torus(reading.track[switch] - reading.track[switch - 1]))
    return {
        "before": reading_of(frames[switch - FPS : switch], clip.before),
        "second": reading_of(frames[switch + FPS : switch + 2 * FPS], after),  # the 2nd second after it
        "last": reading_of(frames[-FPS:], after),
        "latency": {name: _finite(value) for name, value in latencies.items()},
        "kept": smooth.kept,
        "largest_jump": _finite(smooth.largest_jump),
        "median_jump": _finite(smooth.median_jump),
        "step": _finite(step),
        "timeline": {
            name: _timeline(reading.frames[name], getattr(clip.before, name), getattr(clip.after, name))
            for name in CHANGED
        },
    }


def _timeline(values: list[str | None], old: str, new: str) -> str:
    """A letter a frame: reads as the old prompt's, the new prompt's, another value, or not at all."""
    return "".join({old: "o", new: "n", None: "-"}.get(value, "x") for value in vote(values))


def _mean(values: np.ndarray) -> float | None:
    return None if np.isnan(values).all() else round(float(np.nanmean(values)), 2)


def _finite(value: float) -> float | None:
    """JSON has neither nan nor infinity."""
    return round(float(value), 3) if math.isfinite(value) else None
