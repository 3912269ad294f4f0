"""Softmax attention behind one function: the only place that knows about kernels."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Num

from longlive_jax.models import splash


def attention(
    q: Num[Array, "b t n d"],
    k: Num[Array, "b s n d"],
    v: Num[Array, "b s n d"],
    *,
    key_length: Int[Array, ""] | None = None,
    mask: Bool[Array, "t s"] | None = None,
    implementation: str | None = None,
) -> Num[Array, "b t n d"]:
    """Scaled dot-product attention, softmax in float32.

    Args:
      q, k, v: queries, keys and values, heads on the third axis.
      key_length: how many keys, from the first on, exist; None for all. Costs nothing on a GPU, unlike `mask`.
      mask: which key each query may see (training with teacher forcing only).
      implementation: "xla", "cudnn", "splash", or None: cuDNN where it can run (GPU, 16-bit, heads of at most 256),
        splash where it can (TPU, no mask, heads a multiple of 128 wide), else XLA. An explicit "cudnn" or "splash" that
        cannot run fails loudly instead of building the logits.

    Returns:
      `[b, t, n, d]` in the dtype of q.
    """
    if implementation == "splash" or (implementation is None and splash.refusal(q, mask) is None):
        return splash.attention(q, k, v, key_length=key_length, mask=mask)
    if implementation is None:
        implementation = "cudnn" if _cudnn_can_run(q) else "xla"
    lengths = None if key_length is None else jnp.broadcast_to(key_length, q.shape[:1]).astype(jnp.int32)
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=None if mask is None else mask[None, None],
        key_value_seq_lengths=lengths,
        implementation=implementation,
    )


def _cudnn_can_run(q) -> bool:
    on_gpu = jax.default_backend() == "gpu"
    return on_gpu and q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] <= 256 and q.shape[-1] % 8 == 0
