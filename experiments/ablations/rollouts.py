"""Videos of an arm, cheaply: latents first, and pixels only of the stretches that are read.

Most of what a clip costs on a CPU is the VAE, and of a long video a second here and there is read. A switch study makes
what comes before the switch once for all of its arms. The slow twin of both is the pipeline, called once an arm.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from longlive_jax.config import FPS, TEMPORAL_FACTOR, replace
from longlive_jax.decoding.decoder import Decoder, to_uint8
from longlive_jax.models.layers import structure
from longlive_jax.models.vae import VAE
from longlive_jax.pipeline import LongLivePipeline
from longlive_jax.prompts import latent_frames

WARM_UP = 2
"""Blocks decoded before a stretch, so that the VAE's memory is filled; they are thrown away."""

_init = jax.jit(Decoder.init, static_argnums=0)
_step = jax.jit(Decoder.step, static_argnums=0, donate_argnums=2)
_switch = jax.jit(Decoder.switch, static_argnums=0, donate_argnums=2)


def video_latents(pipe: LongLivePipeline, texts: Sequence[str], seeds: Sequence[int], seconds: float, settings):
    """Latents [B, F, h, w, C] of videos of one prompt each, and their settings."""
    sampler, plans, _, _ = pipe.prepare(list(texts), seconds=seconds, seed=list(seeds), **settings)
    decoder = _latent_decoder(pipe, sampler, plans[0].num_frames)
    state = _init(decoder, pipe.params, pipe.encode_prompts(texts), _keys(seeds))
    _, latents = _blocks(pipe, decoder, state, plans[0].num_frames // sampler.block_frames)
    return latents, sampler


def switched_latents(
    pipe: LongLivePipeline,
    texts: Sequence[tuple[str, str]],
    seeds: Sequence[int],
    seconds: float,
    at: float,
    policies: Mapping[str, Mapping[str, Any] | None],
):
    """Videos that switch from the first to the second text, by several policies.

    Args:
      pipe, seeds, seconds: as for a call.
      texts: two a video.
      at: time of the switch, in seconds, as asked for.
      policies: name -> settings of the switch (`switch`, `sink`), or None to go on with the first text.

    Returns:
      Latents [B, F, h, w, C] before the switch; name -> those after it; the settings.
    """
    sampler, plans, _, _ = pipe.prepare([[(0, a), (at, b)] for a, b in texts], seconds=seconds, seed=list(seeds))
    blocks, first = plans[0].num_frames // sampler.block_frames, plans[0].switch_blocks[0]
    decoder = _latent_decoder(pipe, sampler, plans[0].num_frames)
    before, after = (pipe.encode_prompts(part) for part in zip(*texts))
    state, head = _blocks(pipe, decoder, _init(decoder, pipe.params, before, _keys(seeds)), first)
    tails = {}
    for name, policy in policies.items():
        branch = jax.tree.map(jnp.copy, state)  # the steps donate theirs
        if policy is not None:
            switcher = dataclasses.replace(decoder, sampler=replace(sampler, **policy))
            branch = _switch(switcher, pipe.params, branch, after)
        _, tails[name] = _blocks(pipe, decoder, branch, blocks - first)
    return head, tails, sampler


def pixels(pipe: LongLivePipeline, latents: np.ndarray, block_frames: int, cache=None):
    """Frames of whole blocks, uint8 [B, t, H, W, 3], and the VAE's memory after them, from which others can go on."""
    start, go_on = _vae_decoders(pipe.config.vae)
    frames = []
    for at in range(0, latents.shape[1], block_frames):
        z = jnp.asarray(latents[:, at : at + block_frames], pipe.dtype)
        x, cache = start(pipe.params["vae"], z) if cache is None else go_on(pipe.params["vae"], z, cache)
        frames.append(np.asarray(x))
    return np.concatenate(frames, axis=1), cache


def last_second(
    pipe: LongLivePipeline, latents: np.ndarray, block_frames: int, seconds: float, warm_up: int = WARM_UP
) -> np.ndarray:
    """The last 16 frames of a video of that length, which may be the beginning of a longer one.

    They differ from the pipeline's by what the VAE remembers from before the warm-up (of the shipped model: see
    docs/ablations.md).
    """
    end = latent_frames(seconds, block_frames)
    # Whole blocks, and the first latent frame of what is decoded has 1 frame, not 4.
    needed = -(-FPS // (TEMPORAL_FACTOR * block_frames)) * block_frames
    begin = end - needed - block_frames * warm_up
    return pixels(pipe, latents[:, max(0, begin) : end], block_frames)[0][:, -FPS:]


def _latent_decoder(pipe: LongLivePipeline, sampler, num_frames: int) -> Decoder:
    return dataclasses.replace(pipe.decoder(sampler, num_frames), vae=None)


def _keys(seeds: Sequence[int]) -> jax.Array:
    return jnp.stack([jax.random.key(seed) for seed in seeds])


def _blocks(pipe: LongLivePipeline, decoder: Decoder, state, count: int):
    made = []
    for _ in range(count):
        state, out = _step(decoder, pipe.params, state)
        made.append(np.asarray(out.latents))
    return state, np.concatenate(made, axis=1)


@cache
def _vae_decoders(config):
    """The VAE's decoder for a first block and for later ones, to uint8, compiled once for all arms."""
    graph = structure(lambda: VAE(config, rngs=nnx.Rngs(0)))

    @jax.jit
    def start(params, z):
        x, cache = nnx.merge(graph, params).decode(z, first=True)
        return to_uint8(x), cache

    @jax.jit
    def go_on(params, z, cache):
        x, cache = nnx.merge(graph, params).decode(z, cache, first=False)
        return to_uint8(x), cache

    return start, go_on
