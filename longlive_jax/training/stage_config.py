"""Settings of the training stages: one frozen dataclass a stage, over what all share.

A stage runs through phases (`phases.py`). YAML files (`config_files.py`) and the command line fill these; nothing here
needs jax.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from longlive_jax.config import (
    SamplerConfig,
    TextEncoderConfig,
    TransformerConfig,
    VAEConfig,
    unknown_name,
)
from longlive_jax.errors import UserError, collect, raise_all
from longlive_jax.training.config import REMAT, DistillationConfig, Quirks
from longlive_jax.training.phases import DistillPhase, LatentPhase, VAEPhase
from longlive_jax.training.run_config import OptimizerConfig, RunConfig, require

SIZES = {
    "sprites": TransformerConfig.sprites, "t2v_1_3b": TransformerConfig.t2v_1_3b, "t2v_14b": TransformerConfig.t2v_14b
}  # fmt: skip
"""Transformers by name."""


EULER = SamplerConfig(
    height=64, width=64, shift=3.0, solver="euler", steps=(1000.0, 875.0, 750.0, 625.0, 500.0, 375.0, 250.0, 125.0)
)
"""How a sprites model that is not distilled is decoded: eight steps along the flow."""


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """What every stage has; see the subclasses."""

    stage: ClassVar[str]
    phases: tuple[Any, ...]
    optimizer: OptimizerConfig
    run: RunConfig

    def __post_init__(self):
        faults = []
        names = [phase.name for phase in self.phases]
        require(faults, bool(names), "there are no phases; give at least one")
        require(faults, len(set(names)) == len(names), f"phases {names} must have different names")
        for phase in self.phases:
            if phase.batch_size % self.run.streams:
                near = self.run.streams * max(1, round(phase.batch_size / self.run.streams))
                faults.append(
                    f"phase {phase.name}: batch_size {phase.batch_size} does not split into {self.run.streams} "
                    f"streams; the nearest that does: {near}"
                )
            if phase.steps <= self.optimizer.warmup:
                faults.append(
                    f"phase {phase.name}: {phase.steps} steps are not more than the warmup of {self.optimizer.warmup}"
                )
        raise_all(faults, f"{self.stage}: ")

    @property
    def steps(self) -> int:
        """Of all phases."""
        return sum(phase.steps for phase in self.phases)

    def shrunk(self) -> StageConfig:
        """The same stage at sizes that run through in seconds on a CPU, one device whatever the mesh was."""
        # The last phase alone: every phase is a program to compile, which is what takes the time.
        # Two samples: as two streams where there were several, so that what is tried out is what will be run. The parts
        # of the first step are timed, where there are any, whatever the settings say.
        phases = tuple(dataclasses.replace(p.shrunk(), batch_size=2) for p in self.phases[-1:])
        run = dataclasses.replace(
            self.run, streams=min(self.run.streams, 2), data=1, fsdp=1, save_every=2, log_every=1, validate_every=0,
            split_every=2, device_gib=None, wandb=None,
        )  # fmt: skip
        return dataclasses.replace(
            self, phases=phases, optimizer=dataclasses.replace(self.optimizer, warmup=0), run=run, **self._tiny()
        )

    def _tiny(self) -> dict[str, Any]:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class VAETrainConfig(StageConfig):
    """Train the VAE of a small world.

    Attributes:
      phases: see `VAEPhase`.
      optimizer: see `OptimizerConfig`.
      run: see `RunConfig`.
      vae: sizes; the statistics of the latents are measured at the end.
      init: checkpoint whose VAE to go on from.
      train_encoder: whether the encoder learns too. Without it (needs `init`) the latents stay what they are, and so
        does the use of every transformer trained on them.
      kl_weight: of the KL term.
      statistics_clips: clips over which the latents' mean and spread are measured.
    """

    stage: ClassVar[str] = "vae"
    phases: tuple[VAEPhase, ...] = (
        VAEPhase("crowd-stills", 3600, 16, 2e-3, sprites=6, emphasis=4.0),
        VAEPhase("crowd-clips", 900, 3, 1e-3, frames=5, sprites=6, emphasis=4.0),
        VAEPhase("clips", 200, 1, 3e-4, frames=13, emphasis=4.0),
    )
    optimizer: OptimizerConfig = OptimizerConfig(weight_decay=1e-4, final_rate=1e-4, ema=0.999)
    run: RunConfig = RunConfig()
    vae: VAEConfig = dataclasses.replace(VAEConfig.sprites(), base_width=8)
    init: str | None = None
    train_encoder: bool = True
    kl_weight: float = 3e-4
    statistics_clips: int = 128

    def _tiny(self) -> dict[str, Any]:
        tiny = dataclasses.replace(self.vae, base_width=4, multipliers=(1, 1, 1, 1), res_blocks=0)
        return {"vae": tiny, "init": None, "train_encoder": True, "statistics_clips": 4}


@dataclasses.dataclass(frozen=True)
class ModelTrainConfig(StageConfig):
    """What all stages with a transformer share.

    Attributes:
      phases: what is trained for how long.
      optimizer: see `OptimizerConfig`.
      run: see `RunConfig`.
      vae: checkpoint whose VAE makes the latents; that of `init` by default.
      init: checkpoint whose transformer, text encoder and tokeniser to start from.
      transformer: sizes.
      text_encoder: sizes.
      sampler: written into the checkpoint; its shift and block are those of training.
    """

    phases: tuple[Any, ...] = ()
    optimizer: OptimizerConfig = OptimizerConfig()
    run: RunConfig = RunConfig()
    vae: str | None = None
    init: str | None = None
    transformer: TransformerConfig = TransformerConfig.sprites()
    text_encoder: TextEncoderConfig = TextEncoderConfig.sprites()
    sampler: SamplerConfig = EULER

    def __post_init__(self):
        faults = []
        with collect(faults):
            super().__post_init__()
        with collect(faults):
            self.sampler.check_size(self.transformer.patch)
        raise_all(faults)

    def _tiny(self) -> dict[str, Any]:
        text = TextEncoderConfig(vocab_size=128, dim=16, attention_dim=16, ffn_dim=32, num_heads=2, num_layers=1)
        transformer = TransformerConfig(
            dim=16, ffn_dim=32, num_layers=2, num_heads=2, text_dim=16, text_length=24, time_dim=32
        )
        sampler = dataclasses.replace(self.sampler, height=64, width=64, steps=self.sampler.steps[:2])
        return {"vae": None, "init": None, "transformer": transformer, "text_encoder": text, "sampler": sampler}


@dataclasses.dataclass(frozen=True)
class TransformerTrainConfig(ModelTrainConfig):
    """What teacher and student share: training on clips.

    Attributes:
      phases: see `LatentPhase`.
      train_text_encoder: whether the text encoder learns too.
      prompt_dropout: share of clips whose prompt is left out, for guidance.
      latents: folder of cached latents to share between runs; in the output by default.
      remat: what is computed again in the backward pass: none, all but the inputs of each layer, or all but the matrix
        products (dots).
    """

    phases: tuple[LatentPhase, ...] = ()
    optimizer: OptimizerConfig = OptimizerConfig(final_rate=2e-5, spike=10.0)
    train_text_encoder: bool = True
    prompt_dropout: float = 0.0
    latents: str | None = None
    remat: str = "none"

    def __post_init__(self):
        faults = []
        with collect(faults):
            super().__post_init__()
        if self.remat not in REMAT:
            faults.append(unknown_name("remat", self.remat, REMAT))
        require(faults, 0 <= self.prompt_dropout < 1, f"prompt_dropout is {self.prompt_dropout}; from 0 to below 1")
        raise_all(faults)

    def _tiny(self) -> dict[str, Any]:
        return {**super()._tiny(), "latents": None}


@dataclasses.dataclass(frozen=True)
class TeacherTrainConfig(TransformerTrainConfig):
    """Train the bidirectional teacher by flow matching, with prompts left out at times.

    Attributes:
      first_given: share of clips whose first latent frame comes without noise, so that the prompt alone says how it
        goes on: what words of motion are learnt from.
    """

    stage: ClassVar[str] = "teacher"
    phases: tuple[LatentPhase, ...] = (
        LatentPhase("first-frames", 2400, 64, 2e-3, frames=3, clip_frames=3, clips=8192),
        LatentPhase("clips", 1500, 8, 1e-3, frames=21, clip_frames=21, clips=1024),
    )
    prompt_dropout: float = 0.1
    first_given: float = 0.0

    def __post_init__(self):
        faults = []
        with collect(faults):
            super().__post_init__()
        require(faults, 0 <= self.first_given <= 1, f"first_given is {self.first_given}; 0 to 1 is allowed")
        for phase in self.phases:
            if self.first_given and phase.frames < 2:
                faults.append(f"phase {phase.name}: frames is 1; after the first, which is given, there must be others")
        raise_all(faults)


@dataclasses.dataclass(frozen=True)
class StudentTrainConfig(TransformerTrainConfig):
    """Initialise the causal student by teacher forcing.

    Attributes:
      context_noise: the clean past gets a noise level up to this.
    """

    stage: ClassVar[str] = "ar"
    phases: tuple[LatentPhase, ...] = (
        LatentPhase("first-blocks", 2400, 64, 2e-3, frames=3, clip_frames=3, clips=8192),
        # The sink, and three blocks from anywhere in the clip.
        LatentPhase("clips", 2000, 8, 1e-3, frames=12, clip_frames=15, clips=1024),
    )
    context_noise: float = 0.15

    def __post_init__(self):
        faults, block = [], self.sampler.block_frames
        with collect(faults):
            super().__post_init__()
        for phase in self.phases:
            for name in ("frames", "clip_frames"):
                frames = getattr(phase, name)
                if frames % block:
                    faults.append(f"phase {phase.name}: {name} is {frames}; whole blocks of {block} are needed")
        require(faults, 0 <= self.context_noise <= 1, f"context_noise is {self.context_noise}; 0 to 1 is allowed")
        raise_all(faults)


@dataclasses.dataclass(frozen=True)
class DistillTrainConfig(ModelTrainConfig):
    """What both stages of distillation share.

    Attributes:
      phases: see `DistillPhase`.
      teacher: checkpoint of the bidirectional teacher.
      critic: checkpoint whose transformer the critic starts from; the teacher's by default.
      teacher_size: of a teacher that is not given, to see whether it would fit; the student's by default.
      distillation: see `DistillationConfig`.
      prompts: files of prompts, see `PromptSource`; those of the sprites world if there are none.
      negative_prompt: what the teacher is guided away from.
      student_every: the student learns in every so many steps.
      lora_rank: of the adapters that student and critic learn; 0 to learn all parameters.
      lora_alpha: scale of the adapters, times their rank.
    """

    phases: tuple[DistillPhase, ...] = ()
    run: RunConfig = RunConfig(split_every=200)
    # LongLive 1.0's: no first moment, constant rate.
    optimizer: OptimizerConfig = OptimizerConfig(b1=0.0, b2=0.999, clip=10.0, warmup=0, ema=0.0)
    sampler: SamplerConfig = dataclasses.replace(SamplerConfig.sprites(), rope="absolute")
    teacher: str | None = None
    critic: str | None = None
    teacher_size: str | None = None
    distillation: DistillationConfig = DistillationConfig(max_frames=21)
    prompts: tuple[str, ...] = ()
    negative_prompt: str = ""
    student_every: int = 5
    lora_rank: int = 0
    lora_alpha: float = 256.0

    def __post_init__(self):
        faults = []
        for check in (super().__post_init__, lambda: self.distillation.check(self.sampler)):
            with collect(faults):
                check()
        if self.sampler.rope == "auto":
            faults.append("sampler: rope is 'auto'; training needs it decided: absolute or relative")
        if self.teacher_size not in (None, *SIZES):
            faults.append(unknown_name("teacher_size", self.teacher_size, SIZES))
        require(faults, self.student_every >= 1, f"student_every is {self.student_every}; 1 or more is needed")
        require(faults, self.lora_rank >= 0, f"lora_rank is {self.lora_rank}; 0 (for none) or more is allowed")
        raise_all(faults)

    def _tiny(self) -> dict[str, Any]:
        block = self.sampler.block_frames
        sampler = {"window": self.sampler.sink_frames + 2 * block} if self.sampler.window != -1 else {}
        tiny = super()._tiny()
        # A video of two chunks, one a turn: every step is the same program.
        chunks = 2 if self.distillation.max_frames > self.distillation.chunk_frames else 1
        chunk = 2 * block
        if self.distillation.quirks.sink == "zero":  # its first chunk fills the window
            chunk = max(chunk, -(-sampler.get("window", 0) // block) * block)
        distillation = dataclasses.replace(
            self.distillation, chunk_frames=chunk, new_frames=block, max_frames=chunk + (chunks - 1) * block
        )
        return tiny | {
            "sampler": dataclasses.replace(tiny["sampler"], **sampler), "teacher": None, "critic": None,
            "teacher_size": None, "prompts": (), "distillation": distillation,
            "lora_rank": min(self.lora_rank, 2), "student_every": 1,
        }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class InitTrainConfig(DistillTrainConfig):
    """Distil the causal student on single chunks (self-forcing, distribution matching)."""

    stage: ClassVar[str] = "init"
    phases: tuple[DistillPhase, ...] = (DistillPhase("self-forcing", 700, 64, 2e-6, 4e-7),)
    optimizer: OptimizerConfig = OptimizerConfig(b1=0.0, b2=0.999, clip=10.0, warmup=0, ema=0.99, ema_start=40)

    def __post_init__(self):
        super().__post_init__()
        if len(self.distillation.starts) > 1:
            raise UserError(f"init: max_frames {self.distillation.max_frames} makes several chunks; that is stage long")


@dataclasses.dataclass(frozen=True)
class LongTrainConfig(DistillTrainConfig):
    """Tune the few-step student on long videos with a prompt switch, streaming."""

    stage: ClassVar[str] = "long"
    phases: tuple[DistillPhase, ...] = (DistillPhase("streaming", 3000, 64, 1e-5, 2e-6),)
    distillation: DistillationConfig = DistillationConfig(quirks=Quirks())
    lora_rank: int = 256

    def __post_init__(self):
        super().__post_init__()
        if len(self.distillation.starts) < 2:
            raise UserError("long: max_frames leaves room for one chunk only; that is stage init")


STAGES: dict[str, type[StageConfig]] = {
    kind.stage: kind
    for kind in (VAETrainConfig, TeacherTrainConfig, StudentTrainConfig, InitTrainConfig, LongTrainConfig)
}
"""Settings of each stage, by its name."""
