"""The umT5 encoder that turns prompt tokens into the embeddings the transformer attends to. Reference section 8.

T5 in its v1.1 form (gated GELU, RMS norms, no biases, no attention scale), except that every layer has its own table of
relative position biases. Shapes: B batch, L tokens, D width, H heads, d head width. Activations have the `dtype` asked
for at the call; norms and softmax are float32.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Num

from longlive_jax.config import TextEncoderConfig
from longlive_jax.models.layers import Linear, RMSNorm, run_layers, stack_layers


def relative_buckets(length: int, num_buckets: int, max_distance: int) -> np.ndarray:
    """T5's bidirectional buckets of (key position - query position): int32 [query, key].

    Half of the buckets are for keys after the query. In each half, near distances have a bucket of their own, farther
    ones share logarithmically wider ones, and all from `max_distance` on share the last. On the host, in float32 as the
    reference: the bounds between buckets fall on whole distances, where another precision may round the other way.
    """
    offset = np.arange(length)[None] - np.arange(length)[:, None]
    half = num_buckets // 2
    exact = half // 2
    distance = np.abs(offset)
    scale = np.float32(math.log(max_distance / exact))
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact)) / scale
    far = exact + (ratio * np.float32(half - exact)).astype(np.int32)
    bucket = np.where(distance < exact, distance, np.minimum(far, half - 1))
    return (bucket + np.where(offset > 0, half, 0)).astype(np.int32)


class PositionBias(nnx.Module):
    """What a head adds to its logits for the distance between query and key."""

    def __init__(self, cfg: TextEncoderConfig, *, rngs):
        std = (2 * cfg.num_buckets * cfg.num_heads) ** -0.5
        init = nnx.initializers.normal(std)
        self.embedding = nnx.Param(init(rngs.params(), (cfg.num_buckets, cfg.num_heads), jnp.float32))
        self.num_buckets, self.max_distance = cfg.num_buckets, cfg.max_distance

    def __call__(self, length: int) -> Float[Array, "h l s"]:
        buckets = relative_buckets(length, self.num_buckets, self.max_distance)
        return jnp.moveaxis(self.embedding[buckets], -1, 0).astype(jnp.float32)


class Attention(nnx.Module):
    """Self-attention without a scale (T5 has it in the initial q weights), softmax in float32."""

    def __init__(self, cfg: TextEncoderConfig, *, rngs):
        dim, inner = cfg.dim, cfg.attention_dim
        linear = lambda i, o, std: Linear(i, o, bias=False, std=std, rngs=rngs)
        self.q = linear(dim, inner, (dim * inner // cfg.num_heads) ** -0.5)
        self.k = linear(dim, inner, dim**-0.5)
        self.v = linear(dim, inner, dim**-0.5)
        self.o = linear(inner, dim, inner**-0.5)
        self.position_bias = PositionBias(cfg, rngs=rngs)
        self.heads = cfg.num_heads

    def __call__(self, x: Num[Array, "b l D"], mask: Int[Array, "b l"]) -> Num[Array, "b l D"]:
        q, k, v = (p(x).reshape(*x.shape[:2], self.heads, -1) for p in (self.q, self.k, self.v))
        logits = jnp.einsum("blhd,bshd->bhls", q, k, preferred_element_type=jnp.float32)
        logits = logits + self.position_bias(x.shape[1])
        lowest = jnp.finfo(x.dtype).min.astype(jnp.float32)
        logits = jnp.where(mask[:, None, None] == 0, lowest, logits)
        y = jnp.einsum("bhls,bshd->blhd", jax.nn.softmax(logits, axis=-1).astype(x.dtype), v)
        return self.o(y.reshape(*x.shape[:2], -1))


class GatedFFN(nnx.Module):
    """down(up(x) * gelu(gate(x)))."""

    def __init__(self, cfg: TextEncoderConfig, *, rngs):
        self.gate = Linear(cfg.dim, cfg.ffn_dim, bias=False, std=cfg.dim**-0.5, rngs=rngs)
        self.up = Linear(cfg.dim, cfg.ffn_dim, bias=False, std=cfg.dim**-0.5, rngs=rngs)
        self.down = Linear(cfg.ffn_dim, cfg.dim, bias=False, std=cfg.ffn_dim**-0.5, rngs=rngs)

    def __call__(self, x: Num[Array, "b l D"]) -> Num[Array, "b l D"]:
        return self.down(self.up(x) * nnx.gelu(self.gate(x), approximate=True))


class Block(nnx.Module):
    """Attention and feed-forward, each normalised before and added to its input."""

    def __init__(self, cfg: TextEncoderConfig, *, rngs):
        self.norm1 = RMSNorm(cfg.dim, cfg.eps)
        self.attn = Attention(cfg, rngs=rngs)
        self.norm2 = RMSNorm(cfg.dim, cfg.eps)
        self.ffn = GatedFFN(cfg, rngs=rngs)

    def __call__(self, x: Num[Array, "b l D"], mask: Int[Array, "b l"]) -> Num[Array, "b l D"]:
        x = x + self.attn(self.norm1(x), mask)
        return x + self.ffn(self.norm2(x))


class TextEncoder(nnx.Module):
    """Token ids to prompt embeddings, zero past each prompt's end.

    Args:
      cfg: sizes.
      stacked: one block with a leading layer axis on its parameters (scanned), or a list of blocks (unrolled).
    """

    def __init__(self, cfg: TextEncoderConfig, *, stacked: bool = True, rngs: nnx.Rngs):
        self.cfg = cfg
        init = nnx.initializers.normal(1.0)
        self.token_embedding = nnx.Param(init(rngs.params(), (cfg.vocab_size, cfg.dim), jnp.float32))
        make = lambda rngs: Block(cfg, rngs=rngs)
        if stacked:
            self.blocks = stack_layers(make, cfg.num_layers, rngs)
        else:
            self.blocks = nnx.List([make(rngs) for _ in range(cfg.num_layers)])
        self.norm = RMSNorm(cfg.dim, cfg.eps)

    def __call__(self, ids: Int[Array, "b l"], mask: Int[Array, "b l"], dtype=jnp.float32) -> Num[Array, "b l D"]:
        """Encodes prompts.

        Args:
          ids: token ids, padded to one length.
          mask: 1 on tokens (`</s>` included), 0 on padding.
          dtype: of the activations and of the result.
        """
        x = self.token_embedding[ids].astype(dtype)
        x, _ = run_layers(self.blocks, lambda block, x, _: (block(x, mask), None), x, None)
        return self.norm(x) * (mask != 0)[..., None].astype(dtype)
