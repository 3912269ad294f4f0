"""LongLive v1.0's training files (`longlive_train_init.yaml`, `longlive_train_long.yaml`), read as they are.

Every key has one of three fates: it sets something of ours, it has no say here (and is named, with where its affair is
settled), or it asks for what we do not have, which is an error. Such a file means the official code, so its quirks are
on (`Quirks.reference`).
"""

from __future__ import annotations

from typing import Any

from longlive_jax.config import (
    SPATIAL_FACTOR,
    TextEncoderConfig,
    official_changes,
    replace,
    to_dict,
    unknown_name,
)
from longlive_jax.errors import UserError, collect, raise_all
from longlive_jax.training.config import Quirks
from longlive_jax.training.stage_config import SIZES, DistillTrainConfig, StageConfig

SIGNS = ("dfake_gen_update_ratio", "denoising_step_list", "distribution_loss", "generator_ckpt", "model_kwargs")
"""A training file of LongLive has one of these at least, a file of ours none."""

TABLES = ("adapter", "model_kwargs")
"""Keys that hold settings of their own; below they are written "adapter.rank"."""

SAMPLER = {
    "context_noise": "context_noise",
    "denoising_step_list": "denoising_step_list",
    "model_kwargs.local_attn_size": "local_attn_size",
    "model_kwargs.sink_size": "sink_size",
    "model_kwargs.timestep_shift": "timestep_shift",
    "model_kwargs.use_infinite_attention": "use_infinite_attention",
    "num_frame_per_block": "num_frame_per_block",
    "warp_denoising_step": "warp_denoising_step",
}
"""Key -> its name in `official_changes`, which knows what it is in our `SamplerConfig`."""

SAME = {
    "beta1": "optimizer.b1",
    "beta2": "optimizer.b2",
    "dfake_gen_update_ratio": "student_every",
    "ema_weight": "optimizer.ema",
    "log_iters": "run.save_every",
    "lr": "phase.rate",
    "lr_critic": "phase.critic_rate",
    "max_grad_norm_generator": "optimizer.clip",
    "max_iters": "phase.steps",
    "negative_prompt": "negative_prompt",
    "seed": "run.seed",
    "weight_decay": "optimizer.weight_decay",
}
"""Key -> ours, where only the name differs."""

STREAMING = {
    "streaming_chunk_size": "distillation.chunk_frames",
    "streaming_max_length": "distillation.max_frames",
    "streaming_min_new_frame": "distillation.new_frames",
}
"""Likewise, in stage long."""

TWINS = {
    "beta1_critic": "beta1",
    "beta2_critic": "beta2",
    "max_grad_norm_critic": "max_grad_norm_generator",
    "min_num_training_frames": "num_training_frames",
    "slice_last_frames": "num_training_frames",
    "timestep_shift": "model_kwargs.timestep_shift",
}
"""Keys that we have one setting for with another; they must agree."""

CONVERTED = (
    "adapter.alpha", "adapter.rank", "batch_size", "data_path", "distribution_loss", "ema_start_step",
    "gradient_checkpointing", "guidance_scale", "image_or_video_shape", "max_checkpoints", "mixed_precision",
    "model_kwargs.model_name", "num_training_frames", "real_guidance_scale", "real_name", "streaming_training",
    "switch_choices", "switch_prompt_path", "total_batch_size", "vis_interval", "wandb_project",
)  # fmt: skip
"""Keys that set something of ours by way of a calculation, see `_Reading`."""

ONLY = {
    "adapter.apply_to_critic": True,
    "adapter.dropout": 0,
    "adapter.type": "lora",
    "causal": True,
    "denoising_loss_type": "flow",
    "fake_guidance_scale": 0,
    "i2v": False,
    "independent_first_frame": False,
    "last_step_only": False,
    "min_score_timestep": 0,
    "num_train_timestep": 1000,
    "same_step_across_blocks": True,
    "streaming_possible_max_length": None,
    "switch_mode": "random_choice",
    "train_first_chunk": True,
    "trainer": "score_distillation",
    "ts_schedule": False,
    "ts_schedule_max": False,
}
"""Keys of which we have what one value asks for."""

_UNREAD = "LongLive's training never reads it"
_MESH = "run.data and run.fsdp say how the devices are used"
_VALIDATION = "validation videos have 3 s, of prompts of ours"

ELSEWHERE = {
    "adapter.dtype": "adapters are float32, activations run.dtype",
    "adapter.verbose": "the layers with adapters are not listed",
    "ckpt_step": _UNREAD,
    "discriminator_lr_multiplier": _UNREAD,
    "eval_first_n": _UNREAD,
    "fake_name": "--critic FOLDER, that model converted; without it the critic begins as the teacher",
    "fake_score_fsdp_wrap_strategy": _MESH,
    "fixed_switch_index": "switch_mode random_choice does not read it",
    "gc_interval": "nothing is to be collected",
    "generator_ckpt": "--init FOLDER, from longlive convert --generator FILE",
    "generator_fsdp_wrap_strategy": _MESH,
    "global_sink": "LongLive's training never reads it; distillation.quirks.sink",
    "gradient_accumulation_steps": "run.streams; those beyond the devices of the mesh are accumulated",
    "height": "image_or_video_shape says it",
    "load_raw_video": _UNREAD,
    "lora_ckpt": "--resume goes on with a run, longlive convert --lora merges adapters",
    "max_switch_frame_index": "switch_mode random_choice does not read it",
    "min_switch_frame_index": "switch_mode random_choice does not read it",
    "num_frames": _UNREAD,
    "num_samples": _UNREAD,
    "one_logger_project": "run.wandb, run.tensorboard",
    "prompt_name": _UNREAD,
    "prompt_path": _UNREAD,
    "real_score_fsdp_wrap_strategy": _MESH,
    "sharding_strategy": _MESH,
    "text_encoder_cpu_offload": "the text encoder stays on the devices",
    "text_encoder_fsdp_wrap_strategy": _MESH,
    "val_batch_size": _VALIDATION,
    "val_data_path": _VALIDATION,
    "val_switch_prompt_path": _VALIDATION,
    "vis_ema": "validation videos are of the averaged weights, where there are any",
    "vis_video_lengths": _VALIDATION,
    "wandb_entity": "the environment variable WANDB_ENTITY",
    "wandb_key": "wandb login",
    "width": "image_or_video_shape says it",
}
"""Keys that have no say here, and where their affair is settled."""

KNOWN = (*SAMPLER, *SAME, *STREAMING, *TWINS, *CONVERTED, *ONLY, *ELSEWHERE)

MODELS = {"Wan2.1-T2V-1.3B": "t2v_1_3b", "Wan2.1-T2V-14B": "t2v_14b"}
"""Their names of networks -> ours, see `SIZES`."""

LOSSES = {"init": ("dmd", False), "long": ("dmd_switch", True)}
"""Stage -> distribution_loss and streaming_training of the files that are for it."""


def is_official(values: Any) -> bool:
    """Whether a YAML file is a training file of LongLive v1.0."""
    return isinstance(values, dict) and any(sign in values for sign in SIGNS)


def official_values(settings: dict[str, Any], kind: type[StageConfig]) -> tuple[dict[str, Any], dict[str, str]]:
    """A training file of LongLive v1.0 as a file of ours.

    Args:
      settings: what the file says, numbers as numbers.
      kind: settings of the stage to train.

    Returns:
      What a file of ours would say; and the keys that do nothing, with where their affair is settled. What the file
      leaves out is the stage's own.

    Raises:
      UserError: the file is for another stage, has a key nobody knows (the nearest name is offered), or asks for what
        we do not have. One line with all faults.
    """
    for table in TABLES:
        inner = settings.get(table, {})
        if inner is not None and not isinstance(inner, dict):
            raise UserError(f"{table} must be a table of settings, got {inner!r}")
        inner = {f"{table}.{key}": value for key, value in (inner or {}).items()}
        settings = {key: value for key, value in settings.items() if key != table} | inner
    if "num_output_frames" in settings and "distribution_loss" not in settings:
        raise UserError(
            "this is an inference file of LongLive's, not one for training; longlive generate --config takes it"
        )
    faults = [unknown_name("key of LongLive's training", str(key), KNOWN) for key in settings if key not in KNOWN]
    raise_all([fault.partition("; known: ")[0] for fault in faults])  # there are too many to list
    _check_stage(settings, kind)
    return _Reading(settings, kind).result()


def _check_stage(settings: dict[str, Any], kind: type[StageConfig]) -> None:
    asked = settings.get("distribution_loss", "dmd"), bool(settings.get("streaming_training", False))
    stages = [stage for stage, needed in LOSSES.items() if needed == asked]
    if not stages:
        raise UserError(
            f"distribution_loss '{asked[0]}' with streaming_training {str(asked[1]).lower()} is not available; dmd "
            "without it (stage init) and dmd_switch with it (stage long) are"
        )
    if not issubclass(kind, DistillTrainConfig) or kind.stage not in stages:
        raise UserError(
            f"this file of LongLive's is for stage {stages[0]}, not {kind.stage}; run longlive train {stages[0]}"
        )


class _Reading:
    """One file being read: `settings` under LongLive's names, flat; `values` under ours."""

    def __init__(self, settings: dict[str, Any], kind: type[DistillTrainConfig]):
        self.settings, self.kind = settings, kind
        self.long, self.adapted = kind.stage == "long", any(key.startswith("adapter.") for key in settings)
        self.values: dict[str, Any] = {"phase": to_dict(kind().phases[0])}
        self.elsewhere = {key: place for key, place in ELSEWHERE.items() if key in settings}

    def result(self) -> tuple[dict[str, Any], dict[str, str]]:
        faults: list[str] = []
        parts = self.same, self.only, self.sampler, self.sizes, self.chunks, self.batch, self.optimizer, self.run
        for part in (*parts, self.prompts):
            with collect(faults):
                part()
        raise_all(faults)
        if self.long:
            self.switches()
        phase = self.values.pop("phase")
        return self.values | {"phases": [phase]}, self.elsewhere

    def put(self, path: str, value: Any) -> None:
        """Sets ours; `path` is "optimizer.b1"."""
        *table, name = path.split(".")
        (self.values.setdefault(table[0], {}) if table else self.values)[name] = value

    def number(self, key: str, default: Any = None) -> Any:
        value = self.settings.get(key, default)
        if value is not default and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise UserError(f"{key} must be a number, got {value!r}")
        return value

    def same(self) -> None:
        for key, ours in (SAME | STREAMING if self.long else SAME).items():
            if key in self.settings:
                self.put(ours, self.settings[key])
        idle = () if self.long else (*STREAMING, "switch_choices", "switch_prompt_path")
        self.elsewhere |= {key: "it is for stage long" for key in idle if key in self.settings}

    def only(self) -> None:
        pairs = {one: other for one, other in TWINS.items() if other in self.settings and one in self.settings}
        if self.long:  # these are not read in streaming
            idle = [key for key in self.settings if "num_training_frames" in key or key == "slice_last_frames"]
            self.elsewhere |= dict.fromkeys(idle, "streaming_chunk_size says it")
            pairs = {one: other for one, other in pairs.items() if one not in idle}
        faults = [
            f"{key} is {self.settings[key]!r}; only {value!r} is available"
            for key, value in ONLY.items()
            if key in self.settings and self.settings[key] != value
        ] + [
            f"{one} is {self.settings[one]} and {other} {self.settings[other]}; there is one setting for both, so they "
            "must agree"
            for one, other in pairs.items()
            if self.settings[one] != self.settings[other]
        ]  # fmt: skip
        raise_all(faults)

    def sampler(self) -> None:
        theirs = {name: self.settings[key] for key, name in SAMPLER.items() if key in self.settings}
        theirs.setdefault("timestep_shift", self.settings.get("timestep_shift", self.kind().sampler.shift))
        steps = theirs.get("denoising_step_list")
        if isinstance(steps, list) and steps[-1:] == [0]:
            theirs["denoising_step_list"] = steps[:-1]  # as LongLive: a pass without noise makes nothing
        for name, value in official_changes(theirs).items():
            self.put(f"sampler.{name}", value)

    def sizes(self) -> None:
        names = {key: self.settings.get(key, "Wan2.1-T2V-1.3B") for key in ("model_kwargs.model_name", "real_name")}
        unknown = [f"{key}: {unknown_name('model', str(v), MODELS)}" for key, v in names.items() if v not in MODELS]
        raise_all(unknown)
        self.put("transformer", to_dict(SIZES[MODELS[names["model_kwargs.model_name"]]]()))
        self.put("text_encoder", to_dict(TextEncoderConfig.umt5_xxl()))
        self.put("teacher_size", MODELS[names["real_name"]])
        shape = self.settings.get("image_or_video_shape", [1, 21, 16, 60, 104])
        if not (isinstance(shape, list) and len(shape) == 5 and all(type(n) is int for n in shape) and shape[2] == 16):
            raise UserError(f"image_or_video_shape must be five numbers as in [1, 21, 16, 60, 104], got {shape!r}")
        self.put("sampler.height", shape[3] * SPATIAL_FACTOR)
        self.put("sampler.width", shape[4] * SPATIAL_FACTOR)

    def chunks(self) -> None:
        self.put("distillation.quirks", to_dict(Quirks.reference()))
        for key in ("real_guidance_scale", "guidance_scale"):
            if key in self.settings:
                self.put("distillation.guidance", self.number(key) + 1)
                break
        if not self.long and "num_training_frames" in self.settings:
            frames = self.number("num_training_frames")
            self.put("distillation.chunk_frames", frames)
            self.put("distillation.max_frames", frames)
            self.put("distillation.new_frames", min(frames, self.kind().distillation.new_frames))
        if "gradient_checkpointing" in self.settings:
            self.put("distillation.remat", "layer" if self.settings["gradient_checkpointing"] else "none")

    def batch(self) -> None:
        videos, each = self.number("total_batch_size", self.values["phase"]["batch_size"]), self.number("batch_size", 1)
        if not (each > 0 and videos % each == 0):
            raise UserError(
                f"total_batch_size {videos} does not split into streams of {each} (batch_size); make it a multiple"
            )
        self.put("phase.batch_size", videos)
        self.put("run.streams", videos // each)

    def optimizer(self) -> None:
        if self.adapted:
            self.put("lora_rank", self.number("adapter.rank", 16))
            self.put("lora_alpha", self.number("adapter.alpha") or self.values["lora_rank"])
            self.put("optimizer.ema", 0.0)
            idle = [key for key in ("ema_weight", "ema_start_step") if key in self.settings]
            self.elsewhere |= dict.fromkeys(idle, "adapters are not averaged, as in LongLive")
        else:
            self.put("lora_rank", 0)
            every = self.number("dfake_gen_update_ratio", self.kind().student_every)
            if every and "ema_start_step" in self.settings:  # of steps, ours of the student's updates
                self.put("optimizer.ema_start", -(-self.number("ema_start_step") // every))

    def run(self) -> None:
        if "mixed_precision" in self.settings:
            self.put("run.dtype", "bfloat16" if self.settings["mixed_precision"] else "float32")
        if "max_checkpoints" in self.settings:  # 0 is all: a run has no more than steps
            self.put("run.keep", self.number("max_checkpoints") or self.values["phase"]["steps"])
        if "vis_interval" in self.settings:
            self.put("run.validate_every", max(0, self.number("vis_interval")))
        project = self.settings.get("wandb_project")
        if isinstance(project, str) and not project.startswith("YOUR_"):
            self.put("run.wandb", project)
        elif "wandb_project" in self.settings:
            self.elsewhere["wandb_project"] = "run.wandb; the file has a placeholder"

    def prompts(self) -> None:
        keys = ("data_path", "switch_prompt_path") if self.long else ("data_path",)
        if "data_path" in self.settings:
            missing = [key for key in keys if key not in self.settings]
            if missing:
                raise UserError(f"{missing[0]} is missing; stage long needs the prompts that a video switches to")
            self.put("prompts", [self.settings[key] for key in keys])

    def switches(self) -> None:
        """Ours come at the start of any chunk but the first and the last; LongLive's are listed, and may be fewer."""
        distillation = replace(self.kind().distillation, **self.values["distillation"])
        if distillation.new_frames + 3 < distillation.chunk_frames:
            raise UserError(
                f"streaming_min_new_frame {distillation.new_frames} lets LongLive draw how many frames are new; here "
                f"it is one number, so give {distillation.chunk_frames - 3}"
            )
        if "switch_choices" in self.settings:
            choices, starts = self.settings["switch_choices"], distillation.switches
            odd = [frame for frame in choices if frame not in starts] if isinstance(choices, list) else [choices]
            if odd:
                raise UserError(
                    f"switch_choices has {odd}; a switch comes at a chunk's start: {', '.join(map(str, starts))}"
                )
            if set(choices) != set(starts):
                self.elsewhere["switch_choices"] = (
                    f"a switch comes at the start of any chunk but the first and the last, {starts[0]} to {starts[-1]}"
                )


def described_quirks() -> str:
    """The quirks that such a file switches on, for a line of the command."""
    ours, theirs = to_dict(Quirks()), to_dict(Quirks.reference())
    changed = ", ".join(f"{name} {value}" for name, value in theirs.items() if ours[name] != value)
    return f"the official code's quirks are on ({changed}); distillation.quirks changes them, docs/training.md says why"
