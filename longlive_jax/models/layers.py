"""Small layers that the networks share, and the stack of equal layers.

A layer computes in the dtype of its input: parameters are cast where they are used, so one set of weights serves
float32 and bfloat16. Norms, modulation and the time embedding are float32 islands (see `transformer.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Num

from longlive_jax.models import products


class Linear(nnx.Module):
    """y = x W + b over the last axis; W is [in, out]."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True, std: float | None = None, rngs):
        init = nnx.initializers.xavier_uniform() if std is None else nnx.initializers.normal(std)
        self.kernel = nnx.Param(init(rngs.params(), (in_features, out_features), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(out_features)) if bias else None

    def __call__(self, x: Num[Array, "... i"]) -> Num[Array, "... o"]:
        return products.linear(x, self.kernel.get_value(), None if self.bias is None else self.bias.get_value())


class RMSNorm(nnx.Module):
    """x / rms(x) * weight over the last axis, in float32."""

    def __init__(self, dim: int, eps: float):
        self.weight = nnx.Param(jnp.ones(dim))
        self.eps = eps

    def __call__(self, x: Num[Array, "... d"]) -> Num[Array, "... d"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        return (y * self.weight.astype(jnp.float32)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer norm with weight and bias, in float32."""

    def __init__(self, dim: int, eps: float):
        self.weight = nnx.Param(jnp.ones(dim))
        self.bias = nnx.Param(jnp.zeros(dim))
        self.eps = eps

    def __call__(self, x: Num[Array, "... d"]) -> Num[Array, "... d"]:
        y = layer_norm(x, self.eps)
        return (y * self.weight.astype(jnp.float32) + self.bias.astype(jnp.float32)).astype(x.dtype)


def layer_norm(x: Num[Array, "... d"], eps: float) -> Float[Array, "... d"]:
    """Layer norm without weight or bias. Returns float32: what follows is the modulation, a float32 island."""
    x = x.astype(jnp.float32)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)


def map_linears(layers: nnx.Module, make: Callable[[Linear], nnx.Module]) -> None:
    """Puts `make(linear)` in the place of every plain linear layer in `layers`."""
    found = []
    for _, module in nnx.iter_modules(layers):
        found += [(module, name, child) for name, child in vars(module).items() if type(child) is Linear]
    for module, name, child in found:
        setattr(module, name, make(child))


def structure(make: Callable[[], nnx.Module]) -> nnx.GraphDef:
    """What a network is without its parameters; allocates nothing."""
    return nnx.split(nnx.eval_shape(make))[0]


def initial(make: Callable[[], nnx.Module]) -> dict[str, Any]:
    """First parameters of a network, drawn by one program: one by one, every shape would be compiled on its own."""
    return jax.jit(lambda: nnx.to_pure_dict(nnx.state(make())))()


def stack_layers(make: Callable[[nnx.Rngs], nnx.Module], num_layers: int, rngs: nnx.Rngs) -> nnx.Module:
    """`num_layers` equal layers as one module whose every parameter has a leading layer axis.

    Under `nnx.eval_shape` nothing is allocated, as for any other module.
    """
    keys = jax.random.split(rngs.params(), num_layers)
    graph = structure(lambda: make(nnx.Rngs(0)))
    params = jax.vmap(lambda key: nnx.to_pure_dict(nnx.state(make(nnx.Rngs(key)))))(keys)
    return nnx.merge(graph, params)


def run_layers(
    layers: nnx.Module | nnx.List,
    step: Callable[[nnx.Module, Any, Any], tuple[Any, Any]],
    carry: Any,
    xs: Any,
    *,
    remat: Callable | None = None,
    unroll: bool = False,
) -> tuple[Any, Any]:
    """Runs `carry, y = step(layer, carry, x)` over the layers in order.

    Args:
      layers: what `stack_layers` made (one `lax.scan`), or an `nnx.List` of layers (a Python loop: no slices of
        stacked weights, and command buffers on a GPU). Both give the same numbers.
      step: the work of one layer.
      carry: what flows from layer to layer.
      xs: a pytree with a leading layer axis, or a list with one pytree a layer.
      remat: wraps the step for training, as `jax.checkpoint` does; None keeps all activations.
      unroll: whether a scan is written out: longer to compile, but activations kept for a gradient are not copied into
        an array of all layers and out again.

    Returns:
      The last carry, and the ys: stacked on a layer axis after a scan, a list after a loop.
    """
    if isinstance(layers, nnx.List):
        ys = []
        for i, layer in enumerate(layers):
            x = xs[i] if isinstance(xs, list) else jax.tree.map(lambda a: a[i], xs)  # noqa: B023
            graph, params = nnx.split(layer)
            body = _layer_body(graph, step, remat)
            carry, y = body(carry, (params, x))
            ys.append(y)
        return carry, ys
    graph, params = nnx.split(layers)
    return jax.lax.scan(_layer_body(graph, step, remat), carry, (params, xs), unroll=unroll or 1)


def _layer_body(graph, step, remat):
    def body(carry, params_and_x):
        params, x = params_and_x
        return step(nnx.merge(graph, params), carry, x)

    return remat(body) if remat else body
