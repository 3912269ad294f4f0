"""int8 weights for the linear layers inside the blocks, and the two ways to multiply with them.

A kernel becomes int8 with one float32 scale an output channel, the largest magnitude of a channel at 127. Embeddings,
time projection and head stay as they are: 2 % of Wan's weights. Activations stay floats or, for hardware with int8
units, become int8 on the way, a scale a token.

Own code and not qwix's: qwix finds a layer's weights by walking Python's frames, and under our split parameters and
`lax.scan` it leaves them float without a word; its arrays would not be plain leaves of our files either. What is needed
is one layer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int8, Num

from longlive_jax.errors import UserError
from longlive_jax.models.layers import Linear, map_linears

INT8 = "int8"
"""The one way to quantise; also what a quantised layer calls its values."""

SCALE = "scale"
"""What a quantised layer calls its scales; float32 whatever the dtype of the rest."""

CPU_FLAGS = Path("/proc/cpuinfo")

LARGEST = 127
"""-128 is not used, so that the range is symmetric and no zero point is needed."""


def quantize(kernel: Any) -> tuple[Any, Any]:
    """A kernel [..., in, out], numpy's or JAX's, as int8 values [..., out, in] and float32 scales [..., out].

    The summed axis comes last, as int8 units want it: cuBLAS has no other layout, and from [in, out] XLA would keep a
    second, transposed copy of all weights beside the first.
    """
    xp = kernel.__array_namespace__()
    kernel = xp.swapaxes(kernel.astype(xp.float32), -1, -2)
    scale = _scale(kernel, xp)
    return xp.rint(kernel / scale).astype(xp.int8), scale.squeeze(-1)


def dequantize(values: Any, scale: Any) -> Any:
    """The float32 kernel [..., in, out] again, up to the rounding."""
    xp = values.__array_namespace__()
    return xp.swapaxes(values.astype(xp.float32) * scale[..., None], -1, -2)


def _scale(x, xp):
    """What 1 of the int8 values along the last axis is worth; of zeros any value will do but 0."""
    # Times the reciprocal, as XLA would make of a division by a constant: numpy and JAX give the same bits.
    largest = xp.max(xp.abs(x), axis=-1, keepdims=True)
    return xp.maximum(largest * np.float32(1 / LARGEST), xp.finfo(xp.float32).tiny)


# MARK: multiplying


def weight_only(x: Num[Array, "*n i"], values: Int8[Array, "o i"]) -> tuple[Num[Array, "*n o"], float]:
    """Products in the dtype of x, whose numbers hold an int8 exactly."""
    return _contract(x, values.astype(x.dtype), x.dtype), 1.0


def w8a8(x: Num[Array, "*n i"], values: Int8[Array, "o i"]) -> tuple[Num[Array, "*n o"], Float[Array, "*n 1"]]:
    """Activations too in int8, a scale a token, found on the way. Products and sums are whole numbers.

    The sums leave the product in the dtype of x: so much of what follows XLA fuses with it in any case, and bfloat16 is
    half the memory traffic of int32.
    """
    wide = x.astype(jnp.float32)
    scale = _scale(wide, jnp)
    return _contract(jnp.rint(wide / scale).astype(jnp.int8), values, jnp.int32).astype(x.dtype), scale


def _contract(x, values, dtype):
    return jax.lax.dot_general(x, values, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=dtype)


MATMULS = {"weight_only": weight_only, "w8a8": w8a8}
"""Functions of activations and int8 values; the sums in the dtype of x, and what is to be multiplied to them."""


def resolve_matmul(name: str) -> str:
    """`auto` is w8a8 where the hardware has int8 units, else weight_only.

    Raises:
      UserError: there is no such name.
    """
    if name not in ("auto", *MATMULS):
        raise UserError(f"int8_matmul is '{name}'; auto, weight_only and w8a8 are known")
    if name == "auto":
        return "w8a8" if _has_int8_units() else "weight_only"
    return name


def _has_int8_units() -> bool:
    """Accelerators have; a CPU says so, on Linux. With them w8a8 took a quarter of float32's time, see docs/int8.md."""
    if jax.default_backend() != "cpu":
        return True
    try:
        flags = CPU_FLAGS.read_text()
    except OSError:
        return False
    return "vnni" in flags or "amx_int8" in flags


class Int8Linear(nnx.Module):
    """A `Linear` with its kernel in int8.

    Args:
      base: the layer; its parameters may have a leading layer axis.
      matmul: a name of `MATMULS`.
    """

    def __init__(self, base: Linear, matmul: str):
        values, scale = quantize(base.kernel.get_value())
        self.int8, self.scale, self.bias = nnx.Param(values), nnx.Param(scale), base.bias
        self.matmul = matmul

    def __call__(self, x: Num[Array, "... i"]) -> Num[Array, "... o"]:
        y, token_scale = MATMULS[self.matmul](x, self.int8.get_value())
        y = y.astype(jnp.float32) * (token_scale * self.scale.get_value())
        return (y if self.bias is None else y + self.bias.astype(jnp.float32)).astype(x.dtype)


def with_int8(model: nnx.Module, matmul: str = "weight_only") -> nnx.Module:
    """A network with every linear layer inside its blocks in int8, in place; stacked or not, nothing else changes."""
    map_linears(model.blocks, lambda linear: Int8Linear(linear, matmul))
    return model


def quantize_params(params: dict[str, Any]) -> dict[str, Any]:
    """Parameters of a network as those of `with_int8`."""

    def walk(node):
        if not isinstance(node, dict):
            return node
        if "kernel" not in node:
            return {name: walk(value) for name, value in node.items()}
        values, scale = quantize(node["kernel"])
        return {name: value for name, value in node.items() if name != "kernel"} | {INT8: values, SCALE: scale}

    return params | {"blocks": walk(params["blocks"])}
