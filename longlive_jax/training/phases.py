"""The parts of a stage's training: stills, then clips, ... The weights go on, optimiser and schedule begin anew."""

from __future__ import annotations

import dataclasses

from longlive_jax.errors import raise_all
from longlive_jax.training.run_config import require


@dataclasses.dataclass(frozen=True)
class Phase:
    """What every phase has.

    Attributes:
      name: of the phase.
      steps: of training; in distillation the critic learns in each.
      batch_size: clips (or videos) a step, all streams together.
      rate: peak learning rate; in distillation, the student's.
      minutes: what the phase may take. Where its steps would take longer, there are fewer, and the learning rate falls
        accordingly; found out while the first tenth runs.
    """

    name: str
    steps: int
    batch_size: int
    rate: float
    minutes: float | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self):
        raise_all(self._faults(), f"phase {self.name}: ")

    def _faults(self) -> list[str]:
        faults: list[str] = []
        for name in ("steps", "batch_size"):
            require(faults, getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; 1 or more is needed")
        require(faults, self.rate > 0, f"rate is {self.rate}; it must be above 0")
        require(faults, self.minutes is None or self.minutes > 0, f"minutes is {self.minutes}; above 0 is needed")
        return faults

    def shrunk(self) -> Phase:
        """The same at a size that runs through in seconds."""
        return dataclasses.replace(self, steps=2, batch_size=2)


@dataclasses.dataclass(frozen=True)
class VAEPhase(Phase):
    """A part of the VAE's training.

    Attributes:
      frames: pixel frames a clip, 4 k + 1.
      sprites: drawn into each clip.
      emphasis: added weight of the sprites' pixels in the loss.
    """

    frames: int = 1
    sprites: int = 1
    emphasis: float = 0.0

    def _faults(self) -> list[str]:
        faults = super()._faults()
        require(faults, self.emphasis >= 0, "emphasis must be 0 or more")
        fine = self.frames % 4 == 1 and self.sprites >= 1
        require(faults, fine, f"frames {self.frames} must be 4 k + 1, sprites {self.sprites} 1 or more")
        return faults

    def shrunk(self) -> VAEPhase:
        return dataclasses.replace(super().shrunk(), batch_size=1, frames=min(self.frames, 5))


@dataclasses.dataclass(frozen=True)
class LatentPhase(Phase):
    """A part of a transformer's training on cached latents.

    Attributes:
      frames: latent frames of a training sequence.
      clip_frames: latent frames of a cached clip.
      clips: how many are cached.
    """

    frames: int
    clip_frames: int
    clips: int

    def _faults(self) -> list[str]:
        faults = super()._faults()
        fine = 1 <= self.frames <= self.clip_frames
        require(faults, fine, f"frames is {self.frames}; 1 to clip_frames {self.clip_frames} is allowed")
        require(faults, self.clips >= 1, f"clips is {self.clips}; 1 or more is needed")
        return faults

    def shrunk(self) -> LatentPhase:
        return dataclasses.replace(
            super().shrunk(), frames=min(self.frames, 6), clip_frames=min(self.clip_frames, 6), clips=4
        )


@dataclasses.dataclass(frozen=True)
class DistillPhase(Phase):
    """A part of distillation.

    Attributes:
      critic_rate: learning rate of the critic.
    """

    critic_rate: float

    def _faults(self) -> list[str]:
        faults = super()._faults()
        require(faults, self.critic_rate >= 0, "critic_rate must be 0 or more")
        return faults
