"""FLOPs of a step, counted on its program: every matrix product and convolution, loops included.

The program is traced without rematerialisation, so what is computed twice counts once: model FLOPs, as MFU is defined.
What data decides counts by what it comes to on average, where that is said.
XLA's own count takes a loop's body once and nothing inside a kernel.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
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


Expected = Mapping[str, tuple[float, ...]]
"""What control flow by data comes to on average, by the innermost `jax.named_scope` that it is in: rounds of a loop, or
how likely each branch of a conditional is (of `lax.cond` false, true); branches beyond those given are never taken."""


def count_flops(function: Callable, *args: Any, expected: Expected | None = None) -> float:
    """FLOPs of `function(*args)`; arguments are arrays or their shapes, nothing is computed.

    Loops whose length is data count once and conditionals as their largest branch, unless `expected` knows better.
    """
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), args)
    return _count(jax.make_jaxpr(function)(*shapes).jaxpr, expected or {})


def _count(jaxpr, expected: Expected) -> float:
    return sum((_equation(equation, expected) for equation in jaxpr.eqns), 0.0)


def _equation(equation, expected: Expected) -> float:
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
        return params["length"] * _count(params["jaxpr"].jaxpr, expected)
    if name == "cond":
        branches = [_count(branch.jaxpr, expected) for branch in params["branches"]]
        known = _known(equation, expected)
        return max(branches) if known is None else sum(share * flops for share, flops in zip(known, branches))
    flops = sum((_count(inner, expected) for inner in _inner(params)), 0.0)
    known = _known(equation, expected) if name == "while" else None
    return flops if known is None else known[0] * flops


def _known(equation, expected: Expected) -> tuple[float, ...] | None:
    # Transformations wrap a scope's name, as in "transpose(jvp(name))".
    scopes = re.findall(r"\w+", str(equation.source_info.name_stack))
    return next((expected[scope] for scope in reversed(scopes) if scope in expected), None)


def _inner(params: dict[str, Any]):
    """The programs that an equation calls: of jit, checkpoint, custom derivatives, while, shard_map."""
    for value in params.values():
        if isinstance(value, jax.extend.core.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, jax.extend.core.Jaxpr):
            yield value
