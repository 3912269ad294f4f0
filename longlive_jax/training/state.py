"""What training carries and is told: pytrees of arrays."""

from __future__ import annotations

from typing import Any

from flax import struct
from jaxtyping import Array, Bool, Float, Int, Num

from longlive_jax.cache import KVCache
from longlive_jax.training.streams import Parted


@struct.dataclass
class StreamState:
    """A video in the making: all that the next chunk needs of the past.

    Attributes:
      cache: keys and values of the frames remembered.
      recent: the newest latents, newest last; as many as a chunk is judged by, or as the window has slots. Float32.
      position: latent frames made so far.
      switched: whether the second prompt is in force.
    """

    cache: KVCache
    recent: Float[Array, "b r rows columns c"]
    position: Int[Array, ""]
    switched: Bool[Array, ""]

    def parted(self) -> Parted:
        """Frames are a stream's own; how many there are, and which prompt is in force, is the same in all."""
        own = {"k": self.cache.k, "v": self.cache.v, "recent": self.recent}
        shared = {"count": self.cache.count, "position": self.position, "switched": self.switched}
        return Parted(own=own, shared=shared)

    @classmethod
    def joined(cls, parted: Parted) -> StreamState:
        """The inverse of `parted`."""
        own, shared = parted.own, parted.shared
        cache = KVCache(k=own["k"], v=own["v"], count=shared["count"])
        return cls(cache=cache, recent=own["recent"], position=shared["position"], switched=shared["switched"])


@struct.dataclass
class Prompts:
    """What a video is about.

    Attributes:
      embeds: one prompt, or two with a switch between them.
      negative: for the teacher's guidance.
      switch_frame: latent frame from which on the second prompt holds; in force from the first block at or after it.
    """

    embeds: Num[Array, "p b l e"]
    negative: Num[Array, "b l e"]
    switch_frame: Int[Array, ""]


@struct.dataclass
class RolloutDraws:
    """What is random in a chunk.

    Attributes:
      exit_step: index of the denoising step that every block of the chunk ends with.
      noise: of each block: its start, what each later step adds, and what the clean pass adds.
    """

    exit_step: Int[Array, ""]
    noise: Float[Array, "n s b f h w c"]


@struct.dataclass
class Tape:
    """What the gradient needs of a chunk, one entry a block.

    Attributes:
      x: input of the exit pass.
      latents: its x0, the block.
      clean: keys and values of the clean pass, of all layers: a pair of `[layer, b, f, n, h, d]`.
      prompt: index of the prompt in force.
    """

    x: Float[Array, "n b f h w c"]
    latents: Float[Array, "n b f h w c"]
    clean: Any
    prompt: Int[Array, " n"]


@struct.dataclass
class ChunkDraws:
    """What is random in a step on a chunk.

    Attributes:
      rollout: see `RolloutDraws`.
      tau: noise level of each video, of 1000, before the shift.
      noise: added to what is judged.
      first_given: whether its first frame stays without; None for no, where no program need ask.
    """

    rollout: RolloutDraws
    tau: Int[Array, " b"]
    noise: Float[Array, "b t h w c"]
    first_given: Bool[Array, ""] | None = None
