"""Runs a recorded rollout: the causal decoder on given noise, prompts and switch times."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from longlive_jax import checkpoint
from longlive_jax.cache import Window
from longlive_jax.config import SPATIAL_FACTOR, SamplerConfig, official_changes, replace, unknown_name
from longlive_jax.decoding.decoder import Decoder
from longlive_jax.decoding.state import BlockInputs
from longlive_jax.errors import UserError
from longlive_jax.models.layers import structure
from longlive_jax.models.transformer import WanTransformer
from longlive_jax.models.vae import VAE
from longlive_jax.prompts import plan_switches

if TYPE_CHECKING:
    from longlive_jax.conversion.parity import Case


def prepare(folder: str | Path, case: Case) -> Callable[[], jax.Array]:
    """The scanned decoder on a case's inputs: a function that gives the latents [B, F, h, w, C].

    The first call compiles, later ones can be timed. Computes in the dtype that the case was recorded in.
    """
    cfg, dtype = checkpoint.load_config(folder).transformer, case_dtype(case)
    noise = case.frames("noise")
    frames, rows, columns = noise.shape[1:4]
    settings = official_changes(case.meta) | {"rope": case.meta.get("rope", "absolute")}
    size = {"height": rows * SPATIAL_FACTOR, "width": columns * SPATIAL_FACTOR}
    sampler = replace(SamplerConfig(), **settings, **size)
    graph = structure(lambda: WanTransformer(cfg, rngs=nnx.Rngs(0)))
    decoder = Decoder(graph, None, sampler, Window.of(sampler, frames), dtype=dtype.name)

    block = sampler.block_frames
    if frames % block:
        raise UserError(f"{case.path}: {frames} latent frames are not whole blocks of {block}; record it again")
    first = rearrange(noise, "b (n f) h w c -> n 1 b f h w c", f=block)
    renoise = rearrange(case.get("renoise", "n s b f c h w"), "n s b f c h w -> n s b f h w c")
    prompts = jnp.asarray(case.get("prompt_embeds", "p b l e"), jnp.float32)
    switches = plan_switches([int(f) for f in case.get("switch_frames", "p")], frames, block)
    given = jnp.concatenate([first, jnp.asarray(renoise, jnp.float32)], axis=1)
    inputs = BlockInputs.plan(frames // block, switches).replace(noise=given)
    params = {"transformer": jax.tree.map(jnp.asarray, checkpoint.load(folder, "transformer", dtype))}
    keys = jnp.stack([jax.random.key(0)] * noise.shape[0])  # nothing is drawn: all noise is given
    init, scan = jax.jit(decoder.init), jax.jit(decoder.scan)

    def run() -> jax.Array:
        _, out = scan(params, init(params, prompts[0], keys), inputs, prompts)
        return rearrange(out.latents, "n b f h w c -> b (n f) h w c")

    return run


def prepare_pixels(folder: str | Path, case: Case) -> Callable[[jax.Array], jax.Array]:
    """The VAE's decoder, block by block as in streaming: latents [B, F, h, w, C] to pixels [B, T, H, W, 3]."""
    cfg, dtype = checkpoint.load_config(folder).vae, case_dtype(case)
    graph = structure(lambda: VAE(cfg, rngs=nnx.Rngs(0)))
    params = jax.tree.map(jnp.asarray, checkpoint.load(folder, "vae", dtype))
    start = jax.jit(lambda params, z: nnx.merge(graph, params).decode(z))
    go_on = jax.jit(lambda params, z, cache: nnx.merge(graph, params).decode(z, cache, first=False))
    block = case.meta.get("num_frame_per_block", SamplerConfig.block_frames)

    def run(latents: jax.Array) -> jax.Array:
        blocks = [latents[:, i : i + block].astype(dtype) for i in range(0, latents.shape[1], block)]
        pixels, cache = start(params, blocks[0])
        clip = [pixels]
        for z in blocks[1:]:
            pixels, cache = go_on(params, z, cache)
            clip.append(pixels)
        return jnp.concatenate(clip, axis=1)

    return run


def case_dtype(case: Case) -> jnp.dtype:
    """What a case was recorded in: float32, or what its `meta` says."""
    name = case.meta.get("dtype", "float32")
    if name not in ("float32", "bfloat16"):
        raise UserError(f"{case.path}: {unknown_name('dtype', str(name), ('float32', 'bfloat16'))}")
    return jnp.dtype(name)


def rollout(folder: str | Path, case: Case) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Latents of a whole video by the scanned decoder, against those recorded; and its pixels if they were.

    Args:
      folder: checkpoint.
      case: `noise` [B,F,C,h,w], `renoise` [blocks, steps - 1, B, f, C, h, w], `prompt_embeds` [prompts, B, L, .],
        `switch_frames` [prompts - 1], `latents` [B,F,C,h,w], perhaps `pixels` [B,T,3,H,W]; settings under the official
        names in `meta`.
    """
    latents = prepare(folder, case)()
    outputs = {"latents": (latents, case.frames("latents"))}
    if "pixels" in case.arrays:
        outputs["pixels"] = (prepare_pixels(folder, case)(latents), case.frames("pixels"))
    return outputs
