"""Settings of distillation: what LongLive 1.0 does, and which of its quirks to repeat.

A quirk is something the official code does that its paper does not say, and that changes numbers. Each is a setting
of its own; `Quirks.reference()` is the official code, `Quirks()` is what we train with. `docs/training.md` says why.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from longlive_jax.config import SamplerConfig, check_choice
from longlive_jax.errors import UserError

REMAT = ("none", "layer", "dots")


@dataclasses.dataclass(frozen=True)
class Quirks:
    """Where the official code departs from the plain reading.

    Attributes:
      cache_gradient: `detach`: a block's loss trains that block's pass alone. `straight_through`: it also reaches the
        exit passes of earlier blocks of the chunk, through the keys and values that those left in the cache.
      sink: of a recache, `keep` or `refresh` as in decoding; `zero`: past `chunk_frames` frames the sink becomes zeros
        that are attended for the rest of the video.
      score_shift: the noise level that teacher and critic are told to remove is looked up in a table of this shift,
        that which was added in one of the sampler's shift. None: it is what it is, timestep / 1000.
      noisy_context: the clean pass gets the noise of its timestep (sigma 0.005 at t = 0). Decoding never does this.
      score_before_switch: frames that a chunk made before a switch within it count in the means of the losses, though
        they are judged by the new prompt and give no gradient.
    """

    cache_gradient: str = "detach"
    sink: str = "keep"
    score_shift: float | None = None
    noisy_context: bool = True
    score_before_switch: bool = False

    def __post_init__(self):
        check_choice("cache_gradient", self.cache_gradient, ("detach", "straight_through"))
        check_choice("sink", self.sink, ("keep", "refresh", "zero"))
        if self.score_shift is not None and not self.score_shift > 0:
            raise UserError(f"score_shift is {self.score_shift}; it must be above 0, or empty for timestep / 1000")

    @classmethod
    def reference(cls) -> Quirks:
        """LongLive v1.0 as released."""
        return cls(cache_gradient="straight_through", sink="zero", score_shift=8.0, score_before_switch=True)


@dataclasses.dataclass(frozen=True)
class DistillationConfig:
    """Self-forcing distillation, and streaming long tuning.

    Attributes:
      chunk_frames: latent frames that teacher and critic judge at once, and that the first chunk of a video has.
      new_frames: latent frames of every later chunk; the rest of what is judged are the newest of the past.
      max_frames: a video ends when no further chunk fits. Equal to `chunk_frames` for training without streaming.
      picture_context: latent frames decoded for the picture that a later chunk's window begins with, that one included;
        None for all at hand, as the official code. The VAE's memory is short, and this is most of a small model's step.
      guidance: of the teacher, 1 for none (ordinary scale: the official `guidance_scale` plus 1).
      min_timestep, max_timestep: the scores' timesteps are clipped to these.
      first_given: share of turns in which teacher and critic see the first frame of what they judge without noise, and
        judge how it goes on from there. For a teacher that has learnt so (its own `first_given`); not LongLive's.
      remat: what is computed again in the backward pass: `none`, all but the inputs of each `layer`, or all but the
        matrix products (`dots`).
      quirks: see `Quirks`.
    """

    chunk_frames: int = 21
    new_frames: int = 18
    max_frames: int = 240
    picture_context: int | None = None
    guidance: float = 4.0
    min_timestep: float = 20.0
    max_timestep: float = 980.0
    first_given: float = 0.0
    remat: str = "layer"
    quirks: Quirks = Quirks()

    def __post_init__(self):
        check_choice("remat", self.remat, REMAT)
        if not 1 <= self.new_frames <= self.chunk_frames:
            raise UserError(f"new_frames is {self.new_frames}; 1 to chunk_frames ({self.chunk_frames}) are allowed")
        if self.max_frames < self.chunk_frames:
            raise UserError(f"max_frames is {self.max_frames}; the first chunk alone has {self.chunk_frames}")
        if self.picture_context is not None and self.picture_context < 1:
            raise UserError(f"picture_context is {self.picture_context}; 1 or more is needed, or nothing for all")
        if not 0 <= self.first_given <= 1:
            raise UserError(f"first_given is {self.first_given}; 0 to 1 is allowed")
        if self.first_given and self.chunk_frames == 1:
            raise UserError("chunk_frames is 1; after a first frame that is given, there must be others")
        if not 0 < self.min_timestep <= self.max_timestep <= 1000:  # at 0 no noise is added: the critic's loss is 0 / 0
            raise UserError(
                f"min_timestep is {self.min_timestep}, max_timestep {self.max_timestep}; "
                "0 < min_timestep <= max_timestep <= 1000 is needed"
            )

    @property
    def starts(self) -> tuple[int, ...]:
        """The first latent frame of every chunk of a video."""
        return (0, *range(self.chunk_frames, self.max_frames - self.new_frames + 1, self.new_frames))

    @property
    def switches(self) -> tuple[int, ...]:
        """Where a video may change its prompt: at the start of any chunk but the first and the last, so that the new
        prompt has more than one chunk. The official choices, 21, 39, ... 201, are these. A video of two chunks changes
        at the second, as nothing else is left."""
        return self.starts[1:-1] or self.starts[1:]

    def check(self, sampler: SamplerConfig) -> None:
        """Refuses settings that the rollout cannot follow."""
        block = sampler.block_frames
        for name in ("chunk_frames", "new_frames"):
            if getattr(self, name) % block:
                raise UserError(f"{name} is {getattr(self, name)}; whole blocks of {block} latent frames are needed")
        if sampler.window == -1:
            raise UserError("training needs a window; -1 (all of the past) is for decoding")
        if self.quirks.sink == "zero" and sampler.window > self.chunk_frames:
            raise UserError(
                f"sink is 'zero', which the official code has for windows within a chunk only; window is "
                f"{sampler.window}, chunk_frames {self.chunk_frames}; set sink to keep, or window to "
                f"{self.chunk_frames} or less"
            )
        if sampler.solver != "renoise":
            raise UserError(f"solver is '{sampler.solver}'; few-step distillation needs 'renoise'")

    def rematerialise(self) -> Callable | None:
        """`remat` as a wrapper for `run_layers`."""
        from longlive_jax.training.remat import rematerialise  # here: settings are read without jax

        return rematerialise(self.remat)
