"""Does a run fit? What a stage needs of its devices' memory, added up before anything is allocated or compiled."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from longlive_jax import memory
from longlive_jax.errors import UserError
from longlive_jax.training.optimizer import make_optimizer
from longlive_jax.training.stages.base import Stage


def required_memory(stage: Stage) -> dict[str, int]:
    """Bytes on all devices of the mesh together, by what needs them; the most hungry phase counts."""
    learners, frozen = stage.shapes()
    run, optimizer = stage.config.run, stage.config.optimizer
    count = lambda tree: sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))
    weights = 4 * count(learners)
    states = jax.eval_shape(make_optimizer(optimizer, 1.0, optimizer.warmup + 1).init, learners)
    moments = [leaf for leaf in jax.tree.leaves(states) if leaf.ndim]  # not its counters
    averaged = 4 * count({name: params for name, params in learners.items() if stage.averages(name)})
    phases = [stage.activations(phase) for phase in stage.config.phases]
    largest = max(phases, key=lambda parts: sum(parts.values()))
    return {
        "weights": weights * run.data,
        "optimiser": 4 * count(moments) * run.data,
        "averaged weights": averaged * run.data if optimizer.ema else 0,
        # A stream's gradient is whole on its device before it is summed; with several times, the sum is beside it.
        "gradients": weights * run.devices * (1 if run.streams == run.devices else 2),
        "frozen networks": jnp.dtype(run.dtype).itemsize * count(frozen) * run.data,
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
