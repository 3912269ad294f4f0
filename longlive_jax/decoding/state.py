"""What a video in the making carries from block to block. Its size does not depend on how long the video is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from longlive_jax.cache import KVCache


@struct.dataclass
class DecodeState:
    """Carried by the decoder.

    Attributes:
      cache: keys and values of the frames remembered.
      text_kv: keys and values of the prompt in force.
      recent: the newest W latent frames, newest last, for a recache. Float32.
      position: latent frames made so far.
      keys: one random key a video.
      vae: feature caches of the VAE's decoder, or None when only latents are made.
    """

    cache: KVCache
    text_kv: Any
    recent: Float[Array, "b w rows columns c"]
    position: Int[Array, ""]
    keys: Key[Array, " b"]
    vae: Any = None


@struct.dataclass
class BlockInputs:
    """What a block is told; for a scan, what each block is told, on a leading axis.

    Attributes:
      switch: whether the prompt changes at the start of this block.
      prompt: index of the prompt it changes to.
      noise: the block's noise, `[step, b, f, h, w, c]`: its start, then what each later step adds. None to draw it
        from the state's keys.
    """

    switch: Bool[Array, "*blocks"]
    prompt: Int[Array, "*blocks"]
    noise: Float[Array, "*blocks s b f h w c"] | None = None

    @classmethod
    def plan(cls, num_blocks: int, switch_blocks: Sequence[int]) -> BlockInputs:
        """Inputs of all blocks on a leading axis; the prompts after the first start at `switch_blocks`."""
        blocks, starts = np.arange(num_blocks), np.asarray(switch_blocks, int)
        prompt = (blocks[:, None] >= starts).sum(1)
        return cls(switch=jnp.asarray(np.isin(blocks, starts)), prompt=jnp.asarray(prompt, jnp.int32))


@struct.dataclass
class BlockOutput:
    """What a block gives; from a scan, what each block gives, on a leading axis.

    Attributes:
      latents: float32, normalised.
      frames: pixels; the first block of a video has 3 frames of filler in front (see `drop_filler`). None without VAE.
    """

    latents: Float[Array, "*blocks b f h w c"]
    frames: UInt8[Array, "*blocks b t rows columns 3"] | None


FILLER = 3
"""Frames in front of the first block's, so that all blocks have one shape: its first latent is 1 frame, not 4."""


def drop_filler(frames, first: bool):
    """The frames of a block as they belong in the video, `[b, t, H, W, 3]`."""
    return frames[:, FILLER:] if first else frames


def block_noise(
    keys: Key[Array, " b"], position: Int[Array, ""], frames: int, steps: int, shape: tuple[int, int, int]
) -> Float[Array, "s b f h w c"]:
    """Standard normal noise of a block. Each number depends on its video's key, its frame, step and place alone:

    not on the batch, the block size or the devices.
    """

    def of_frame(key, frame):
        key = jax.random.fold_in(key, frame)
        return jnp.stack([jax.random.normal(jax.random.fold_in(key, step), shape) for step in range(steps)])

    frame = position + jnp.arange(frames)
    noise = jax.vmap(lambda key: jax.vmap(lambda f: of_frame(key, f))(frame))(keys)
    return jnp.moveaxis(noise, 2, 0)
