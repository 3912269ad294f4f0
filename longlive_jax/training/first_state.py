"""What a phase begins with: optimisers, and the state before the first step."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from longlive_jax.training.learner import Learner, TrainState
from longlive_jax.training.optimizer import make_optimizer
from longlive_jax.training.stages.base import Stage
from longlive_jax.training.step import Teaching


def teaching_of(stage: Stage, phase: Any, learners: Iterable[str], steps: int) -> dict[str, Teaching]:
    """How each learner is taught in a phase of so many steps."""
    teaching = {}
    for name in learners:
        config = stage.config.optimizer
        if not stage.averages(name):
            config = dataclasses.replace(config, ema=0.0)
        teaching[name] = Teaching(make_optimizer(config, stage.rate(phase, name), steps), config)
    return teaching


def first_state(stage: Stage, phase: Any, teaching: Mapping[str, Teaching], params: dict[str, Any]) -> TrainState:
    """The state of a phase before its first step, from parameters by learner (arrays, or inside `jax.eval_shape`)."""
    learners = {n: Learner.begin(p, teaching[n].optimizer, teaching[n].config) for n, p in params.items()}
    return TrainState.begin(learners, stage.config.run.seed, stage.carry(phase))
