"""The official code's gradient through the cache (quirk `cache_gradient`).

Its exit pass writes keys and values into the cache while gradients are recorded, and the clean pass then overwrites the
numbers but not the record. So a later block reads clean keys and sends their gradient to the exit pass of whoever the
record names. With exit step 0 that is the block that made the frame. With a later one the cache has been shifted
unrecorded by the block's first pass, once it is full: the gradient then goes to the block that *was* in that slot, if
this chunk has written it, and is lost otherwise.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from longlive_jax.cache import SLOT_AXIS, Window


def reading_with_gradient(
    buffers: Any,
    written: Any,
    window: Window,
    chunk_frames: int,
    *,
    count: Int[Array, ""],
    position: Int[Array, ""],
    made: Int[Array, ""],
    first: Int[Array, ""],
    exit_step: Int[Array, ""],
) -> Any:
    """The cache's numbers, with the gradient to what the exit passes of this chunk have written.

    Args:
      buffers: keys and values of all layers, `[..., b, slot, n, h, d]`.
      written: keys and values of the exit passes so far, `[..., b, frame of the chunk, n, h, d]`.
      window: the slots.
      chunk_frames: the official cache has room for the window and a chunk.
      count: frames in the cache.
      position: latent frames of the video so far.
      made: those of them that are of this chunk.
      first: the first frame of the chunk that has a gradient.
      exit_step: of the chunk.
    """
    slots = jnp.arange(window.slots)
    # The newest frame in each slot, by count; and by its place in the chunk (negative: before it).
    held = jnp.where(slots < window.sink, slots, count - 1 - (count - 1 - slots) % window.ring)
    place = made - (count - held)
    shifted = jnp.maximum(position + window.block - (window.slots + chunk_frames), 0)
    place = jnp.where((slots >= window.sink) & (exit_step > 0), place - shifted, place)
    exists = ((place >= first) & (place < made))[:, None, None, None]

    def read(buffer, written):
        source = jnp.take(written, jnp.clip(place, 0, written.shape[SLOT_AXIS] - 1), axis=SLOT_AXIS)
        source = jnp.where(exists, source, 0)
        return buffer + (source - jax.lax.stop_gradient(source)).astype(buffer.dtype)

    return jax.tree.map(read, buffers, written)
