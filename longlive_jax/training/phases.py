"""The parts of a stage's training: stills, then clips, ... The weights go on, optimiser and schedule begin anew."""

from __future__ import annotations

import dataclasses

from longlive_jax.errors import UserError, raise_all
from longlive_jax.training.run_config import require


def _check_phase(phase, negative: str | None) -> None:
    faults = []
    for name in ("steps", "batch_size"):
        require(faults, getattr(phase, name) >= 1, f"{name} is {getattr(phase, name)}; 1 or more is needed")
    require(faults, phase.rate > 0, f"rate is {phase.rate}; it must be above 0")
    require(faults, negative is None, f"{negative} must be 0 or more")
    require(faults, phase.minutes is None or phase.minutes > 0, f"minutes is {phase.minutes}; above 0 is needed")
    raise_all(faults, f"phase {phase.name}: ")


@dataclasses.dataclass(frozen=True)
class VAEPhase:
    """A part of the VAE's training.

    Attributes:
      name: of the phase.
      steps: of training.
      batch_size: clips a step, all streams together.
      rate: peak learning rate.
      frames: pixel frames a clip, 4 k + 1.
      sprites: drawn into each clip.
      emphasis: added weight of the sprites' pixels in the loss.
      minutes: what the phase may take. Where its steps would take longer, there are fewer, and the learning rate falls
        accordingly; found out while the first tenth runs.
    """

    name: str
    steps: int
    batch_size: int
    rate: float
    frames: int = 1
    sprites: int = 1
    emphasis: float = 0.0
    minutes: float | None = None

    def __post_init__(self):
        _check_phase(self, "emphasis" if self.emphasis < 0 else None)
        if self.frames % 4 != 1 or self.sprites < 1:
            raise UserError(
                f"phase {self.name}: frames {self.frames} must be 4 k + 1, sprites {self.sprites} 1 or more"
            )

    def shrunk(self) -> VAEPhase:
        return dataclasses.replace(self, steps=2, batch_size=1, frames=min(self.frames, 5))


@dataclasses.dataclass(frozen=True)
class LatentPhase:
    """A part of a transformer's training on cached latents.

    Attributes:
      name: of the phase.
      steps: of training.
      batch_size: clips a step, all streams together.
      rate: peak learning rate.
      frames: latent frames of a training sequence.
      clip_frames: latent frames of a cached clip.
      clips: how many are cached.
      minutes: what the phase may take. Where its steps would take longer, there are fewer, and the learning rate falls
        accordingly; found out while the first tenth runs.
    """

    name: str
    steps: int
    batch_size: int
    rate: float
    frames: int
    clip_frames: int
    clips: int
    minutes: float | None = None

    def __post_init__(self):
        _check_phase(self, None)
        if not 1 <= self.frames <= self.clip_frames:
            raise UserError(
                f"phase {self.name}: frames is {self.frames}; 1 to clip_frames {self.clip_frames} is allowed"
            )
        if self.clips < 1:
            raise UserError(f"phase {self.name}: clips is {self.clips}; 1 or more is needed")

    def shrunk(self) -> LatentPhase:
        return dataclasses.replace(
            self, steps=2, batch_size=2, frames=min(self.frames, 6), clip_frames=min(self.clip_frames, 6), clips=4
        )


@dataclasses.dataclass(frozen=True)
class DistillPhase:
    """A part of distillation.

    Attributes:
      name: of the phase.
      steps: of training; the critic learns in each.
      batch_size: videos a step, all streams together.
      rate: learning rate of the student.
      critic_rate: of the critic.
      minutes: what the phase may take. Where its steps would take longer, there are fewer, and the learning rate falls
        accordingly; found out while the first tenth runs.
    """

    name: str
    steps: int
    batch_size: int
    rate: float
    critic_rate: float
    minutes: float | None = None

    def __post_init__(self):
        _check_phase(self, "critic_rate" if self.critic_rate < 0 else None)

    def shrunk(self) -> DistillPhase:
        return dataclasses.replace(self, steps=2, batch_size=2)
