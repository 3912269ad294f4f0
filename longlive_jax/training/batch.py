"""What a training step on clips gets."""

from __future__ import annotations

from flax import struct
from jaxtyping import Array, Bool, Float, Int


@struct.dataclass
class Batch:
    """Clips of latents with their prompts.

    Attributes:
      latents: normalised.
      positions: temporal position of each frame, the same for all clips.
      ids, mask: tokens of the prompts.
      learn: which frames count in the loss (those that show what the prompt says).
    """

    latents: Float[Array, "b t h w c"]
    positions: Int[Array, " t"]
    ids: Int[Array, "b l"]
    mask: Int[Array, "b l"]
    learn: Bool[Array, "b t"]
