"""Changing the prompt in the middle of a video (official pipeline/interactive_causal_inference.py), and the paper's
two other policies.

`recache`: keys and values of the frames still in the window are made again, with the new prompt, from their latents.
  sink "keep":    the sink keeps what the prompt of its time made of it; only the window is made again.
                  (Until the video outgrows the window the sink is part of it, and everything is made again.)
  sink "refresh": the newest W frames are put into an empty cache, so the first S of them become the sink.
`keep`: only the text changes; the past stays as the old prompt made it.
`clear`: nothing of the past is attended any more; positions go on, and the next S frames become the sink.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from longlive_jax.cache import KVCache, Window
from longlive_jax.config import SamplerConfig
from longlive_jax.decoding.state import DecodeState
from longlive_jax.models.transformer import TextKV, WanTransformer


def how_to_recache(sampler: SamplerConfig, window: Window, position: int | Int[Array, ""]) -> Int[Array, ""] | int:
    """What a switch after `position` latent frames recaches: 0 nothing, 1 `rebuild`, 2 `recache_window`."""
    if sampler.switch != "recache":
        return 0
    outgrown = position > window.slots
    if sampler.sink == "refresh" or window.ring == 0:
        outgrown = 0 * outgrown
    return (position > 0) * (1 + outgrown)


def switch_prompt(
    model: WanTransformer,
    sampler: SamplerConfig,
    window: Window,
    state: DecodeState,
    prompt_embeds: Num[Array, "b l e"],
    how: int | None = None,
) -> DecodeState:
    """The state as the next block should find it; at the start of a video only the text changes.

    Args:
      how: of `how_to_recache`, from whoever knows the position on the host. Else the program holds all three and the
        device chooses, at the price of a second cache: a conditional's branches share no buffer that one of them
        writes and another hands on.
    """
    text_kv = model.text_kv(prompt_embeds)
    cache = state.cache
    if sampler.switch == "clear":
        cache = cache.replace(count=jnp.zeros_like(cache.count))
    elif sampler.switch == "recache":
        branches = [
            lambda cache: cache,
            lambda cache: rebuild(model, window, state, cache, text_kv, sampler.context_noise),
            lambda cache: recache_window(model, window, state, cache, text_kv, sampler.context_noise),
        ]
        if how is not None:
            cache = branches[how](cache)
        else:
            if sampler.sink == "refresh" or window.ring == 0:
                branches = branches[:2]
            with jax.named_scope("recache_kind"):
                cache = jax.lax.switch(how_to_recache(sampler, window, state.position), branches, cache)
    return state.replace(text_kv=text_kv, cache=cache)


def rebuild(
    model: WanTransformer, window: Window, state: DecodeState, cache: KVCache, text_kv: TextKV, timestep: float
) -> KVCache:
    """An empty cache filled with the newest frames, W or as many as there are, in one bidirectional pass."""
    frames = jnp.minimum(state.position, window.slots)
    # Oldest first. What follows the newest, while there are fewer than W frames, is masked and overwritten later.
    latents = jnp.roll(state.recent, frames, axis=1)
    cache = cache.replace(count=jnp.zeros_like(cache.count))
    cache = _clean_pass(model, window, state, cache, text_kv, timestep, latents, frames)
    return cache.replace(count=frames)


def recache_window(
    model: WanTransformer, window: Window, state: DecodeState, cache: KVCache, text_kv: TextKV, timestep: float
) -> KVCache:
    """The frames after the sink made again, in one bidirectional pass that sees the sink. For W < frames so far."""
    # As if the sink were all there is: the window then fills its slots in order.
    cache = cache.replace(count=jnp.full_like(cache.count, window.sink))
    latents, frames = state.recent[:, window.sink :], jnp.asarray(window.ring)
    cache = _clean_pass(model, window, state, cache, text_kv, timestep, latents, frames)
    return cache.replace(count=jnp.full_like(cache.count, window.slots))


def _clean_pass(
    model: WanTransformer,
    window: Window,
    state: DecodeState,
    cache: KVCache,
    text_kv: TextKV,
    timestep: float,
    latents: Float[Array, "b t h w c"],
    frames: Int[Array, ""],
) -> KVCache:
    """One pass over the `frames` newest latents, at their own positions; only its keys and values count.

    The timestep is that of a block's own clean pass (`context_noise`), as in the reference's code.
    """
    dtype = jax.tree.leaves(text_kv)[0].dtype
    timesteps = jnp.full(latents.shape[:2], timestep)
    position = state.position - frames
    _, cache = model.causal(latents.astype(dtype), timesteps, text_kv, cache, window, position, valid=frames)
    return cache
