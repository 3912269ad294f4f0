"""Sizes of a model, read off its config.json and the shapes of its weights: nothing is assumed to be 1.3B.

Each function takes the shapes by original name. What the shapes cannot say (head count, prompt length) is in Wan's
config.json; what both say must agree.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from longlive_jax.config import TextEncoderConfig, TransformerConfig, VAEConfig, from_dict
from longlive_jax.errors import UserError
from longlive_jax.json_files import read_json

Shapes = dict[str, tuple[int, ...]]


class _Shapes:
    """Looks up shapes; a tensor that is not there or has the wrong number of axes is a UserError with its name."""

    def __init__(self, shapes: Shapes, where: str):
        self.shapes, self.where = shapes, where

    def __call__(self, name: str, axes: int) -> tuple[int, ...]:
        if name not in self.shapes:
            raise UserError(f"{self.where} lacks {name}, so its sizes are unknown; is it the right file?")
        shape = self.shapes[name]
        if len(shape) != axes or 0 in shape:
            raise UserError(f"{self.where}: {name} is {list(shape)}, expected {axes} axes; is it the right file?")
        return shape


def count(names: Iterable[str], prefix: str) -> int:
    """Length of the list of modules called `prefix`.0, `prefix`.1, ..."""
    numbers = [int(m[1]) for name in names if (m := re.match(rf"{re.escape(prefix)}\.(\d{{1,6}})\.", name))]
    return max(numbers, default=-1) + 1


def read_settings(path: Path) -> dict[str, Any]:
    """Wan's config.json. Raises UserError if it is missing, no JSON, or lacks the head count."""
    settings = read_json(path, "it says how many heads there are: copy or download it again")
    if type(settings.get("num_heads")) is not int or settings["num_heads"] < 1:
        raise UserError(f"{path} has no num_heads; use the config.json of the model's folder")
    if settings.get("model_type", "t2v") != "t2v":
        raise UserError(f"{path}: model_type is '{settings['model_type']}'; only t2v (text to video) is supported")
    return settings


def transformer_sizes(shapes: Shapes, settings: dict[str, Any], where: str) -> TransformerConfig:
    """Sizes of the DiT; those that config.json repeats are compared."""
    shape = _Shapes(shapes, where)
    dim, channels, *patch = shape("patch_embedding.weight", 5)
    read = {
        "dim": dim,
        "ffn_dim": shape("blocks.0.ffn.0.weight", 2)[0],
        "num_layers": count(shapes, "blocks"),
        "in_dim": channels,
        "out_dim": shape("head.head.weight", 2)[0] // (patch[0] * patch[1] * patch[2]),
        "freq_dim": shape("time_embedding.0.weight", 2)[1],
        "text_dim": shape("text_embedding.0.weight", 2)[1],
        "patch_size": list(patch),
    }
    for name, value in read.items():
        if name in settings and settings[name] != value:
            raise UserError(f"{where}: {name} is {value}, config.json says {settings[name]!r}; these are two models")
    values = {
        "dim": dim,
        "ffn_dim": read["ffn_dim"],
        "num_layers": read["num_layers"],
        "num_heads": settings["num_heads"],
        "in_channels": channels,
        "out_channels": read["out_dim"],
        "patch": patch,
        "text_dim": read["text_dim"],
        "text_length": settings.get("text_len", 512),
        "time_dim": read["freq_dim"],
        "eps": settings.get("eps", 1e-6),
    }
    return from_dict(TransformerConfig, values, f"{where} and config.json")


def wan_settings(cfg: TransformerConfig) -> dict[str, Any]:
    """Wan's own config.json for these sizes: its keys and no others, which its code would warn of."""
    return {
        "_class_name": "WanModel", "model_type": "t2v", "dim": cfg.dim, "eps": cfg.eps, "ffn_dim": cfg.ffn_dim,
        "freq_dim": cfg.time_dim, "in_dim": cfg.in_channels, "num_heads": cfg.num_heads, "num_layers": cfg.num_layers,
        "out_dim": cfg.out_channels, "text_len": cfg.text_length,
    }  # fmt: skip


def vae_sizes(shapes: Shapes, where: str) -> VAEConfig:
    """Sizes of the VAE, by walking its encoder: residual blocks of a level, then the step to the next.

    The normalisation of the latents is in no file; it is Wan 2.1's, known for 16 channels.
    """
    shape = _Shapes(shapes, where)
    base = shape("encoder.conv1.weight", 5)[0]
    levels: list[list[int]] = [[]]
    temporal = []
    for i in range(count(shapes, "encoder.downsamples")):
        layer = f"encoder.downsamples.{i}"
        if f"{layer}.resample.1.weight" in shapes:
            temporal.append(f"{layer}.time_conv.weight" in shapes)
            levels.append([])
        else:
            levels[-1].append(shape(f"{layer}.residual.2.weight", 5)[0])
    if not all(levels) or len({len(level) for level in levels}) > 1 or any(len(set(level)) > 1 for level in levels):
        raise UserError(f"{where} has no regular levels (channels {levels}); is it a Wan 2.1 VAE?")
    if any(level[0] % base for level in levels):
        raise UserError(f"{where}: channels {levels} are no multiples of the base width {base}; is it a Wan 2.1 VAE?")
    channels = shape("conv2.weight", 5)[0]
    if channels != VAEConfig.z_channels:
        raise UserError(f"{where} has {channels} latent channels; Wan 2.1's {VAEConfig.z_channels} are supported")
    values = {
        "base_width": base,
        "multipliers": [level[0] // base for level in levels],
        "res_blocks": len(levels[0]),
        "temporal": temporal,
    }
    return from_dict(VAEConfig, values, where)


def text_encoder_sizes(shapes: Shapes, where: str) -> TextEncoderConfig:
    """Sizes of umT5; the position bias has a column a head."""
    shape = _Shapes(shapes, where)
    vocab_size, dim = shape("token_embedding.weight", 2)
    buckets, heads = shape("blocks.0.pos_embedding.embedding.weight", 2)
    values = {
        "vocab_size": vocab_size,
        "dim": dim,
        "attention_dim": shape("blocks.0.attn.q.weight", 2)[0],
        "ffn_dim": shape("blocks.0.ffn.fc1.weight", 2)[0],
        "num_heads": heads,
        "num_layers": count(shapes, "blocks"),
        "num_buckets": buckets,
    }
    return from_dict(TextEncoderConfig, values, where)
