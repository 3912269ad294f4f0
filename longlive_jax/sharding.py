"""Where arrays live on a mesh: one table from parameter path to axes, and the batch over the data axes.

Axes: `data` (videos), `fsdp` (videos, and parameters cut up), `context` (tokens of one video), `tensor` (heads and
hidden widths). The compiler places the activations from these; a mesh changes where numbers are computed, not which.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
import re
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Num

from longlive_jax.errors import UserError

AXES = ("data", "fsdp", "context", "tensor")

PARAM_SPECS: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    # Path in the parameter tree -> axes of the *last* dimensions (a stacked layer axis in front stays whole).
    # The text encoder's too, whose attention is `attn` and which has a `gate`: in training it is cut up as well.
    (r"blocks/.*attn/(q|k|v)/kernel", ("fsdp", "tensor")),  # [D, D]
    (r"blocks/.*attn/o/kernel", ("tensor", "fsdp")),  # [D, D]
    (r"blocks/.*ffn/(up|gate)/kernel", ("fsdp", "tensor")),  # [D, F]
    (r"blocks/.*ffn/down/kernel", ("tensor", "fsdp")),  # [F, D]
    (r"blocks/.*ffn/up/bias", ("tensor",)),  # [F]
    # int8 layers have the summed axis last, and a scale an output channel.
    (r"blocks/.*(self_attn|cross_attn)/(q|k|v)/int8|blocks/.*ffn/up/int8", ("tensor", "fsdp")),
    (r"blocks/.*(self_attn|cross_attn)/o/int8|blocks/.*ffn/down/int8", ("fsdp", "tensor")),
    (r"blocks/.*(self_attn|cross_attn)/(q|k|v)/scale|blocks/.*ffn/up/scale", ("tensor",)),
    (r"blocks/.*(self_attn|cross_attn)/o/scale|blocks/.*ffn/down/scale", ("fsdp",)),
    (r"blocks/.*/lora_a", ("fsdp", None)),  # [D or F, rank]
    (r"blocks/.*/lora_b", (None, "fsdp")),  # [rank, D or F]
    (r"token_embedding", (None, "fsdp")),
    (r"(patch_embedding|text_embedding/.*|time_embedding/.*|time_projection|head/linear)/kernel", ("fsdp", None)),
)


def make_mesh(*, data: int = 1, fsdp: int = 1, context: int = 1, tensor: int = 1, devices=None) -> Mesh:
    """A mesh of the first data x fsdp x context x tensor devices.

    Raises:
      UserError: there are too few devices.
    """
    sizes = (data, fsdp, context, tensor)
    devices = jax.devices() if devices is None else devices
    shape = " x ".join(f"{name} {size}" for name, size in zip(AXES, sizes))
    if min(sizes) < 1:
        raise UserError(f"mesh {shape} has an empty axis; every axis needs 1 or more")
    needed = data * fsdp * context * tensor
    if needed > len(devices):
        raise UserError(f"mesh {shape} needs {needed} devices, there are {len(devices)}; make an axis smaller")
    # Auto axes: the compiler chooses. jax.make_mesh would give Explicit ones by default.
    return jax.make_mesh(sizes, AXES, devices=devices[:needed], axis_types=(AxisType.Auto,) * len(AXES))


# MARK: inside a program
#
# A program traced under `using(mesh)` knows the mesh. Most need not: the compiler places everything. But it cannot cut
# kernels, and does not find the all-to-all between tokens cut up and heads cut up by itself.

_taken: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar("taken", default=())


def using(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """Programs traced inside know the mesh; None for no mesh."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


@contextlib.contextmanager
def taken(*axes: str) -> Iterator[None]:
    """Inside, these axes cut up what a `jax.vmap` with `spmd_axis_name` is over, and nothing else."""
    token = _taken.set(axes)
    try:
        yield
    finally:
        _taken.reset(token)


def platform() -> str:
    """What the program being traced is for: "cpu", "gpu" or "tpu". That of the mesh in force, which may be of devices
    that exist for the compiler only; else of the default device."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def heads_spec(mesh: jax.sharding.AbstractMesh, batch: int, heads: int) -> PartitionSpec:
    """Axes of `[batch, token, head, channel]` in a kernel: every device has all tokens of its videos and heads.

    Axes that do not divide what they would cut leave it whole.
    """

    def over(axes, n):
        axes = tuple(a for a in axes if a in mesh.axis_names and a not in (*mesh.manual_axes, *_taken.get()))
        return axes if n % math.prod(mesh.shape[a] for a in axes) == 0 else None

    return PartitionSpec(over(("data", "fsdp"), batch), None, over(("context", "tensor"), heads))


def by_token(x: Num[Array, "b t n ..."]) -> Num[Array, "b t n ..."]:
    """Tokens over the axis `context`, if the mesh in force has one that divides them: all but attention works so."""
    size = _context()
    free = [PartitionSpec.UNCONSTRAINED] * x.ndim
    return x if size == 1 or x.shape[2] % size else _constrain(x, [*free[:2], "context", *free[3:]])


def by_head(x: Num[Array, "... h d"]) -> Num[Array, "... h d"]:
    """Heads over the axis `context` likewise, all tokens on every device: for attention and its cache (Ulysses)."""
    size = _context()
    free = [PartitionSpec.UNCONSTRAINED] * x.ndim
    return x if size == 1 or x.shape[-2] % size else _constrain(x, [*free[:-4], free[0], None, "context", None])


def whole(weights: Num[Array, "i o"]) -> Num[Array, "i o"]:
    """Weights as a device needs them that computes for its own stream: gathered, where `taken` axes cut them up.

    Said where they are used and in the dtype they are used in, so one layer at a time crosses the wires, half as wide
    as the float32 it is kept in. Left alone, the compiler computes with parts of the weights instead, and sends the
    activations of every layer around (seen on CPUs and for TPUs).
    """
    return _constrain(weights, [None] * weights.ndim) if "fsdp" in _taken.get() else weights


def _context() -> int:
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape["context"] if "context" in mesh.axis_names else 1


def _constrain(x, axes):
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))


# MARK: placement


def param_spec(path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Axes of one parameter; dimensions that an axis does not divide stay whole."""
    for pattern, axes in PARAM_SPECS:
        if re.fullmatch(pattern, path):
            spec = (None,) * (len(shape) - len(axes)) + axes
            return PartitionSpec(*(a if a and n % mesh.shape[a] == 0 else None for a, n in zip(spec, shape)))
    return PartitionSpec()


def shard_params(params: Any, mesh: Mesh | None) -> Any:
    """Parameters on the devices: by the table, or on the default device without a mesh."""
    if mesh is None:
        return jax.tree.map(jax.numpy.asarray, params)

    def place(path, leaf):
        name = "/".join(str(getattr(p, "key", p)) for p in path[1:])  # path[0] is the network
        return jax.device_put(leaf, NamedSharding(mesh, param_spec(name, leaf.shape, mesh)))

    return jax.tree_util.tree_map_with_path(place, params)


def shard_batch(tree: Any, mesh: Mesh | None, *, axis: int = 0) -> Any:
    """Arrays with a batch axis, cut over `data` and `fsdp` where they divide it, else copied to all."""
    if mesh is None:
        return tree

    def place(leaf):
        batch = leaf.shape[axis]
        over = ("data", "fsdp") if batch % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0 else None
        spec = PartitionSpec(*([None] * axis), over)
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    return jax.tree.map(place, tree)
