"""A prompt switch within a rollout: decoding's own, or the official training code's with its zero sink.

The official training code empties the cache but not its counters, and then recaches the last chunk. What is written to
the sink's slots is decided by the counters: if the chunk is all there is, the sink is made again from the first frames;
else it stays zero, and zeros are attended from then on: a key of zeros has logit 0, not none.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from longlive_jax.cache import KVCache, Window
from longlive_jax.config import SamplerConfig
from longlive_jax.decoding.state import DecodeState
from longlive_jax.decoding.switch import how_to_recache, rebuild, recache_window, switch_prompt
from longlive_jax.models.transformer import WanTransformer
from longlive_jax.training.config import DistillationConfig


def training_switch(
    model: WanTransformer,
    sampler: SamplerConfig,
    window: Window,
    config: DistillationConfig,
    cache: KVCache,
    recent: Float[Array, "b r h w c"],
    position: Int[Array, ""],
    prompt_embeds: Num[Array, "b l e"],
) -> KVCache:
    """The cache as the next block should find it."""
    newest = recent[:, recent.shape[1] - window.slots :]
    state = DecodeState(cache=cache, text_kv=None, recent=newest, position=position, keys=None)
    if config.quirks.sink != "zero" or sampler.switch != "recache":
        sink = "keep" if config.quirks.sink == "zero" else config.quirks.sink
        sampler = dataclasses.replace(sampler, sink=sink)
        return switch_prompt(model, sampler, window, state, prompt_embeds).cache
    text_kv = model.text_kv(prompt_embeds)
    t = sampler.context_noise
    branches = [
        lambda cache: cache,
        lambda cache: rebuild(model, window, state, cache, text_kv, t),
        lambda cache: rebuild_with_first(model, window, recent, position, cache, text_kv, t),
        lambda cache: recache_window(model, window, state, zero_sink(cache, window), text_kv, t),
    ]
    with jax.named_scope("recache_kind"):
        return jax.lax.switch(recache_kind(sampler, window, config, position), branches, cache)


def recache_kind(
    sampler: SamplerConfig, window: Window, config: DistillationConfig, position: int | Int[Array, ""]
) -> int | Int[Array, ""]:
    """Which branch a switch after `position` latent frames takes: 0 is nothing."""
    if config.quirks.sink != "zero":
        return how_to_recache(dataclasses.replace(sampler, sink=config.quirks.sink), window, position)
    # The window is within the first chunk (`DistillationConfig.check`).
    return (position > 0) * (1 + (position > window.slots) + (position > config.chunk_frames))


def zero_sink(cache: KVCache, window: Window) -> KVCache:
    """Zeros for the keys and values of the sink."""
    is_sink = (jnp.arange(window.slots) < window.sink)[:, None, None, None]
    k, v = jax.tree.map(lambda a: jnp.where(is_sink, 0, a), (cache.k, cache.v))
    return cache.replace(k=k, v=v)


def rebuild_with_first(
    model: WanTransformer,
    window: Window,
    recent: Float[Array, "b r h w c"],
    position: Int[Array, ""],
    cache: KVCache,
    text_kv,
    timestep: float,
) -> KVCache:
    """An empty cache filled with the first frames of the video and the newest, at their own positions, in one pass.

    For W < frames so far <= frames in `recent`.
    """
    first = jax.lax.dynamic_slice_in_dim(recent, recent.shape[1] - position, window.sink, axis=1)
    latents = jnp.concatenate([first, recent[:, recent.shape[1] - window.ring :]], axis=1)
    positions = jnp.concatenate([jnp.arange(window.sink), position - window.ring + jnp.arange(window.ring)])
    dtype = jax.tree.leaves(text_kv)[0].dtype
    timesteps = jnp.full(latents.shape[:2], timestep)
    cache = cache.replace(count=jnp.zeros_like(cache.count))
    _, cache = model.causal(latents.astype(dtype), timesteps, text_kv, cache, window, positions)
    return cache.replace(count=jnp.full_like(cache.count, window.slots))
