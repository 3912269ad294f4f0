"""Does a run fit? What a stage needs of its devices' memory, added up before anything is allocated or compiled."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from longlive_jax import memory
from longlive_jax.errors import UserError
from longlive_jax.sharding import AXES
from longlive_jax.training.optimizer import make_optimizer
from longlive_jax.training.stages.base import Stage
from longlive_jax.training.step import spec_of


def placed(tree: Any, mesh: AbstractMesh) -> int:
    """Numbers in a tree's arrays on all devices together: what no axis cuts up lies on each of them."""
    total = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not leaf.shape:
            continue  # counters
        cut = math.prod(mesh.shape[axis] for axis in spec_of(path, leaf, mesh) if axis is not None)
        total += math.prod(leaf.shape) * mesh.size // cut
    return total


def required_memory(stage: Stage) -> dict[str, int]:
    """Bytes on all devices of the mesh together, by what needs them; the most hungry phase counts."""
    learners, frozen = stage.shapes()
    run, optimizer = stage.config.run, stage.config.optimizer
    mesh = AbstractMesh((run.data, run.fsdp, 1, 1), AXES)
    weights = 4 * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(learners))
    states = jax.eval_shape(make_optimizer(optimizer, 1.0, optimizer.warmup + 1).init, learners)
    averaged = {name: params for name, params in learners.items() if stage.averages(name)}
    phases = [stage.activations(phase) for phase in stage.config.phases]
    largest = max(phases, key=lambda parts: sum(parts.values()))
    return {
        "weights": 4 * placed(learners, mesh),
        "optimiser": 4 * placed(states, mesh),
        "averaged weights": 4 * placed(averaged, mesh) if optimizer.ema else 0,
        # A stream's gradient is whole on its device before it is summed; the sum, beside it, is cut up.
        "gradients": weights * run.devices + (4 * placed(learners, mesh) if run.streams > 1 else 0),
        "frozen networks": jnp.dtype(run.dtype).itemsize * placed(frozen, mesh),
        **{name: size * run.devices for name, size in largest.items()},
    }


def check_memory(stage: Stage, mesh: Mesh | None) -> None:
    """Refuses a run that cannot fit, before anything is allocated or compiled."""
    _compare(required_memory(stage), memory.available(mesh))


def _compare(parts: dict[str, int], free: int | None) -> None:
    if free is not None and sum(parts.values()) > free:
        raise UserError(
            f"training needs about {memory.describe(parts)}, but only {memory.readable(free)} are free; use more "
            "run.streams (smaller parts of a batch), remat, run.dtype bfloat16, or more devices (run.fsdp)"
        )


def described_memory(stage: Stage) -> str:
    """What each device of the run's mesh needs, whatever devices are here.

    Raises:
      UserError: that is more than `run.device_gib`.
    """
    run = stage.config.run
    parts = {name: size // run.devices for name, size in required_memory(stage).items()}
    _compare(parts, None if run.device_gib is None else int(run.device_gib * 2**30))
    return (
        f"stage {stage.name}, {run.streams} streams on data {run.data} x fsdp {run.fsdp}: about "
        f"{memory.describe(parts)} on each of {run.devices} devices"
    )
