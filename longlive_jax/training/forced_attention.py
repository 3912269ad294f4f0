"""The attention of teacher forcing, without the logits that its mask would forbid.

[clean | noisy] frames in G blocks: of the (2G)^2 pairs of blocks that a masked attention computes, G (G + 1) are used.
Here every block attends to itself, all of them at once, and to the clean blocks before it, clean and noisy queries
together; both are joined by their maxima and sums. Equal to attention with `teacher_forcing_mask` up to rounding.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Num

from longlive_jax.models.products import attention_gradients, batched, logits, row_means


def forced_attention(
    q: Num[Array, "b t n d"], k: Num[Array, "b t n d"], v: Num[Array, "b t n d"], blocks: int
) -> Num[Array, "b t n d"]:
    """Attention of [clean | noisy] tokens, t = 2 * blocks * tokens a block; softmax in float32.

    Args:
      q, k, v: heads on the third axis.
      blocks: of the clean half, and of the noisy one.
    """
    y = _attend(*(_by_block(a, blocks) for a in (q, k, v)))
    bn, g, _, m, d = y.shape
    y = y.reshape(q.shape[0], bn // q.shape[0], g, 2, m, d)
    return jnp.transpose(y, (0, 3, 2, 4, 1, 5)).reshape(q.shape)


def _by_block(x, blocks: int):
    """[b, t, n, d] as [b n, block, clean or noisy, token, d]."""
    b, t, n, d = x.shape
    x = x.reshape(b, 2, blocks, t // (2 * blocks), n, d)
    return jnp.transpose(x, (0, 4, 2, 1, 3, 5)).reshape(b * n, blocks, 2, -1, d)


@jax.custom_vjp
def _attend(q, k, v):
    return _forward(q, k, v)[0]


def _forward(q, k, v):
    n, g, _, m, d = q.shape
    own = logits(_alone(q), _alone(k))
    largest = jnp.max(own, axis=-1, keepdims=True)
    weights = jnp.exp(own - largest)
    sums = jnp.sum(weights, axis=-1, keepdims=True).reshape(n, g, 2 * m, 1)
    values = batched(weights.astype(q.dtype), _alone(v), 2, 1).reshape(n, g, 2 * m, d)
    largest = largest.reshape(n, g, 2 * m, 1)
    clean_k, clean_v = (a[:, :, 0].reshape(n, g * m, d) for a in (k, v))
    results, logsumexps = [], []
    for i in range(g):
        value, total, top = values[:, i], sums[:, i], largest[:, i]
        if i > 0:
            past = logits(q[:, i].reshape(n, 2 * m, d), clean_k[:, : i * m])
            old, top = top, jnp.maximum(top, jnp.max(past, axis=-1, keepdims=True))
            weights, keep = jnp.exp(past - top), jnp.exp(old - top)
            value = value * keep + batched(weights.astype(q.dtype), clean_v[:, : i * m], 2, 1)
            total = total * keep + jnp.sum(weights, axis=-1, keepdims=True)
        results.append((value / total).astype(q.dtype))
        logsumexps.append(top + jnp.log(total))
    y = jnp.stack(results, axis=1).reshape(q.shape)
    return y, (q, k, v, y, jnp.stack(logsumexps, axis=1))


def _backward(kept, dy):
    q, k, v, y, logsumexp = kept
    n, g, _, m, d = q.shape
    dy = dy.astype(q.dtype)
    mean = row_means(y, dy).reshape(n, g, 2 * m, 1)
    flat = (_alone(q), _alone(k), _alone(v), _alone(dy))
    own = logits(flat[0], flat[1])
    dq, dk, dv = attention_gradients(*flat, own, logsumexp.reshape(-1, m, 1), mean.reshape(-1, m, 1))
    dq, dk, dv = dq.reshape(n, g, 2 * m, d), dk.reshape(n, g, 2, m, d), dv.reshape(n, g, 2, m, d)
    clean_k, clean_v, clean_dk, clean_dv = (a[:, :, 0].reshape(n, g * m, d) for a in (k, v, dk, dv))
    dqs = [dq[:, 0]]
    for i in range(1, g):
        past_k, past_v = clean_k[:, : i * m], clean_v[:, : i * m]
        queries, gradients = (a[:, i].reshape(n, 2 * m, d) for a in (q, dy))
        past = logits(queries, past_k)
        parts = attention_gradients(queries, past_k, past_v, gradients, past, logsumexp[:, i], mean[:, i])
        dqs.append(dq[:, i] + parts[0])
        clean_dk = clean_dk.at[:, : i * m].add(parts[1])
        clean_dv = clean_dv.at[:, : i * m].add(parts[2])
    join = lambda clean, both: jnp.stack([clean.reshape(n, g, m, d), both[:, :, 1]], axis=2)
    made = jnp.stack(dqs, axis=1).reshape(q.shape), join(clean_dk, dk), join(clean_dv, dv)
    return tuple(a.astype(q.dtype) for a in made)


_attend.defvjp(_forward, _backward)


def _alone(x):
    """Every block by itself: [n, block, 2, token, d] as [n * block * 2, token, d]."""
    return x.reshape(-1, *x.shape[-2:])
