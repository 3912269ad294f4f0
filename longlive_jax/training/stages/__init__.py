"""The stages of training: what each learns, from what data, by which loss. `stage_of` makes the one of a config."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from longlive_jax.training.stage_config import StageConfig
from longlive_jax.training.stages.base import Stage


def stage_of(config: StageConfig, output: Path, say: Callable[[str], None]) -> Stage:
    """The stage that a config is of."""
    from longlive_jax.training.stages.distillation import InitStage, LongStage
    from longlive_jax.training.stages.student import StudentStage
    from longlive_jax.training.stages.teacher import TeacherStage
    from longlive_jax.training.stages.vae import VAEStage

    kinds = {kind.name: kind for kind in (VAEStage, TeacherStage, StudentStage, InitStage, LongStage)}
    return kinds[config.stage](config, output, say)
