"""FLOPs of a step, counted on its program: every matrix product and convolution, loops included.

The program is traced without rematerialisation, so what is computed twice counts once: model FLOPs, as MFU is defined.
XLA's own count takes a loop's body once and nothing inside a kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core

PEAKS = {
    "H100": 989e12, "H200": 989e12, "A100": 312e12, "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5e": 197e12,
    "TPU v5": 459e12, "TPU v6 lite": 918e12, "TPU v6e": 918e12,
}  # fmt: skip
"""Dense bfloat16 FLOP/s of a device (the vendors' data sheets), by a part of what JAX calls it; first match counts."""


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """What a device could do at most in `dtype`; None where that is not known."""
    if dtype != "bfloat16":
        return None
    return next((peak for name, peak in PEAKS.items() if name in device_kind), None)


def count_flops(function: Callable, *args: Any) -> float:
    """FLOPs of `function(*args)`; arguments are arrays or their shapes, nothing is computed.

    Loops whose length is data count once.
    """
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), args)
    return _count(jax.make_jaxpr(function)(*shapes).jaxpr)


def _count(jaxpr) -> float:
    return sum((_equation(equation) for equation in jaxpr.eqns), 0.0)


def _equation(equation) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        left, right = (v.aval.shape for v in equation.invars)
        (_, contracted), (_, batch) = params["dimension_numbers"]
        rest = [n for i, n in enumerate(right) if i not in (*contracted, *batch)]
        return 2.0 * math.prod(left) * math.prod(rest)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        out_features = params["dimension_numbers"].rhs_spec[0]
        # Elements of the output, times what is summed for each; the zeros between those of a dilated input left out.
        summed = math.prod(kernel) / kernel[out_features] / math.prod(params["lhs_dilation"])
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * summed
    if name == "scan":
        return params["length"] * _count(params["jaxpr"].jaxpr)
    if name == "cond":
        return max(_count(branch.jaxpr) for branch in params["branches"])
    return sum((_count(inner) for inner in _inner(params)), 0.0)


def _inner(params: dict[str, Any]):
    """The programs that an equation calls: of jit, checkpoint, custom derivatives, while, shard_map."""
    for value in params.values():
        if isinstance(value, jax.extend.core.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, jax.extend.core.Jaxpr):
            yield value
