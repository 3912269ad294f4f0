"""A training step: losses to gradients to updates, for any stage and any mesh.

A batch is `streams` independent parts. `[n, d, b, ...]`: n times, d devices take a part of b samples each. The parts'
gradients are summed in float32, over devices and over times alike, so the same batch gives the same update (up to the
order of a sum) however n and d are chosen. Noise is a stream's own: it does not depend on the mesh either. What all
streams share (`streams.Parted`) has neither n nor d, so that the program still decides by it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from longlive_jax import checkpoint
from longlive_jax.sharding import param_spec, taken, using
from longlive_jax.training.flops import Expected
from longlive_jax.training.learner import TrainState
from longlive_jax.training.run_config import OptimizerConfig
from longlive_jax.training.streams import Parted, axes, each, keys_of, own, with_own

DEVICES = ("data", "fsdp")
"""Mesh axes whose devices take a stream each."""

STREAMS = PartitionSpec(None, DEVICES)
"""Batch and carry: [n, d, ...], of what is not shared."""


@dataclasses.dataclass(frozen=True)
class Turn:
    """A loss, and whom it teaches.

    Attributes:
      learner: its name.
      loss: `loss(params, nets, carry, batch, keys) -> loss, (carry, metrics)` of one stream. The gradient is by params;
        `nets` holds the parameters of all learners at the start of the step, by name, and the frozen networks; `keys`
        are random, `own` and `shared`.
      prefix: of its metrics.
      expected: what its control flow comes to on average, for `count_flops`.
    """

    learner: str
    loss: Callable[..., Any]
    prefix: str = ""
    expected: Expected = dataclasses.field(default_factory=dict, compare=False)


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a step, to be timed apart from the others.

    Attributes:
      name: of the metric.
      function: `function(nets, carry, batch, keys, made)` of one stream; `made` has what parts before gave, by name.
      times: how often an average step does this.
      axes: which of what it gives the streams share: None there, else 0 (as `out_axes` of `jax.vmap`).
    """

    name: str
    function: Callable[..., Any]
    times: float
    axes: Any = 0


@dataclasses.dataclass(frozen=True)
class Teaching:
    """An optimiser with its settings."""

    optimizer: optax.GradientTransformation
    config: OptimizerConfig


@dataclasses.dataclass(frozen=True)
class Step:
    """`step(state, frozen, batch) -> state, metrics`, jitted with the state donated, traced knowing its mesh."""

    jitted: Callable[..., Any]
    mesh: Mesh | None

    def __call__(self, state: TrainState, frozen: dict[str, Any], batch: Any) -> tuple[TrainState, dict[str, Any]]:
        with using(self.mesh):
            return self.jitted(state, frozen, batch)

    def lower(self, state: TrainState, frozen: dict[str, Any], batch: Any) -> jax.stages.Lowered:
        """The program for arguments of these shapes (and places), to be compiled for devices that need not be here."""
        with using(self.mesh):
            return self.jitted.lower(state, frozen, batch)


def make_step(turns: Sequence[Turn], teaching: Mapping[str, Teaching], mesh: Mesh | None = None) -> Step:
    """A step of these turns.

    All turns see the parameters from before the step; the streams' carry goes from turn to turn.
    """

    def step(state: TrainState, frozen: dict[str, Any], batch: Any):
        nets = frozen | {name: learner.params for name, learner in state.learners.items()}
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        carry, learners, metrics = state.carry, dict(state.learners), {}
        for index, turn in enumerate(turns):
            turn_key = jax.random.fold_in(key, index)
            grads, loss, carry, own = gradient(turn.loss, nets[turn.learner], nets, carry, batch, turn_key, mesh)
            optimizer, config = teaching[turn.learner].optimizer, teaching[turn.learner].config
            learner, norm = state.learners[turn.learner].update(grads, loss, optimizer, config)
            learners[turn.learner] = learner
            own = {
                "loss": loss, "grad_norm": norm, "skipped": learner.skipped,
                "skipped_in_a_row": learner.skipped_in_a_row, **own,
            }  # fmt: skip
            metrics |= {turn.prefix + name: value for name, value in own.items()}
        state = state.replace(step=state.step + 1, learners=learners, carry=carry)
        if mesh is not None:
            state = jax.lax.with_sharding_constraint(state, shardings(state, mesh))
        return state, metrics

    return Step(jax.jit(step, donate_argnums=0), mesh)


def gradient(loss: Callable, params: Any, nets: Any, carry: Any, batch: Any, key: jax.Array, mesh: Mesh | None = None):
    """Mean gradient over the streams of a batch: (gradient, loss, carry, metrics), the sums in float32.

    The carry that a loss gives has the names, shapes and dtypes of the one it got.
    """
    times, devices = jax.tree.leaves(own(batch))[0].shape[:2]
    streams = carry, batch, keys_of(key, (times, devices))

    def one(carry, batch, keys):
        (value, (carry, metrics)), grads = jax.value_and_grad(loss, has_aux=True)(params, nets, carry, batch, keys)
        return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (grads, value, metrics)), carry

    def together(total, parts):
        row = [with_own(tree, part) for tree, part in zip(streams, parts)]
        if devices == 1:
            new, carry = one(*(each(lambda a: a[0], tree) for tree in row))
            carry = each(lambda a: a[None], carry)
        else:
            # Said by name for kernels, which the compiler cannot cut: each device runs them for its own stream.
            names = () if mesh is None else DEVICES
            along = tuple(axes(tree) for tree in row)
            with taken(*names):
                new, carry = jax.vmap(one, in_axes=along, out_axes=(0, along[0]), spmd_axis_name=names or None)(*row)
            # Each device has the gradient of its own stream, in float32, before anything is summed.
            new = jax.tree.map(lambda a: jnp.sum(a, axis=0), new) if mesh is None else summed(new, mesh)
        return new if total is None else jax.tree.map(jnp.add, total, new), carry

    parts = tuple(own(tree) for tree in streams)
    if times == 1:
        total, carry = together(None, jax.tree.map(lambda a: a[0], parts))
        carry = each(lambda a: a[None], carry)
    else:
        shapes = jax.eval_shape(lambda parts: together(None, jax.tree.map(lambda a: a[0], parts))[0], parts)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        # What streams carry (their KV caches) is large: each row's is read and written where it lies. As inputs and
        # outputs of the loop all of it would be there twice.

        def in_place(before, at):
            (total, kept), (index, rest) = before, at
            mine = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False), kept)
            total, carry = together(total, (mine, *rest))
            put = lambda a, new: jax.lax.dynamic_update_index_in_dim(a, new, index, 0)
            return (total, jax.tree.map(put, kept, own(carry))), with_own(carry, ())

        (total, kept), shared = jax.lax.scan(in_place, (zeros, parts[0]), (jnp.arange(times), parts[1:]))
        # What is shared is the same after every row of streams: it begins alike, and nothing of theirs reaches it.
        carry = with_own(jax.tree.map(lambda a: a[0], shared), kept)
    grads, value, metrics = jax.tree.map(lambda a: a / (times * devices), total)
    return grads, value, carry, metrics


def summed(parts: Any, mesh: Mesh) -> Any:
    """The sum over a first axis that the devices have a part each of; of parameters each keeps those that it has.

    Said by name, a reduce-scatter: left alone, compilers sum all on every device, at twice the traffic, and keep it.
    """
    whole = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), parts)
    places = jax.tree.map(lambda s: s.spec, shardings(whole, mesh))

    def one(part, spec):
        part, left = part[0], [axis for axis in DEVICES if mesh.shape[axis] > 1]
        for axis in spec:
            if axis in left:
                left.remove(axis)
                part = jax.lax.psum_scatter(part, axis, scatter_dimension=spec.index(axis), tiled=True)
        return jax.lax.psum(part, left) if left else part

    together = lambda parts: jax.tree.map(one, parts, places)
    return jax.shard_map(together, mesh=mesh, in_specs=PartitionSpec(DEVICES), out_specs=places, check_vma=False)(parts)


# MARK: placement


def shardings(tree: Any, mesh: Mesh) -> Any:
    """Where each array of a state (or of frozen networks) lives: parameters and all that has their paths by the table
    of `sharding.py`, the streams' carry over the devices, the rest everywhere."""

    place = lambda path, leaf: NamedSharding(mesh, spec_of(path, leaf, mesh))
    return jax.tree_util.tree_map_with_path(place, tree)


def spec_of(path: tuple, leaf: Any, mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Axes of an array of a state, of learners' parameters, or of frozen networks, by its path there."""
    names = [str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", p)))) for p in path]
    if "carry" in names:
        return PartitionSpec() if "shared" in names else STREAMS
    networks = [i for i, name in enumerate(names) if name in checkpoint.MODULES or name in ("teacher", "critic")]
    if not networks:
        return PartitionSpec()
    return param_spec("/".join(names[networks[-1] + 1 :]), leaf.shape, mesh)


def arrange(batch: Any, devices: int) -> Any:
    """A batch from the host, `[streams, b, ...]`, as `[streams / devices, devices, b, ...]`; in several processes the
    streams and the devices of this one."""
    return each(lambda a: a.reshape(a.shape[0] // devices, devices, *a.shape[1:]), batch)


def own_places(mesh: Mesh | None) -> list[int]:
    """Which devices of the mesh, counted along it, are this process's."""
    if mesh is None:
        return [0]
    return [i for i, d in enumerate(mesh.devices.flat) if d.process_index == jax.process_index()]


def put(tree: Any, mesh: Mesh | None, *, streams: bool = False) -> Any:
    """A state, frozen networks, or (`streams`) an arranged batch on the devices."""
    if mesh is None:
        return jax.tree.map(jnp.asarray, tree)
    if not streams:
        return jax.device_put(tree, shardings(tree, mesh))
    sharding, mine = NamedSharding(mesh, STREAMS), own_places(mesh)

    def place(a):
        shape = (a.shape[0], mesh.size, *a.shape[2:])
        # A device asks for its own column; here columns are counted among this process's.
        return jax.make_array_from_callback(shape, sharding, lambda at: a[:, mine.index(at[1].start or 0)][:, None])

    if isinstance(tree, Parted):
        everywhere = NamedSharding(mesh, PartitionSpec())
        # Not `device_put`, which would have several processes compare theirs first.
        put_one = lambda a: jax.make_array_from_callback(np.shape(a), everywhere, lambda at: np.asarray(a)[at])
        tree = tree.replace(shared=jax.tree.map(put_one, tree.shared))
    return each(place, tree)


def gathered(tree: Any, mesh: Mesh | None) -> Any:
    """All of a tree in the host memory of every process."""
    if jax.process_count() > 1:
        whole = jax.jit(lambda a: a, out_shardings=NamedSharding(mesh, PartitionSpec()))
        return jax.tree.map(lambda a: jax.device_get(whole(a)), tree)  # one at a time is whole on the devices
    return jax.device_get(tree)
