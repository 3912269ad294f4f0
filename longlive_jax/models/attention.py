"""Softmax attention behind one function: the only place that knows about kernels."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from longlive_jax import sharding
from longlive_jax.errors import UserError
from longlive_jax.models import products, splash

LOGITS_LIMIT = 2**30
"""Bytes of float32 logits above which XLA's attention goes through the queries in chunks. One layer of Wan 2.1 1.3B at
480 x 832 would build 4.2 GB of them."""


def attention(
    q: Num[Array, "b t n d"],
    k: Num[Array, "b s n d"],
    v: Num[Array, "b s n d"],
    *,
    key_length: Int[Array, ""] | None = None,
    mask: Bool[Array, "t s"] | None = None,
    implementation: str | None = None,
    split_kv: int = 1,
) -> Num[Array, "b t n d"]:
    """Scaled dot-product attention, softmax in float32.

    Args:
      q, k, v: queries, keys and values, heads on the third axis.
      key_length: how many keys, from the first on, exist; None for all. Costs little on a GPU, unlike `mask`.
      mask: which key each query may see (training with teacher forcing only).
      implementation: "xla" (builds the logits, in chunks where they are large), "cudnn", "splash", or None: cuDNN for
        16-bit numbers on a GPU, splash where it can run (TPU, no mask, heads a multiple of 128 wide), else XLA. An
        explicit "cudnn" or "splash" that cannot run fails loudly instead of building the logits, and so does a GPU's
        choice of cuDNN.
      split_kv: computes so many equal parts of the keys side by side and joins them: more, smaller pieces of work for
        a GPU that one part leaves partly idle. Equal up to rounding. Not with `mask`; splash does not need it.

    Returns:
      `[b, t, n, d]` in the dtype of q.

    Raises:
      UserError: cuDNN would be the choice but cannot run, or `split_kv` does not divide the keys.
    """
    if implementation == "splash" or (implementation is None and splash.refusal(q, mask) is None):
        return splash.attention(q, k, v, key_length=key_length, mask=mask)
    implementation = implementation or _choose(q)
    if implementation == "xla" and split_kv == 1 and products.attends(q.dtype) and _chunks(q, k) == 1:
        return products.attention(q, k, v, _bias(mask, key_length, k.shape[1]))
    if split_kv > 1:
        return _in_parts(q, k, v, key_length, split_kv, implementation)
    lengths = None if key_length is None else jnp.broadcast_to(key_length, q.shape[:1]).astype(jnp.int32)

    def run(q, mask):
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            mask=None if mask is None else mask[None, None],
            key_value_seq_lengths=lengths,
            implementation=implementation,
        )

    chunks = _chunks(q, k) if implementation == "xla" else 1
    if chunks == 1:
        return run(q, mask)
    queries = jnp.moveaxis(q.reshape(q.shape[0], chunks, -1, *q.shape[2:]), 1, 0)
    masks = None if mask is None else mask.reshape(chunks, -1, mask.shape[1])
    y = jax.lax.map(lambda xs: run(*xs), (queries, masks))
    return jnp.moveaxis(y, 0, 1).reshape(q.shape)


def _bias(mask, key_length, keys: int) -> Float[Array, "t s"] | Float[Array, "1 s"] | None:
    """What to add to the logits."""
    if key_length is not None:
        there = jnp.arange(keys)[None] < key_length
        mask = there if mask is None else mask & there
    return None if mask is None else jnp.where(mask, 0.0, -1e30)


def _choose(q) -> str:
    if sharding.platform() != "gpu" or q.dtype not in (jnp.bfloat16, jnp.float16):
        return "xla"
    if q.shape[-1] > 256 or q.shape[-1] % 8:
        raise UserError(
            f"attention heads {q.shape[-1]} wide do not fit cuDNN, which takes multiples of 8 up to 256, and logits "
            'are not built behind your back: use float32, or implementation="xla" in the code that calls `attention`'
        )
    return "cudnn"


def _chunks(q, k) -> int:
    """The fewest equal chunks of the queries whose logits keep to the limit, or 1 where nothing divides them well."""
    batch, queries, heads, _ = q.shape
    least = -(-4 * batch * heads * queries * k.shape[1] // LOGITS_LIMIT)
    return next((n for n in range(least, min(4 * least, queries) + 1) if queries % n == 0), 1)


def _in_parts(q, k, v, key_length, parts: int, implementation: str):
    """Attention to each part of the keys, the parts on the batch axis; joined by their logsumexps."""
    b, t, n, d = q.shape
    if k.shape[1] % parts:
        raise UserError(f"split_kv is {parts}, which does not divide {k.shape[1]} keys; take one that does, or 1")
    size = k.shape[1] // parts
    lengths = None
    if key_length is not None:
        lengths = jnp.clip(key_length - size * jnp.arange(parts), 0, size).astype(jnp.int32)
    fold = lambda a: a.reshape(b * parts, size, n, d)
    y, logsumexp = _with_logsumexp(
        jnp.repeat(q, parts, axis=0),
        fold(k),
        fold(v),
        # A part without keys reads one, which then gets no weight: kernels do not say what nothing gives.
        None if lengths is None else jnp.tile(jnp.maximum(lengths, 1), b),
        implementation,
    )
    y, logsumexp = y.reshape(b, parts, t, n, d), logsumexp.reshape(b, parts, t, n)
    if lengths is not None:
        logsumexp = jnp.where(lengths[:, None, None] > 0, logsumexp, -jnp.inf)
    weights = jax.nn.softmax(logsumexp, axis=1)[..., None]
    return jnp.sum(y.astype(jnp.float32) * weights, axis=1).astype(q.dtype)


def _with_logsumexp(q, k, v, lengths, implementation: str) -> tuple[Num[Array, "b t n d"], Float[Array, "b t n"]]:
    """Attention and the float32 logsumexp of the logits of each query."""
    scale = q.shape[-1] ** -0.5
    if implementation == "cudnn":
        # Not by jax.nn: that rounds the logsumexp to the dtype of q, and 1 / 32 of an exponent is 3 % of a weight.
        from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

        all_queries = None if lengths is None else jnp.full_like(lengths, q.shape[1])
        mask_type = MaskType.NO_MASK if lengths is None else MaskType.PADDING
        y, logsumexp = dot_product_attention(
            q, k, v, None, None, all_queries, lengths, scale=scale, mask_type=mask_type, return_residual=True
        )
        return y, jnp.swapaxes(logsumexp, 1, 2)
    logits = scale * jnp.einsum("btnd,bsnd->bnts", q, k, preferred_element_type=jnp.float32)
    if lengths is not None:
        logits = jnp.where(jnp.arange(k.shape[1]) < lengths[:, None, None, None], logits, -jnp.inf)
    logsumexp = jax.nn.logsumexp(logits, axis=-1)
    weights = jnp.exp(logits - logsumexp[..., None]).astype(v.dtype)
    return jnp.einsum("bnts,bsnd->btnd", weights, v), jnp.swapaxes(logsumexp, 1, 2)
