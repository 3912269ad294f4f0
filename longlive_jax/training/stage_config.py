"""Settings of the training stages: one frozen dataclass a stage, over what all share.

A stage runs through phases (stills, then clips ...): the weights go on, optimiser and schedule begin anew. YAML files
and the command line fill these; nothing here needs jax.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import yaml

from longlive_jax.config import (
    SamplerConfig,
    TextEncoderConfig,
    TransformerConfig,
    VAEConfig,
    from_dict,
    to_dict,
    unknown_name,
)
from longlive_jax.errors import UserError, collect, raise_all
from longlive_jax.training.config import REMAT, DistillationConfig, Quirks

DTYPES = ("float32", "bfloat16")
SIZES = {
    "sprites": TransformerConfig.sprites, "t2v_1_3b": TransformerConfig.t2v_1_3b, "t2v_14b": TransformerConfig.t2v_14b
}  # fmt: skip
"""Transformers by name."""


def _check_phase(phase, negative: str | None) -> None:
    faults = []
    for name in ("steps", "batch_size"):
        _require(faults, getattr(phase, name) >= 1, f"{name} is {getattr(phase, name)}; 1 or more is needed")
    _require(faults, phase.rate > 0, f"rate is {phase.rate}; it must be above 0")
    _require(faults, negative is None, f"{negative} must be 0 or more")
    _require(faults, phase.minutes is None or phase.minutes > 0, f"minutes is {phase.minutes}; above 0 is needed")
    raise_all(faults, f"phase {phase.name}: ")


def _require(faults: list[str], fine: bool, message: str) -> None:
    if not fine:
        faults.append(message)


EULER = SamplerConfig(
    height=64, width=64, shift=3.0, solver="euler", steps=(1000.0, 875.0, 750.0, 625.0, 500.0, 375.0, 250.0, 125.0)
)
"""How a sprites model that is not distilled is decoded: eight steps along the flow."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and what surrounds it. The learning rate is the phase's.

    Attributes:
      b1: decay of the first moment; at 0 it is the gradient itself and is not kept.
      b2: decay of the second moment.
      eps: of AdamW.
      weight_decay: of all parameters, times the learning rate.
      clip: largest global norm of a gradient; 0 for no limit.
      warmup: steps in which the rate rises from 0.
      final_rate: the rate falls to this along a cosine; None for a constant rate.
      ema: decay of the averaged weights, which are what a run hands on; 0 for none.
      ema_start: updates before which the average is the weights themselves.
      spike: updates with a gradient norm above this many times the usual are skipped; 0 for no limit.
    """

    b1: float = 0.9
    b2: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip: float = 1.0
    warmup: int = 100
    final_rate: float | None = None
    ema: float = 0.998
    ema_start: int = 0
    spike: float = 0.0

    def __post_init__(self):
        faults = []
        for name in ("b1", "b2", "ema"):
            _require(faults, 0 <= getattr(self, name) < 1, f"{name} is {getattr(self, name)}; from 0 to below 1")
        for name in ("weight_decay", "clip", "warmup", "ema_start", "spike"):
            _require(faults, getattr(self, name) >= 0, f"{name} is {getattr(self, name)}; 0 or more is allowed")
        _require(faults, self.eps > 0, f"eps is {self.eps}; it must be above 0")
        raise_all(faults, "optimizer: ")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """How a stage is run, whatever it trains.

    Attributes:
      seed: of initial weights, data and noise.
      streams: independent parts of a batch, each with its own noise. The devices of a mesh take one each at a time, so
        numbers depend on this and not on the mesh. More streams than devices: gradients are accumulated.
      data: mesh axis of copies.
      fsdp: mesh axis over which parameters and optimiser states are cut up.
      dtype: of activations; weights, their gradients' sums and optimiser states are float32 always.
      unroll: write out the loop over a transformer's layers: a third less time a step for small networks on a CPU, twice
        the time to compile.
      save_every: steps between checkpoints of the run.
      keep: how many of them stay.
      log_every: steps between lines of metrics.
      validate_every: steps between validation videos; 0 for one at the end of each phase.
      minutes: stop after this long, with a checkpoint to go on from.
      workers: processes that draw data; 0 for two threads (of grain, where that is installed).
      split_every: steps between timing passes, which run the parts of a step (rollout, teacher ...) apart; 0 for none.
      device_gib: memory of a device, to check a run for other machines; None for what this one has.
      max_skips: updates skipped in a row before the run gives up.
      tensorboard: write TensorBoard files where tensorboardX is installed.
      wandb: Weights & Biases project to log to.
    """

    seed: int = 0
    streams: int = 1
    data: int = 1
    fsdp: int = 1
    dtype: str = "float32"
    unroll: bool = False
    save_every: int = 200
    keep: int = 2
    log_every: int = 20
    validate_every: int = 0
    minutes: float | None = None
    workers: int = 0
    split_every: int = 0
    device_gib: float | None = None
    max_skips: int = 20
    tensorboard: bool = True
    wandb: str | None = None

    def __post_init__(self):
        faults = []
        for name in ("streams", "data", "fsdp", "save_every", "keep", "log_every", "max_skips"):
            _require(faults, getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; 1 or more is needed")
        for name in ("seed", "validate_every", "workers", "split_every"):
            _require(faults, getattr(self, name) >= 0, f"{name} is {getattr(self, name)}; 0 or more is allowed")
        for name in ("minutes", "device_gib"):
            value = getattr(self, name)
            _require(faults, value is None or value > 0, f"{name} is {value}; above 0 is needed")
        if self.dtype not in DTYPES:
            faults.append(unknown_name("dtype", self.dtype, DTYPES))
        if min(self.streams, self.data, self.fsdp) >= 1:
            _require(
                faults, self.streams % self.devices == 0,
                f"streams is {self.streams}, which a mesh of data {self.data} x fsdp {self.fsdp} = {self.devices} "
                f"devices does not divide; make it a multiple of {self.devices}",
            )  # fmt: skip
        raise_all(faults, "run: ")

    @property
    def devices(self) -> int:
        return self.data * self.fsdp


HARMLESS = (
    "save_every", "keep", "log_every", "validate_every", "minutes", "workers", "split_every", "device_gib", "max_skips",
    "tensorboard", "wandb",
)  # fmt: skip
"""Fields of `RunConfig` that may differ when a run goes on: they change no number."""


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
class StageConfig:
    """What every stage has; see the subclasses."""

    stage: ClassVar[str]
    phases: tuple[Any, ...]
    optimizer: OptimizerConfig
    run: RunConfig

    def __post_init__(self):
        faults = []
        names = [phase.name for phase in self.phases]
        _require(faults, bool(names), "there are no phases; give at least one")
        _require(faults, len(set(names)) == len(names), f"phases {names} must have different names")
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
        """The same stage at sizes that run through in seconds on a CPU."""
        # The last phase alone: every phase is a program to compile, which is what takes the time.
        # Bigger batches where there are more streams, so that what is tried out is what will be run.
        phases = tuple(
            dataclasses.replace(p.shrunk(), batch_size=max(2, self.run.streams) // self.run.streams * self.run.streams)
            for p in self.phases[-1:]
        )
        return dataclasses.replace(
            self, phases=phases, optimizer=dataclasses.replace(self.optimizer, warmup=0),
            run=dataclasses.replace(
                self.run, save_every=2, log_every=1, validate_every=0, split_every=0, wandb=None
            ),
            **self._tiny(),
        )  # fmt: skip

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
        _require(faults, 0 <= self.prompt_dropout < 1, f"prompt_dropout is {self.prompt_dropout}; from 0 to below 1")
        raise_all(faults)

    def _tiny(self) -> dict[str, Any]:
        return {**super()._tiny(), "latents": None}


@dataclasses.dataclass(frozen=True)
class TeacherTrainConfig(TransformerTrainConfig):
    """Train the bidirectional teacher by flow matching, with prompts left out at times."""

    stage: ClassVar[str] = "teacher"
    phases: tuple[LatentPhase, ...] = (
        LatentPhase("first-frames", 2400, 64, 2e-3, frames=3, clip_frames=3, clips=8192),
        LatentPhase("clips", 1500, 8, 1e-3, frames=21, clip_frames=21, clips=1024),
    )
    prompt_dropout: float = 0.1


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
        _require(faults, 0 <= self.context_noise <= 1, f"context_noise is {self.context_noise}; 0 to 1 is allowed")
        raise_all(faults)


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
        _require(faults, self.student_every >= 1, f"student_every is {self.student_every}; 1 or more is needed")
        _require(faults, self.lora_rank >= 0, f"lora_rank is {self.lora_rank}; 0 (for none) or more is allowed")
        raise_all(faults)

    def _tiny(self) -> dict[str, Any]:
        block = self.sampler.block_frames
        sampler = {"window": self.sampler.sink_frames + 2 * block} if self.sampler.window != -1 else {}
        tiny = super()._tiny()
        # A video of two chunks, one a turn: every step is the same program.
        chunks = 2 if self.distillation.max_frames > self.distillation.chunk_frames else 1
        distillation = dataclasses.replace(
            self.distillation, chunk_frames=2 * block, new_frames=block, max_frames=(1 + chunks) * block
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


# MARK: files


def read_config(path: str | Path, kind: type[StageConfig]) -> StageConfig:
    """A stage's settings from a YAML file; what it leaves out is the stage's own.

    Raises:
      UserError: no such file, not YAML, or a key or value that is not understood.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path given to --config") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        raise UserError(f"{path}{f':{where.line + 1}' if where else ''}: not valid YAML") from None
    return from_values(kind, values if values is not None else {}, str(path))


def from_values(kind: type[StageConfig], values: Any, where: str) -> StageConfig:
    """As `config.from_dict`, but nested tables that are given in part keep the stage's own values for the rest."""
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected a table of settings, got {values!r}")
    own, filled = {f.name: f.default for f in dataclasses.fields(kind)}, {}
    for name, value in values.items():
        given = own.get(name)
        if dataclasses.is_dataclass(given) and isinstance(value, dict):
            value = {**to_dict(given), **{k: _number(v) for k, v in value.items()}}
        elif name == "phases" and isinstance(value, list):
            value = [{k: _number(v) for k, v in p.items()} if isinstance(p, dict) else p for p in value]
        filled[name] = _number(value)
    return from_dict(kind, filled, where)


def _number(value: Any) -> Any:
    """YAML reads 2e-3 as a text (it wants 2.0e-3); everybody means the number."""
    if isinstance(value, str) and value[:1] in "+-.0123456789" and "e" in value.lower():
        try:
            return float(value)
        except ValueError:
            return value
    return value


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """What a run's settings and new ones disagree about, as "run.streams: 1, now 2"; harmless fields left out."""
    found = []
    for name in sorted(old.keys() | new.keys()):
        one, two, path = old.get(name), new.get(name), prefix + name
        if isinstance(one, dict) and isinstance(two, dict):
            found += differences(one, two, f"{path}.")
        elif one != two and not (prefix == "run." and name in HARMLESS):
            found.append(f"{path}: {one}, now {two}")
    return found
