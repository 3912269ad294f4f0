"""The steps of a run as programs for devices that are not here: what an accelerator's own compiler says of them.

Nothing is allocated, read or run: parameters, state and batch are shapes with places. So a run's memory, collectives
and kernels on a pod can be looked at on any machine that has the compiler (libtpu for TPUs).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from longlive_jax.training.first_state import first_state, teaching_of
from longlive_jax.training.learner import TrainState
from longlive_jax.training.stages.base import Stage
from longlive_jax.training.step import STREAMS, arrange, make_step, shardings
from longlive_jax.training.streams import Parted, own


def arguments(stage: Stage, phase: Any, mesh: Mesh) -> tuple[TrainState, dict[str, Any], Any]:
    """State, frozen networks and batch of a step, as `jax.ShapeDtypeStruct` where the trainer has them."""
    learners, frozen = stage.shapes()
    teaching = teaching_of(stage, phase, learners, phase.steps)
    floats = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.float32), learners)
    state = jax.eval_shape(lambda params: first_state(stage, phase, teaching, params), floats)
    frozen = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, stage.config.run.dtype), frozen)
    batch = _batch(stage, phase)
    streams = NamedSharding(mesh, STREAMS)
    if isinstance(batch, Parted):
        everywhere = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), batch.shared)
        places = Parted(own=jax.tree.map(lambda _: streams, own(batch)), shared=everywhere)
    else:
        places = jax.tree.map(lambda _: streams, batch)
    at = lambda tree, places: jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, places
    )
    return at(state, shardings(state, mesh)), at(frozen, shardings(frozen, mesh)), at(batch, places)


def _batch(stage: Stage, phase: Any) -> Any:
    """The first batch, drawn: records are small, and only they know their shapes."""
    run = stage.config.run
    source = stage.source(phase, run.seed)
    size = phase.batch_size // run.streams
    streams = [stage.collate([source[s * size + i] for i in range(size)]) for s in range(run.streams)]
    return arrange(stage.parted(jax.tree.map(lambda *leaves: np.stack(leaves), *streams)), run.devices)


def programs(stage: Stage, phase: Any, mesh: Mesh, steps: int = 200) -> Iterator[tuple[int, tuple, jax.stages.Lowered]]:
    """Each program that the first steps of a phase need: (first step that runs it, its turns, lowered for the mesh)."""
    given, seen = None, set()
    for step in range(min(steps, phase.steps)):
        turns = stage.turns(phase, step)
        if turns in seen:
            continue
        seen.add(turns)
        given = arguments(stage, phase, mesh) if given is None else given
        teaching = teaching_of(stage, phase, given[0].learners, phase.steps)
        yield step, turns, make_step(turns, teaching, mesh).lower(*given)
