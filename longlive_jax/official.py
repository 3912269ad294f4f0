"""LongLive v1.0's YAML files, read as they are."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from longlive_jax.config import OFFICIAL_NAMES, SamplerConfig, official_changes, replace, unknown_name
from longlive_jax.errors import UserError
from longlive_jax.prompts import LATENTS_PER_SECOND
from longlive_jax.yaml_files import read_yaml

USED = (*OFFICIAL_NAMES, "global_sink", "use_infinite_attention", "num_output_frames", "seed", "switch_frame_indices")
"""Keys that say how a video is decoded."""

PERMISSIVE = SamplerConfig(window=-1, sink_frames=0, block_frames=1, warp=False)
"""What a file's settings are checked against: what it leaves open must not be what it is refused for."""

ELSEWHERE = {
    "model_name": "the checkpoint says it",
    "generator_ckpt": "longlive convert --generator",
    "lora_ckpt": "longlive convert --lora",
    "adapter": "longlive convert --lora, --lora-alpha",
    "use_ema": "longlive convert --generator-key generator_ema",
    "data_path": "longlive generate --prompts",
    "output_folder": "longlive generate --output",
    "num_samples": "run again with another --seed",
    "inference_iter": "every prompt of the file is made",
    "save_with_index": "outputs are named by prompt and seed",
}
"""Keys of inference files that have no say here, and where their affair is settled."""


@dataclasses.dataclass(frozen=True)
class OfficialRun:
    """What a v1.0 inference file says.

    Attributes:
      sampler: changes to `SamplerConfig`.
      seconds: length, from `num_output_frames` (latent frames).
      seed: of the noise.
      switch_seconds: from `switch_frame_indices` (latent frames).
      elsewhere: keys that were read and do nothing, with where their affair is settled.
    """

    sampler: dict[str, Any]
    seconds: float | None = None
    seed: int | None = None
    switch_seconds: tuple[float, ...] | None = None
    elsewhere: dict[str, str] = dataclasses.field(default_factory=dict)


def read_official(path: str | Path) -> OfficialRun:
    """Reads an inference YAML of LongLive v1.0.

    Raises:
      UserError: no such file, no YAML, or a key nobody knows (the nearest name is offered).
    """
    path = Path(path)
    loaded = read_yaml(path)
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: expected a table of settings as in LongLive's configs")
    if "distribution_loss" in loaded:
        raise UserError(
            f"{path}: this is a training file of LongLive's; longlive train init (or long) --config takes it"
        )
    model_kwargs = loaded.get("model_kwargs") or {}
    if not isinstance(model_kwargs, dict):
        raise UserError(f"{path}: model_kwargs must be a table of settings, got {model_kwargs!r}")
    settings = {k: v for k, v in loaded.items() if k != "model_kwargs"} | model_kwargs
    for key in settings:
        if key not in USED and key not in ELSEWHERE:
            raise UserError(f"{path}: {unknown_name('key', str(key), (*USED, *ELSEWHERE))}")
    try:
        sampler = official_changes(settings)
        replace(PERMISSIVE, **sampler)
        frames, seed = (_whole(key, settings.get(key)) for key in ("num_output_frames", "seed"))
        return OfficialRun(
            sampler=sampler,
            seconds=None if frames is None else frames / LATENTS_PER_SECOND,
            seed=seed,
            switch_seconds=_switch_seconds(settings.get("switch_frame_indices")),
            elsewhere={k: v for k, v in ELSEWHERE.items() if k in settings},
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _whole(key: str, value: Any) -> int | None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise UserError(f"{key} must be a whole number, got {value!r}")
    return value


def _switch_seconds(frames: Any) -> tuple[float, ...] | None:
    """Latent frames as LongLive writes them, "40, 80, 120" or a list, in seconds."""
    if frames is None:
        return None
    parts = frames if isinstance(frames, list) else str(frames).split(",")
    try:
        return tuple(int(str(part)) / LATENTS_PER_SECOND for part in parts)
    except ValueError:
        raise UserError(f"switch_frame_indices must be whole numbers, as in 40, 80, got {frames!r}") from None
