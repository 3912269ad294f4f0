"""Runs a recorded rollout: the causal decoder on given noise, prompts and switch times."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from longlive_jax import checkpoint
from longlive_jax.cache import Window
from longlive_jax.config import SPATIAL_FACTOR, SamplerConfig, official_changes, replace
from longlive_jax.decoding.decoder import Decoder
from longlive_jax.decoding.state import BlockInputs
from longlive_jax.errors import UserError
from longlive_jax.models.layers import structure
from longlive_jax.models.transformer import WanTransformer
from longlive_jax.prompts import plan_switches

if TYPE_CHECKING:
    from longlive_jax.conversion.parity import Case


def rollout(folder: str | Path, case: Case) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Latents of a whole video by the scanned decoder, against those recorded.

    Args:
      folder: checkpoint.
      case: `noise` [B,F,C,h,w], `renoise` [blocks, steps - 1, B, f, C, h, w], `prompt_embeds` [prompts, B, L, .],
        `switch_frames` [prompts - 1], `latents` [B,F,C,h,w]; settings under the official names in `meta`.
    """
    cfg = checkpoint.load_config(folder).transformer
    noise, expected = case.frames("noise"), case.frames("latents")
    frames, rows, columns = noise.shape[1:4]
    settings = official_changes(case.meta) | {"rope": case.meta.get("rope", "absolute")}
    size = {"height": rows * SPATIAL_FACTOR, "width": columns * SPATIAL_FACTOR}
    sampler = replace(SamplerConfig(), **settings, **size)
    graph = structure(lambda: WanTransformer(cfg, rngs=nnx.Rngs(0)))
    decoder = Decoder(graph, None, sampler, Window.of(sampler, frames))

    block = sampler.block_frames
    if frames % block:
        raise UserError(f"{case.path}: {frames} latent frames are not whole blocks of {block}; record it again")
    first = rearrange(noise, "b (n f) h w c -> n 1 b f h w c", f=block)
    renoise = rearrange(case.get("renoise", "n s b f c h w"), "n s b f c h w -> n s b f h w c")
    prompts = jnp.asarray(case.get("prompt_embeds", "p b l e"), jnp.float32)
    switches = plan_switches([int(f) for f in case.get("switch_frames", "p")], frames, block)
    given = jnp.concatenate([first, jnp.asarray(renoise, jnp.float32)], axis=1)
    inputs = BlockInputs.plan(frames // block, switches).replace(noise=given)
    params = {"transformer": jax.tree.map(jnp.asarray, checkpoint.load(folder, "transformer", np.float32))}
    keys = jnp.stack([jax.random.key(0)] * noise.shape[0])  # nothing is drawn: all noise is given
    state = jax.jit(decoder.init)(params, prompts[0], keys)
    _, out = jax.jit(decoder.scan)(params, state, inputs, prompts)
    return {"latents": (rearrange(out.latents, "n b f h w c -> b (n f) h w c"), expected)}
