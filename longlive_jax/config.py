"""Every size and setting of the project, as small frozen dataclasses.

One dataclass a part: the diffusion transformer, the VAE, the text encoder, the sampler. `ModelConfig` joins them and is
what `config.json` of a checkpoint folder holds. Presets are classmethods; derived values are properties.
The settings have names of their own; `OFFICIAL_NAMES` maps LongLive's own.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import sys
import types
import typing
from typing import Any

from longlive_jax.errors import UserError

FPS = 16
"""Pixel frames a second of video."""

TEMPORAL_FACTOR = 4
"""Pixel frames a latent frame (the first latent frame is one pixel frame)."""

SPATIAL_FACTOR = 8
"""Pixels a latent cell, each way."""

MAX_ABSOLUTE_FRAMES = 1024
"""Latent frames that absolute RoPE has positions for (official wan/modules/model.py, `rope_params(1024, ...)`)."""

MAX_LAYERS, MAX_SIZE = 1000, 2**24
"""No model has more layers, or a larger size of any other kind; Wan's largest are 40, and a vocabulary of 256384."""

WAN_LATENT_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
WAN_LATENT_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Sizes of the Wan diffusion transformer (official wan/modules/causal_model.py).

    Attributes:
      dim: width D of the residual stream.
      ffn_dim: hidden width of the feed-forward layers.
      num_layers: number of blocks.
      num_heads: attention heads; `dim / num_heads` must be even.
      in_channels, out_channels: latent channels.
      patch: latent cells a token, (frames, rows, columns).
      text_dim: width of the prompt embeddings.
      text_length: tokens a prompt is padded to; padding is attended, so this is part of the model.
      time_dim: width of the sinusoidal time embedding.
      eps: of every norm.
      rope_theta: base of the rotary frequencies.
    """

    dim: int
    ffn_dim: int
    num_layers: int
    num_heads: int
    in_channels: int = 16
    out_channels: int = 16
    patch: tuple[int, int, int] = (1, 2, 2)
    text_dim: int = 4096
    text_length: int = 512
    time_dim: int = 256
    eps: float = 1e-6
    rope_theta: float = 10000.0

    def __post_init__(self):
        _check_sizes("transformer", self)
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise UserError(f"transformer: dim {self.dim} does not split into {self.num_heads} heads of even width")
        if self.patch[0] != 1:
            raise UserError(f"transformer: patch {self.patch} spans frames; only 1 frame a token is supported")

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @classmethod
    def sprites(cls) -> TransformerConfig:
        return cls(dim=128, ffn_dim=384, num_layers=6, num_heads=4, text_dim=96, text_length=24)

    @classmethod
    def t2v_1_3b(cls) -> TransformerConfig:
        return cls(dim=1536, ffn_dim=8960, num_layers=30, num_heads=12)

    @classmethod
    def t2v_14b(cls) -> TransformerConfig:
        return cls(dim=5120, ffn_dim=13824, num_layers=40, num_heads=40)


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Sizes of the causal video VAE (official wan/modules/vae.py).

    Attributes:
      base_width: channels of the finest level.
      multipliers: channels of each level, over `base_width`; each step between levels halves the picture.
      res_blocks: residual blocks a level in the encoder; the decoder has one more.
      temporal: whether time is halved too, for each step between levels (encoder order).
      z_channels: latent channels.
      latent_mean, latent_std: normalisation of the latents, a number a channel.
    """

    base_width: int = 96
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    res_blocks: int = 2
    temporal: tuple[bool, ...] = (False, True, True)
    z_channels: int = 16
    latent_mean: tuple[float, ...] = WAN_LATENT_MEAN
    latent_std: tuple[float, ...] = WAN_LATENT_STD

    def __post_init__(self):
        _check_sizes("vae", self)
        if len(self.temporal) != len(self.multipliers) - 1:
            raise UserError(f"vae: temporal needs {len(self.multipliers) - 1} entries, got {len(self.temporal)}")
        if not len(self.latent_mean) == len(self.latent_std) == self.z_channels:
            raise UserError(f"vae: latent_mean and latent_std need {self.z_channels} entries each")
        spatial, temporal = 2 ** len(self.temporal), 2 ** sum(self.temporal)
        if (spatial, temporal) != (SPATIAL_FACTOR, TEMPORAL_FACTOR):
            raise UserError(f"vae: compresses {spatial}x in space and {temporal}x in time; 8x and 4x are supported")

    @classmethod
    def sprites(cls) -> VAEConfig:
        return cls(base_width=16, latent_mean=(0.0,) * 16, latent_std=(1.0,) * 16)

    @classmethod
    def wan(cls) -> VAEConfig:
        return cls()


@dataclasses.dataclass(frozen=True)
class TextEncoderConfig:
    """Sizes of the umT5 encoder (official wan/modules/t5.py).

    Attributes:
      vocab_size: rows of the token embedding.
      dim: width, and the width of the prompt embeddings.
      attention_dim: width of all heads together.
      ffn_dim: hidden width of the gated feed-forward layers.
      num_heads, num_layers: heads and blocks.
      num_buckets, max_distance: of the relative position bias.
      eps: of every norm.
    """

    vocab_size: int = 256384
    dim: int = 4096
    attention_dim: int = 4096
    ffn_dim: int = 10240
    num_heads: int = 64
    num_layers: int = 24
    num_buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6

    def __post_init__(self):
        _check_sizes("text encoder", self)
        if self.attention_dim % self.num_heads:
            raise UserError(f"text encoder: width {self.attention_dim} does not split into {self.num_heads} heads")

    @classmethod
    def sprites(cls) -> TextEncoderConfig:
        return cls(vocab_size=256, dim=96, attention_dim=96, ffn_dim=192, num_heads=4, num_layers=2)

    @classmethod
    def umt5_xxl(cls) -> TextEncoderConfig:
        return cls()


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """How a video is decoded: the defaults are LongLive 1.0's (configs/longlive_inference.yaml).

    Attributes:
      height: of the video, in pixels.
      width: of the video, in pixels.
      window: latent frames attended, sink and current block included; -1 for all of the past.
      sink_frames: latent frames at the start of the video that stay attended.
      block_frames: latent frames denoised together.
      steps: the few-step list, in thousandths of noise before warping; strictly falling.
      warp: whether `steps` index the shifted table (as LongLive) or are timesteps themselves.
      shift: timestep shift of the flow-matching schedule.
      solver: what a step hands to the next: `renoise`, its x0 with fresh noise, which few-step models are made for; or
        `euler`, a step along the flow, for models that are not.
      context_noise: timestep given to the clean pass that writes the cache.
      switch: what happens to the cache when the prompt changes: `recache`, `keep` or `clear`.
      sink: whether a recache leaves the sink alone (`keep`) or makes a new one (`refresh`).
      rope: `absolute`, `relative`, or `auto` (relative past 1024 latent frames).
    """

    height: int = 480
    width: int = 832
    window: int = 12
    sink_frames: int = 3
    block_frames: int = 3
    steps: tuple[float, ...] = (1000.0, 750.0, 500.0, 250.0)
    warp: bool = True
    shift: float = 5.0
    solver: str = "renoise"
    context_noise: float = 0.0
    switch: str = "recache"
    sink: str = "keep"
    rope: str = "auto"

    def __post_init__(self):
        check_choice("solver", self.solver, ("renoise", "euler"))
        check_choice("switch", self.switch, ("recache", "keep", "clear"))
        check_choice("sink", self.sink, ("keep", "refresh"))
        check_choice("rope", self.rope, ("auto", "absolute", "relative"))
        for name, size in (("height", self.height), ("width", self.width)):
            if size < 1:
                raise UserError(f"{name} is {size}; at least 1 pixel is needed")
        if self.block_frames < 1:
            raise UserError(f"block_frames is {self.block_frames}; at least 1 latent frame is needed")
        if self.sink_frames < 0:
            raise UserError(f"sink_frames is {self.sink_frames}; 0 or more latent frames are allowed")
        least = self.sink_frames + self.block_frames
        if self.window != -1 and self.window < least:
            raise UserError(
                f"window is {self.window} latent frames; it must hold the sink and one block, so at least {least} "
                f"(or -1 for all of the past)"
            )
        if not self.steps or any(not 0 <= s <= 1000 for s in self.steps):
            raise UserError(f"steps {list(self.steps)} must be one or more numbers from 0 to 1000")
        if any(a <= b for a, b in zip(self.steps, self.steps[1:])):
            raise UserError(f"steps {list(self.steps)} must fall, as in 1000 750 500 250")
        if self.warp and any(s != int(s) for s in self.steps):
            raise UserError(f"steps {list(self.steps)} index a table of 1000 and must be whole; or set warp to false")
        if not self.shift > 0:
            raise UserError(f"shift is {self.shift}; it must be above 0")
        if math.isinf(self.shift):
            raise UserError(f"shift is {self.shift}; it must be finite")
        if not 0 <= self.context_noise <= 1000:
            raise UserError(f"context_noise is {self.context_noise}; timesteps from 0 to 1000 are allowed")

    @classmethod
    def sprites(cls) -> SamplerConfig:
        return cls(height=64, width=64)

    def check_size(self, patch: tuple[int, int, int]) -> None:
        """Refuses a picture size that does not divide into latent cells and tokens, naming the nearest that does."""
        for name, size, cells in (("height", self.height, patch[1]), ("width", self.width, patch[2])):
            unit = SPATIAL_FACTOR * cells
            if size < unit or size % unit:
                low, high = size // unit * unit, math.ceil(size / unit) * unit
                near = " or ".join(str(s) for s in (low, high) if s >= unit)
                raise UserError(f"{name} {size} is not a multiple of {unit} pixels; the nearest that is: {near}")


@dataclasses.dataclass(frozen=True)
class ProgramConfig:
    """How a video's programs are built. Changes time and memory; numbers by rounding only.

    Attributes:
      unroll_layers: the layers one after another in the program, each with arrays of its own, instead of a loop over
        stacked ones. Nothing is sliced or copied, but compiling takes longer. None: on a GPU.
      early_frames: a stream hands a block's frames out before the block's clean pass. None: on an accelerator.
      split_kv: parts in which a block's self-attention goes through the keys; see `models.attention`.
      vae_conv: how the VAE's causal convolutions are computed, "2d" or "3d"; see `models.vae`. None: "3d" on a GPU.
      keep_text_encoder: its weights stay on the device from the start, instead of being moved there for every new
        prompt. None: on an accelerator, if they take no more than half of what the other networks leave free.
    """

    unroll_layers: bool | None = None
    early_frames: bool | None = None
    split_kv: int = 1
    vae_conv: str | None = None
    keep_text_encoder: bool | None = None

    def __post_init__(self):
        if self.vae_conv is not None:
            check_choice("vae_conv", self.vae_conv, ("2d", "3d"))
        if self.split_kv < 1:
            raise UserError(f"split_kv is {self.split_kv}; 1 or more parts are needed")

    def decided(self, backend: str) -> ProgramConfig:
        """With the choices made that were left to the backend ("cpu", "gpu", "tpu")."""
        choose = lambda asked, default: default if asked is None else asked
        return dataclasses.replace(
            self,
            unroll_layers=choose(self.unroll_layers, backend == "gpu"),
            early_frames=choose(self.early_frames, backend != "cpu"),
            vae_conv=choose(self.vae_conv, "3d" if backend == "gpu" else "2d"),
        )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A whole model: what `config.json` of a checkpoint folder describes."""

    transformer: TransformerConfig
    vae: VAEConfig
    text_encoder: TextEncoderConfig | None
    sampler: SamplerConfig

    def __post_init__(self):
        if self.text_encoder is not None and self.text_encoder.dim != self.transformer.text_dim:
            raise UserError(
                f"the text encoder gives {self.text_encoder.dim} numbers a token, "
                f"the transformer expects {self.transformer.text_dim}"
            )
        if self.vae.z_channels != self.transformer.in_channels:
            raise UserError(
                f"the VAE has {self.vae.z_channels} latent channels, the transformer {self.transformer.in_channels}"
            )

    @classmethod
    def sprites(cls) -> ModelConfig:
        return cls(
            TransformerConfig.sprites(), VAEConfig.sprites(), TextEncoderConfig.sprites(), SamplerConfig.sprites()
        )

    @classmethod
    def t2v_1_3b(cls) -> ModelConfig:
        return cls(TransformerConfig.t2v_1_3b(), VAEConfig.wan(), TextEncoderConfig.umt5_xxl(), SamplerConfig())

    @classmethod
    def t2v_14b(cls) -> ModelConfig:
        return cls(TransformerConfig.t2v_14b(), VAEConfig.wan(), TextEncoderConfig.umt5_xxl(), SamplerConfig())


OFFICIAL_NAMES = {
    "local_attn_size": "window",
    "sink_size": "sink_frames",
    "num_frame_per_block": "block_frames",
    "denoising_step_list": "steps",
    "warp_denoising_step": "warp",
    "timestep_shift": "shift",
    "context_noise": "context_noise",
}
"""LongLive v1.0's setting -> ours, where only the name differs. `official_changes` has the rest."""


def official_changes(settings: dict[str, Any]) -> dict[str, Any]:
    """Changes to a `SamplerConfig` from settings under LongLive v1.0's names; other keys are ignored."""
    changes = {ours: settings[theirs] for theirs, ours in OFFICIAL_NAMES.items() if theirs in settings}
    if "global_sink" in settings:
        changes["sink"] = "keep" if settings["global_sink"] else "refresh"
    if settings.get("use_infinite_attention"):
        changes["rope"] = "relative"
    return changes


def replace(config, **changes):
    """`dataclasses.replace` that offers the nearest name for an unknown one and turns lists into tuples."""
    known = [f.name for f in dataclasses.fields(config)]
    for name in changes:
        if name not in known:
            raise UserError(unknown_name("setting", name, known))
    return from_dict(type(config), {**to_dict(config), **changes})


def unknown_name(kind: str, name: str, known) -> str:
    """The message for a name nobody knows: the nearest known one, or all of them."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(sorted(known))}"
    return f"unknown {kind} '{name}'; {hint}"


def to_dict(config) -> dict[str, Any]:
    """A config as plain dicts, lists and numbers, ready for JSON."""
    return dataclasses.asdict(config)


def from_dict(cls, values: dict[str, Any], where: str = ""):
    """Builds a config dataclass from plain JSON values; unknown, missing or wrongly typed keys are refused by name.

    Args:
      cls: the dataclass.
      values: what `to_dict` gave, perhaps edited by hand.
      where: prefix for messages, such as "config.json: sampler".
    """
    prefix = f"{where}: " if where else ""
    if not isinstance(values, dict):
        raise UserError(f"{prefix}expected a table of settings, got {values!r}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for name in values:
        if name not in fields:
            raise UserError(prefix + unknown_name("key", name, fields))
    missing = [n for n, f in fields.items() if n not in values and f.default is dataclasses.MISSING]
    if missing:
        raise UserError(f"{prefix}missing {', '.join(missing)}")
    built = {name: _coerce(hints[name], value, f"{prefix}{name}") for name, value in values.items()}
    try:
        return cls(**built)
    except UserError as error:
        raise UserError(f"{prefix}{error}") from None


def _coerce(kind, value, name: str):
    """One JSON value as the annotated type; ints pass for floats, lists for tuples."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        options = [k for k in typing.get_args(kind) if k is not type(None)]
        return None if value is None else _coerce(options[0], value, name)
    if dataclasses.is_dataclass(kind):
        return value if isinstance(value, kind) else from_dict(kind, value, name)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{name} must be a list, got {value!r}")
        args = typing.get_args(kind)
        item_kinds = [args[0]] * len(value) if args[-1] is Ellipsis else args
        if len(item_kinds) != len(value):
            raise UserError(f"{name} needs {len(item_kinds)} entries, got {len(value)}")
        return tuple(_coerce(k, v, name) for k, v in zip(item_kinds, value))
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if abs(value) > sys.float_info.max and not isinstance(value, float):  # JSON's whole numbers have any length
            raise UserError(f"{name} is too large a number")
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(f"{name} must be {kind.__name__}, got {value!r}")
    return value


def _check_sizes(part: str, config) -> None:
    """Refuses sizes of no model. Settings come out of files: with a damaged one, planning alone would take for ever."""
    for name, value in vars(config).items():
        most = MAX_LAYERS if name in ("num_layers", "res_blocks") else MAX_SIZE
        least = 0 if name == "res_blocks" else 1
        for size in value if isinstance(value, tuple) else (value,):
            if type(size) is int and not least <= size <= most:
                raise UserError(f"{part}: {name} is {value}; {least} to {most} is possible")
            if type(size) is float and not math.isfinite(size):  # JSON knows NaN and Infinity
                raise UserError(f"{part}: {name} is {value}; it must be finite")


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Refuses a value that is not among those allowed, naming the nearest."""
    if value not in allowed:
        raise UserError(unknown_name(f"{name} value", str(value), allowed))
