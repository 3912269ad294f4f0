"""The KV cache: a fixed number of frame slots, the sink first, then a ring. All policy of who is remembered is here.

    slot    0 1 2 | 3 4 5 6 7 8 9 10 11        window 12, sink 3, after 21 frames
    frame   0 1 2 | 12 13 14 15 16 17 18 19 20

A block attends the slots that hold frames. While it is being denoised it uses the slots it will end in (those of the
oldest frames, which it no longer attends) as scratch; the clean pass leaves the final keys and values there. So a step
moves no memory but its own block, and its cost does not depend on how long the video is. Softmax does not care about
the order of keys once RoPE is in them; with relative RoPE they are stored before RoPE and `positions` gives the order.

Nothing here depends on the shapes of a layer: the buffers are `[..., batch, slot, token, head, channel]`, stacked over
layers or one a layer.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Int, Num

from longlive_jax.config import SamplerConfig
from longlive_jax.sharding import by_head


@dataclasses.dataclass(frozen=True)
class Window:
    """Which frames are attended, in latent frames: fixed for a video.

    Attributes:
      slots: W, sink and current block included.
      sink: S, the first slots.
      block: f, frames denoised together.
      relative: whether keys are stored before RoPE and positions follow the slots' order.
    """

    slots: int
    sink: int
    block: int
    relative: bool

    @classmethod
    def of(cls, sampler: SamplerConfig, num_frames: int) -> Window:
        """The window of a video of `num_frames` latent frames; `window` -1 remembers all of them."""
        relative = sampler.rope == "relative"
        if sampler.window == -1:
            return cls(num_frames, min(sampler.sink_frames, num_frames), sampler.block_frames, relative)
        return cls(sampler.window, sampler.sink_frames, sampler.block_frames, relative)

    @property
    def ring(self) -> int:
        """Slots that are reused."""
        return self.slots - self.sink

    def slot(self, count: Int[Array, "..."]) -> Int[Array, "..."]:
        """The slot of the frame that comes after `count` others."""
        if self.ring == 0:
            return count
        return jnp.where(count < self.slots, count, self.sink + (count - self.sink) % self.ring)

    def positions(self, count: Int[Array, ""]) -> Int[Array, " slots"]:
        """Relative temporal position of every slot once `count` frames are in: sink first, then oldest to newest."""
        slots = jnp.arange(self.slots)
        if self.ring == 0:
            return slots
        oldest = self.slot(count) - self.sink
        in_order = self.sink + (slots - self.sink - oldest) % self.ring
        return jnp.where((slots < self.sink) | (count < self.slots), slots, in_order)

    def length(self, count: Int[Array, ""]) -> Int[Array, ""]:
        """How many slots, from the first on, hold a frame once `count` frames are in."""
        return jnp.minimum(count, self.slots)


@struct.dataclass
class KVCache:
    """Keys and values of the frames remembered, for every layer.

    Attributes:
      k, v: `[layer, batch, slot, token, head, channel]`, or a tuple of arrays without the layer axis.
      count: frames put in since the start or since the cache was cleared.
    """

    k: Num[Array, "l b s n h d"] | tuple
    v: Num[Array, "l b s n h d"] | tuple
    count: Int[Array, ""]

    @classmethod
    def zeros(cls, shape: tuple[int, ...], dtype, *, stacked: bool = True) -> KVCache:
        """An empty cache; `shape` is (layers, batch, slots, tokens, heads, head width)."""

        def buffer():  # made twice, not shared: donating one buffer twice is an error
            return jnp.zeros(shape, dtype) if stacked else tuple(jnp.zeros(shape[1:], dtype) for _ in range(shape[0]))

        keys, values = jax.tree.map(by_head, (buffer(), buffer()))
        return cls(k=keys, v=values, count=jnp.zeros((), jnp.int32))


def write_frames(
    buffer: Num[Array, "... b s n h d"],
    frames: Num[Array, "b t n h d"],
    window: Window,
    count: Int[Array, ""],
    layer: Int[Array, ""] | None = None,
) -> Num[Array, "... b s n h d"]:
    """Puts the frames that come after `count` others into their slots.

    Args:
      buffer: keys or values of one layer, or of all with `layer` saying which.
      frames: what to put there, cast to the dtype of the buffer.
      window: the slots.
      count: frames put in before.
      layer: index of the layer in a stacked buffer.
    """
    frames = frames.astype(buffer.dtype)
    new = frames.shape[1]
    if new == window.block and window.sink % new == 0 and window.ring % new == 0:
        # A block never wraps round the ring nor straddles sink and ring: one slice, written in place.
        start = (0, window.slot(count), 0, 0, 0)
        if layer is None:
            return jax.lax.dynamic_update_slice(buffer, frames, start)
        return jax.lax.dynamic_update_slice(buffer, frames[None], (layer, *start))
    slots = window.slot(count + jnp.arange(new))
    if layer is None:
        return buffer.at[:, slots].set(frames, unique_indices=True)
    one = jax.lax.dynamic_index_in_dim(buffer, layer, keepdims=False)
    one = one.at[:, slots].set(frames, unique_indices=True)
    return jax.lax.dynamic_update_index_in_dim(buffer, one, layer, 0)


SLOT_AXIS = -4
"""Of a buffer, with or without a layer axis."""


def take_frames(buffers: Any, window: Window, count: Int[Array, ""], frames: int) -> Any:
    """The `frames` frames that come after `count` others, out of the buffers of all layers: an array or a tuple."""
    slots = window.slot(count + jnp.arange(frames))
    return jax.tree.map(lambda buffer: jnp.take(buffer, slots, axis=SLOT_AXIS), buffers)


def put_frames(buffers: Any, frames: Any, window: Window, count: Int[Array, ""]) -> Any:
    """The inverse of `take_frames`."""
    slots = window.slot(count + jnp.arange(jax.tree.leaves(frames)[0].shape[SLOT_AXIS]))
    put = lambda buffer, new: buffer.at[..., slots, :, :, :].set(new.astype(buffer.dtype), unique_indices=True)
    return jax.tree.map(put, buffers, frames)
