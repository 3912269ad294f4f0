"""The Wan diffusion transformer: one set of weights, bidirectional (teacher, critic) or causal (student).

In the order of the paper: embeddings, attention, block, model. Reference section 3. Shapes: B batch, T frames, h x w
latent height and width, n tokens a frame, D model width, L prompt tokens, H heads, d head width.
Latents are channels-last `[B, T, h, w, C]`. Precision: activations in the dtype of the input; norms, modulation,
residual gates, time embedding and RoPE angles in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Num

from longlive_jax.cache import KVCache, Window, write_frames
from longlive_jax.config import TransformerConfig
from longlive_jax.models import rope
from longlive_jax.models.attention import attention
from longlive_jax.models.layers import LayerNorm, Linear, RMSNorm, layer_norm, run_layers, stack_layers
from longlive_jax.sharding import by_head, by_token

TextKV = tuple[Any, Any] | list[tuple[Any, Any]]
"""Keys and values of a prompt for every layer: `[layer, B, L, H, d]` each, or a list of one pair a layer."""


def time_embedding(timesteps: Float[Array, "b t"], width: int) -> Float[Array, "b t width"]:
    """Sinusoids of the timesteps, cosine half first, as exact as if in float64 (as the reference's are).

    A float32 angle near 1000 is off by up to 6e-5, which a micro network turns into 1.2e-5 of its output, three times
    the error of all else. So angles are counted in turns, from products that are exact in float32 (12 bits x 12 bits),
    and only their fractions are added.
    """
    turns = 10000.0 ** (-np.arange(width // 2, dtype=np.float64) / (width // 2)) / (2 * np.pi)
    turns_high = (turns.astype(np.float32).view(np.uint32) & np.uint32(0xFFFFF000)).view(np.float32)
    turns_low = (turns - turns_high).astype(np.float32)
    t = timesteps.astype(jnp.float32)[..., None]
    t_high = jax.lax.bitcast_convert_type(
        jax.lax.bitcast_convert_type(t, jnp.uint32) & jnp.uint32(0xFFFFF000), jnp.float32
    )
    products = t_high * turns_high, (t - t_high) * turns_high, t * turns_low
    angles = 2 * np.pi * sum(p - jnp.floor(p) for p in products)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class MLP(nnx.Module):
    """Linear, activation, Linear."""

    def __init__(self, in_dim: int, hidden: int, out_dim: int, activation: Callable, *, rngs):
        self.up = Linear(in_dim, hidden, rngs=rngs)
        self.down = Linear(hidden, out_dim, rngs=rngs)
        self.activation = activation

    def __call__(self, x: Num[Array, "... i"]) -> Num[Array, "... o"]:
        return self.down(self.activation(self.up(x)))


def gelu_tanh(x):
    return nnx.gelu(x, approximate=True)


class Attention(nnx.Module):
    """Projections around attention; q and k are normalised over the whole width, before it is cut into heads."""

    def __init__(self, cfg: TransformerConfig, *, rngs):
        self.q = Linear(cfg.dim, cfg.dim, rngs=rngs)
        self.k = Linear(cfg.dim, cfg.dim, rngs=rngs)
        self.v = Linear(cfg.dim, cfg.dim, rngs=rngs)
        self.o = Linear(cfg.dim, cfg.dim, rngs=rngs)
        self.norm_q = RMSNorm(cfg.dim, cfg.eps)
        self.norm_k = RMSNorm(cfg.dim, cfg.eps)
        self.heads = cfg.num_heads

    def queries(self, x: Num[Array, "... D"]) -> Num[Array, "... H d"]:
        return self._heads(self.norm_q(self.q(x)))

    def keys_values(self, x: Num[Array, "... D"]) -> tuple[Num[Array, "... H d"], Num[Array, "... H d"]]:
        return self._heads(self.norm_k(self.k(x))), self._heads(self.v(x))

    def out(self, y: Num[Array, "... H d"]) -> Num[Array, "... D"]:
        return self.o(y.reshape(*y.shape[:-2], -1))

    def _heads(self, x):
        return x.reshape(*x.shape[:-1], self.heads, -1)


class Block(nnx.Module):
    """Self-attention, attention to the prompt, feed-forward; the outer two modulated by the time embedding."""

    def __init__(self, cfg: TransformerConfig, *, rngs):
        self.self_attn = Attention(cfg, rngs=rngs)
        self.cross_attn = Attention(cfg, rngs=rngs)
        self.cross_norm = LayerNorm(cfg.dim, cfg.eps)
        self.ffn = MLP(cfg.dim, cfg.ffn_dim, cfg.dim, gelu_tanh, rngs=rngs)
        self.modulation = nnx.Param(jax.random.normal(rngs.params(), (6, cfg.dim)) / cfg.dim**0.5)
        self.eps = cfg.eps

    def __call__(
        self,
        x: Num[Array, "b t n D"],
        e: Float[Array, "b t 6 D"],
        text_kv: tuple[Num[Array, "b l H d"], Num[Array, "b l H d"]],
        attend: Callable[..., tuple[Num[Array, "b t n H d"], Any]],
    ) -> tuple[Num[Array, "b t n D"], Any]:
        """One layer.

        Args:
          x: tokens.
          e: modulation of each frame, before the layer's own is added.
          text_kv: keys and values of the prompt for this layer.
          attend: `attend(q, k, v) -> y, extra` is the self-attention: RoPE, the cache and the mask are its affair.

        Returns:
          The tokens, and the `extra` of `attend`.
        """
        m = e + self.modulation.astype(jnp.float32)
        shift1, scale1, gate1, shift2, scale2, gate2 = (m[:, :, None, i] for i in range(6))
        y = (layer_norm(x, self.eps) * (1 + scale1) + shift1).astype(x.dtype)
        y, extra = attend(self.self_attn.queries(y), *self.self_attn.keys_values(y))
        x = gated(x, self.self_attn.out(y), gate1)
        q = by_head(self.cross_attn.queries(self.cross_norm(x)))
        y = attention(rearrange(q, "b t n h d -> b (t n) h d"), *text_kv)
        x = x + self.cross_attn.out(by_token(y.reshape(q.shape)))
        y = (layer_norm(x, self.eps) * (1 + scale2) + shift2).astype(x.dtype)
        return gated(x, self.ffn(y), gate2), extra


def gated(x, y, gate):
    """Residual with a float32 gate."""
    return (x.astype(jnp.float32) + y.astype(jnp.float32) * gate).astype(x.dtype)


class Head(nnx.Module):
    """Modulated norm and the projection of a token to its patch."""

    def __init__(self, cfg: TransformerConfig, *, rngs):
        self.linear = Linear(cfg.dim, int(np.prod(cfg.patch)) * cfg.out_channels, rngs=rngs)
        self.modulation = nnx.Param(jax.random.normal(rngs.params(), (2, cfg.dim)) / cfg.dim**0.5)
        self.eps = cfg.eps

    def __call__(self, x: Num[Array, "b t n D"], e: Float[Array, "b t D"]) -> Num[Array, "b t n p"]:
        shift, scale = (e[:, :, None] + self.modulation[i].astype(jnp.float32) for i in range(2))
        return self.linear((layer_norm(x, self.eps) * (1 + scale) + shift).astype(x.dtype))


class WanTransformer(nnx.Module):
    """Predicts the flow of noisy latents, given a timestep a frame and the prompt.

    Args:
      cfg: sizes.
      stacked: one block with a leading layer axis on its parameters (scanned), or a list of blocks (unrolled).
      split_kv: of the self-attention of a block to the cache, see `attention`.
      unroll: whether `bidirectional` and `causal_reading` write out their scan over stacked blocks, see `run_layers`.
    """

    def __init__(
        self, cfg: TransformerConfig, *, stacked: bool = True, split_kv: int = 1, unroll: bool = False, rngs: nnx.Rngs
    ):
        self.cfg = cfg
        self.unroll = unroll
        self.split_kv = split_kv
        self.patch_embedding = Linear(int(np.prod(cfg.patch)) * cfg.in_channels, cfg.dim, rngs=rngs)
        self.text_embedding = MLP(cfg.text_dim, cfg.dim, cfg.dim, gelu_tanh, rngs=rngs)
        self.time_embedding = MLP(cfg.time_dim, cfg.dim, cfg.dim, nnx.silu, rngs=rngs)
        self.time_projection = Linear(cfg.dim, 6 * cfg.dim, rngs=rngs)
        make = lambda rngs: Block(cfg, rngs=rngs)
        if stacked:
            self.blocks = stack_layers(make, cfg.num_layers, rngs)
        else:
            self.blocks = nnx.List([make(rngs) for _ in range(cfg.num_layers)])
        self.head = Head(cfg, rngs=rngs)

    @property
    def stacked(self) -> bool:
        return not isinstance(self.blocks, nnx.List)

    def text_kv(self, prompt_embeds: Num[Array, "b l e"]) -> TextKV:
        """Keys and values of a prompt for every layer; once a prompt. Padding rows are part of it."""
        missing = self.cfg.text_length - prompt_embeds.shape[1]
        text = self.text_embedding(jnp.pad(prompt_embeds, [(0, 0), (0, missing), (0, 0)]))
        _, kv = run_layers(self.blocks, lambda block, c, _: (c, block.cross_attn.keys_values(text)), None, None)
        return jax.tree.map(by_head, kv)

    def bidirectional(
        self,
        x: Num[Array, "b t h w c"],
        timesteps: Float[Array, "b t"],
        text_kv: TextKV,
        *,
        positions: Int[Array, " t"] | None = None,
        mask: Bool[Array, "t t"] | None = None,
        attention: Callable[..., Num[Array, "b s n d"]] = attention,
        remat: Callable | None = None,
    ) -> Num[Array, "b t h w c"]:
        """The flow when frames see each other: all of them, or as the mask says (query frame, key frame).

        Args:
          x: noisy latents.
          timesteps: 0 to 1000, one a frame (equal ones for a teacher).
          text_kv: of `text_kv`.
          positions: temporal position of each frame; 0, 1, ... by default.
          mask: which frame may see which (teacher and diffusion forcing); None for all.
          attention: `attention(q, k, v, mask=...)` between all tokens of all frames, if not that of all networks.
          remat: see `run_layers`.
        """
        b, t, rows, columns = self._grid(x)
        positions = jnp.arange(t) if positions is None else positions
        turn = rope.rotation(positions, rows, columns, self.cfg.head_dim, self.cfg.rope_theta)
        n = rows * columns
        mask = None if mask is None else jnp.repeat(jnp.repeat(mask, n, axis=0), n, axis=1)

        def attend(q, k, v):
            q, k = rope.rotate(q, turn), rope.rotate(k, turn)
            q, k, v = (rearrange(by_head(a), "b t n h d -> b (t n) h d") for a in (q, k, v))
            return by_token(attention(q, k, v, mask=mask).reshape(b, t, n, *q.shape[2:])), None

        def layer(block, carry, kv):
            return block(carry, e6, kv, attend)

        tokens, e, e6 = self._embed(x, timesteps)
        tokens, _ = run_layers(self.blocks, layer, tokens, text_kv, remat=remat, unroll=self.unroll)
        return self._unpatchify(self.head(tokens, e), x)

    def causal(
        self,
        x: Num[Array, "b t h w c"],
        timesteps: Float[Array, "b t"],
        text_kv: TextKV,
        cache: KVCache,
        window: Window,
        position: Int[Array, ""] | Int[Array, " t"],
        *,
        valid: Int[Array, ""] | None = None,
    ) -> tuple[Num[Array, "b t h w c"], KVCache]:
        """The flow of the frames that follow those in the cache, and the cache with their keys and values in it.

        The frames see each other, the sink and as many of the newest frames as the window holds. `cache.count` is left
        as it was: calling again overwrites what this pass wrote, until the caller counts the frames in.

        Args:
          x: latents of one block, noisy or clean; or of the frames to recache.
          timesteps: one a frame.
          text_kv: of the prompt.
          cache: frames so far.
          window: which slot a frame goes to.
          position: absolute temporal position of the first frame, or of every frame (`[t]`) if they do not follow each
            other; below 1024. Not used with relative RoPE.
          valid: how many of the frames exist, if not all; what is computed for the others means nothing.
        """
        t, count = x.shape[1], cache.count
        attend = self._cached_attention(x, count, window, position, t if valid is None else valid)
        put = functools.partial(write_frames, window=window, count=count)

        def scanned(block, carry, xs):
            # The buffers are carried and written in place: as xs and ys of the scan a second cache would be made.
            tokens, keys, values = carry
            kv, i = xs

            def remember(k, v):
                new = put(keys, k, layer=i), put(values, v, layer=i)
                return *(jax.lax.dynamic_index_in_dim(a, i, keepdims=False) for a in new), new

            tokens, new = block(tokens, e6, kv, functools.partial(attend, remember))
            return (tokens, *new), None

        def unrolled(block, tokens, xs):
            kv, keys, values = xs

            def remember(k, v):
                new = put(keys, k), put(values, v)
                return *new, new

            return block(tokens, e6, kv, functools.partial(attend, remember))

        tokens, e, e6 = self._embed(x, timesteps)
        if self.stacked:
            xs = text_kv, jnp.arange(self.cfg.num_layers)
            (tokens, keys, values), _ = run_layers(self.blocks, scanned, (tokens, cache.k, cache.v), xs)
        else:
            tokens, buffers = run_layers(self.blocks, unrolled, tokens, list(zip(text_kv, cache.k, cache.v)))
            keys, values = zip(*buffers)
        keys, values = jax.tree.map(by_head, (keys, values))
        return self._unpatchify(self.head(tokens, e), x), cache.replace(k=keys, v=values)

    def causal_reading(
        self,
        x: Num[Array, "b t h w c"],
        timesteps: Float[Array, "b t"],
        text_kv: TextKV,
        cache: KVCache,
        window: Window,
        position: Int[Array, ""],
        *,
        remat: Callable | None = None,
    ) -> tuple[Num[Array, "b t h w c"], tuple[Any, Any]]:
        """As `causal`, but the cache is only read, and the frames' own keys and values come back beside the flow.

        For gradients: `causal` carries the buffers from layer to layer, and rematerialisation would keep all of them
        for every layer.

        Args:
          x, timesteps, text_kv, cache, window, position: see `causal`.
          remat: see `run_layers`.

        Returns:
          The flow; and keys and values `[layer, B, T, n, H, d]` (or a tuple of layers), as the cache would store them.
        """
        attend = self._cached_attention(x, cache.count, window, position, x.shape[1])
        put = functools.partial(write_frames, window=window, count=cache.count)

        def layer(block, tokens, xs):
            kv, keys, values = xs
            remember = lambda k, v: (put(keys, k), put(values, v), (k, v))
            return block(tokens, e6, kv, functools.partial(attend, remember))

        tokens, e, e6 = self._embed(x, timesteps)
        xs = (text_kv, cache.k, cache.v) if self.stacked else list(zip(text_kv, cache.k, cache.v))
        tokens, own = run_layers(self.blocks, layer, tokens, xs, remat=remat, unroll=self.unroll)
        return self._unpatchify(self.head(tokens, e), x), own if self.stacked else tuple(zip(*own))

    def _cached_attention(self, x, count, window: Window, position, new) -> Callable:
        """`attend(remember, q, k, v) -> y, extra` for frames x, `new` of which exist, after `count` others.

        `remember(k, v)` gives the buffers of a layer with k and v in them, and the `extra`.
        """
        b, t, rows, columns = self._grid(x)
        n, after = rows * columns, count + new
        # A recache has queries enough to fill a GPU by itself.
        split_kv = self.split_kv if t == window.block else 1
        turn = lambda positions: rope.rotation(positions, rows, columns, self.cfg.head_dim, self.cfg.rope_theta)
        if window.relative:
            slot_positions = window.positions(after)
            turn_keys = turn(slot_positions)
            turn_queries = turn(slot_positions[window.slot(count + jnp.arange(t))])
        else:
            turn_queries = turn(position + jnp.arange(t) if jnp.ndim(position) == 0 else position)

        def attend(remember, q, k, v):
            q = by_head(rope.rotate(q, turn_queries))
            k, v, extra = remember(by_head(k if window.relative else rope.rotate(k, turn_queries)), by_head(v))
            k = rope.rotate(k, turn_keys) if window.relative else k
            q, k, v = (rearrange(a, "b t n h d -> b (t n) h d").astype(x.dtype) for a in (q, k, v))
            y = attention(q, k, v, key_length=window.length(after) * n, split_kv=split_kv)
            return by_token(y.reshape(b, t, n, *q.shape[2:])), extra

        return attend

    def cache_shape(self, batch: int, slots: int, rows: int, columns: int) -> tuple[int, ...]:
        """Shape of the keys (and of the values) for `KVCache.zeros`; rows and columns of tokens, not of latents."""
        return self.cfg.num_layers, batch, slots, rows * columns, self.cfg.num_heads, self.cfg.head_dim

    def _grid(self, x) -> tuple[int, int, int, int]:
        """Batch, frames, rows and columns of tokens."""
        return x.shape[0], x.shape[1], x.shape[2] // self.cfg.patch[1], x.shape[3] // self.cfg.patch[2]

    def _embed(self, x, timesteps):
        """Tokens in the dtype of x; time embedding and its six projections in float32."""
        _, p, q = self.cfg.patch
        patches = rearrange(x, "b t (h p) (w q) c -> b t (h w) (c p q)", p=p, q=q)
        e = self.time_embedding(time_embedding(timesteps, self.cfg.time_dim))
        e6 = self.time_projection(nnx.silu(e))
        return by_token(self.patch_embedding(patches)), e, rearrange(e6, "b t (s D) -> b t s D", s=6)

    def _unpatchify(self, tokens, like) -> Num[Array, "b t h w c"]:
        _, p, q = self.cfg.patch
        h = like.shape[2] // p
        return rearrange(tokens, "b t (h w) (p q c) -> b t (h p) (w q) c", h=h, p=p, q=q)
