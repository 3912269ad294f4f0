"""Products and attention on a CPU: bfloat16 by its matrix units.

XLA's CPU compiler gives a product of bfloat16 numbers to those units (AMX) only where the result is asked for in
float32; asked for in bfloat16, or of a bfloat16 and a float32 number, as the derivative of such a product would be, it
turns everything into float32 first and takes four to ten times as long (docs/performance.md). So here every product,
those of the derivatives too, is of two bfloat16 numbers into float32. Elsewhere (float32, GPUs, TPUs) nothing of this
is needed and nothing changes; but that the attention is of use in float32 too.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from longlive_jax import sharding


def by_matrix_units(dtype) -> bool:
    """Whether products of this dtype are for this module."""
    return dtype == jnp.bfloat16 and sharding.platform() == "cpu"


def attends(dtype) -> bool:
    """Whether attention of this dtype is for this module: in float32 too it is quicker than `jax.nn`'s on a CPU."""
    return dtype in (jnp.bfloat16, jnp.float32) and sharding.platform() == "cpu"


def linear(x: Num[Array, "... i"], kernel: Num[Array, "i o"], bias: Num[Array, " o"] | None) -> Num[Array, "... o"]:
    """x W + b in the dtype of x; the derivatives of W and b are float32."""
    if not by_matrix_units(x.dtype):
        y = x @ sharding.whole(kernel.astype(x.dtype))
        return y if bias is None else y + bias.astype(x.dtype)
    kernel = sharding.whole(kernel)  # in float32, for its derivative's sake
    return product(x, kernel) if bias is None else _affine(x, kernel, bias)


@jax.custom_vjp
def product(x: Num[Array, "... i"], kernel: Num[Array, "i o"]) -> Num[Array, "... o"]:
    """x W in the dtype of x, summed in float32."""
    return _contract(x, kernel.astype(x.dtype), x.ndim - 1, 0).astype(x.dtype)


def _product_forward(x, kernel):
    return product(x, kernel), (x, kernel)


def _product_backward(kept, dy):
    x, kernel = kept
    dy = dy.astype(x.dtype)
    dx = _contract(dy, kernel.astype(x.dtype), dy.ndim - 1, 1).astype(x.dtype)
    rows = tuple(range(x.ndim - 1))
    return dx, jax.lax.dot_general(x, dy, ((rows, rows), ((), ())), preferred_element_type=jnp.float32).astype(
        kernel.dtype
    )


product.defvjp(_product_forward, _product_backward)


@jax.custom_vjp
def _affine(x, kernel, bias):
    return (_contract(x, kernel.astype(x.dtype), x.ndim - 1, 0) + bias.astype(jnp.float32)).astype(x.dtype)


def _affine_forward(x, kernel, bias):
    return _affine(x, kernel, bias), (x, kernel, bias)


def _affine_backward(kept, dy):
    x, kernel, bias = kept
    dx, dkernel = _product_backward((x, kernel), dy)
    # A sum over rows as a product: XLA's own loop for it takes as long as the whole layer.
    rows = dy.astype(x.dtype).reshape(-1, dy.shape[-1])
    dbias = _contract(jnp.ones((8, rows.shape[0]), x.dtype), rows, 1, 0)[0]
    return dx, dkernel, dbias.astype(bias.dtype)


_affine.defvjp(_affine_forward, _affine_backward)


def _contract(a, b, axis_a: int, axis_b: int) -> Float[Array, "..."]:
    return jax.lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((), ())), preferred_element_type=jnp.float32)


def batched(a, b, axis_a: int, axis_b: int) -> Float[Array, "n ..."]:
    """Products of a[i] and b[i] over an axis of each, into float32. With two leading axes XLA makes all float32."""
    return jax.lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((0,), (0,))), preferred_element_type=jnp.float32)


# MARK: attention


def attention(
    q: Num[Array, "b t n d"],
    k: Num[Array, "b s n d"],
    v: Num[Array, "b s n d"],
    bias: Float[Array, "t s"] | Float[Array, "1 s"] | None = None,
) -> Num[Array, "b t n d"]:
    """Softmax attention, softmax in float32; the derivative computes the logits again.

    Args:
      q, k, v: queries, keys and values, heads on the third axis.
      bias: added to the logits, the same for every head; no gradient.
    """
    b, t, n, d = q.shape
    y = _attend(*(jnp.swapaxes(a, 1, 2).reshape(b * n, -1, d) for a in (q, k, v)), bias)
    return jnp.swapaxes(y.reshape(b, n, t, d), 1, 2)


@jax.custom_vjp
def _attend(q, k, v, bias):
    return _attend_forward(q, k, v, bias)[0]


def logits(q: Num[Array, "n t d"], k: Num[Array, "n s d"], bias: Any = None) -> Float[Array, "n t s"]:
    """Scaled products of queries and keys in float32, plus the bias."""
    scaled = q.shape[-1] ** -0.5 * batched(q, k, 2, 2)
    return scaled if bias is None else scaled + bias


def _attend_forward(q, k, v, bias):
    scores = logits(q, k, bias)
    largest = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - largest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    y = (batched(weights.astype(v.dtype), v, 2, 1) / total).astype(q.dtype)
    return y, (q, k, v, bias, largest + jnp.log(total), y)


def _attend_backward(kept, dy):
    q, k, v, bias, logsumexp, y = kept
    dy = dy.astype(q.dtype)
    dq, dk, dv = attention_gradients(q, k, v, dy, logits(q, k, bias), logsumexp, row_means(y, dy))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_attend.defvjp(_attend_forward, _attend_backward)


def row_means(y: Num[Array, "... d"], dy: Num[Array, "... d"]) -> Float[Array, "... 1"]:
    """Sum over d of an attention's result times its gradient: what a softmax's derivative takes off."""
    return jnp.sum(y.astype(jnp.float32) * dy.astype(jnp.float32), axis=-1, keepdims=True)


def attention_gradients(q, k, v, dy, scores, logsumexp, mean) -> tuple[Array, Array, Array]:
    """What some of the keys of an attention give to its gradients, in float32.

    Args:
      q, dy: queries and the gradient of their result, [n, t, d].
      k, v: some of the keys and values, [n, s, d].
      scores: `logits` of these keys.
      logsumexp, mean: [n, t, 1]: of all keys' logits; and `row_means`.
    """
    weights = jnp.exp(scores - logsumexp)
    dv = batched(weights.astype(q.dtype), dy, 1, 1)
    dlogits = (weights * (batched(dy, v, 2, 2) - mean) * q.shape[-1] ** -0.5).astype(q.dtype)
    return batched(dlogits, k, 2, 1), batched(dlogits, q, 1, 1), dv
