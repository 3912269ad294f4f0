"""How much memory a video takes, before anything is started, so that too much is refused instead of half done."""

from __future__ import annotations

import math
import os

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from longlive_jax import checkpoint, sharding
from longlive_jax.cache import Window
from longlive_jax.config import SPATIAL_FACTOR, TEMPORAL_FACTOR, ModelConfig, SamplerConfig
from longlive_jax.errors import UserError
from longlive_jax.models.attention import LOGITS_LIMIT
from longlive_jax.models.quantization import INT8, SCALE

UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def weights(
    config: ModelConfig, dtype, quantization: dict[str, str] | None = None, mesh: Mesh | None = None
) -> dict[str, int]:
    """Bytes of the parameters, by network; those of the parts in `quantization` in int8 where they can be.

    On a mesh all copies count: of what is not cut up every device has one. The text encoder is on one device.
    """
    parts = {"transformer": "transformer", "vae": "VAE"}
    parts |= {"text_encoder": "text encoder"} if config.text_encoder is not None else {}
    found = {}
    for part, name in parts.items():
        params = checkpoint.abstract_params(part, getattr(config, part), (quantization or {}).get(part))
        leaves = jax.tree_util.tree_leaves_with_path(params)
        size = lambda path, leaf: leaf.dtype.itemsize if path[-1].key in (INT8, SCALE) else jnp.dtype(dtype).itemsize
        copies = lambda path, leaf: 1 if mesh is None or part == "text_encoder" else _copies(path, leaf, mesh)  # noqa: B023
        found[name] = sum(math.prod(leaf.shape) * size(path, leaf) * copies(path, leaf) for path, leaf in leaves)
    return found


def _copies(path, leaf, mesh: Mesh) -> int:
    """On how many devices the same part of a parameter lies."""
    spec = sharding.param_spec("/".join(str(p.key) for p in path), leaf.shape, mesh)
    return mesh.size // math.prod(mesh.shape[axis] for axis in spec if axis is not None)


def estimate(
    config: ModelConfig, sampler: SamplerConfig, batch: int, num_frames: int, dtype, *, switches: bool = False
) -> dict[str, int]:
    """Bytes that videos need besides the weights, by what needs them.

    Args:
      config, sampler: what is run.
      batch: videos at once.
      num_frames: latent frames of a video; matters only when the window remembers all.
      dtype: of weights, activations and cache.
      switches: whether the prompt changes: a recache computes all frames of the window at once.
    """
    size, cfg = jnp.dtype(dtype).itemsize, config.transformer
    rows, columns = sampler.height // SPATIAL_FACTOR, sampler.width // SPATIAL_FACTOR
    tokens = rows // cfg.patch[1] * (columns // cfg.patch[2])
    slots = Window.of(sampler, num_frames).slots
    queries = (slots if switches and sampler.switch == "recache" else sampler.block_frames) * tokens
    pixels = batch * TEMPORAL_FACTOR * sampler.block_frames * sampler.height * sampler.width
    attention = 0
    if jax.default_backend() == "cpu" or size == 4:  # logits are built there, in float32, and their softmax
        attention = 2 * min(batch * cfg.num_heads * queries * slots * tokens * 4, LOGITS_LIMIT)
    return {
        "KV cache": 2 * cfg.num_layers * batch * slots * tokens * cfg.dim * size,
        "prompt keys and values": 2 * cfg.num_layers * batch * cfg.text_length * cfg.dim * size,
        "transformer activations": batch * queries * (cfg.ffn_dim + 8 * cfg.dim) * size + attention,
        # Widest level of the decoder: a convolution's input, output and padded copy, and the caches of all levels.
        "VAE activations": pixels * config.vae.base_width * size * 6,
    }


def available(mesh: Mesh | None = None) -> int | None:
    """Free bytes on the device, or on all devices of a mesh together if each has what the fullest has; None where
    nobody says."""
    devices = jax.devices()[:1] if mesh is None else list(mesh.devices.flat)
    if devices[0].platform != "cpu":
        stats = [device.memory_stats() or {} for device in devices]
        if all("bytes_limit" in s for s in stats):
            return len(stats) * min(s["bytes_limit"] - s.get("bytes_in_use", 0) for s in stats)
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else None


def check_weights(
    config: ModelConfig, dtype, mesh: Mesh | None = None, quantization: dict[str, str] | None = None
) -> None:
    """Refuses a checkpoint that does not fit the memory, before it is read."""
    parts, free = weights(config, dtype, quantization, mesh), available(mesh)
    if free is not None and sum(parts.values()) > free:
        ways = ["bfloat16"] * (jnp.dtype(dtype).itemsize > 2) + [f"quantize {INT8}"] * (not quantization)
        smaller = f"use {' or '.join(ways)}, or " if ways else ""
        raise UserError(
            f"the weights need {describe(parts)}{_where(mesh)}, but only {readable(free)} are free; {smaller}"
            + ("run where there is more" if mesh is None else "give the mesh a larger fsdp")
        )


def _where(mesh: Mesh | None) -> str:
    return "" if mesh is None else f" with all copies on {mesh.size} devices"


def check(
    config: ModelConfig,
    sampler: SamplerConfig,
    batch: int,
    num_frames: int,
    dtype,
    mesh: Mesh | None = None,
    *,
    switches: bool = False,
) -> None:
    """Refuses videos that do not fit beside the weights. Arguments as `estimate`'s.

    The weights are on the device already, but for those of a text encoder that stays on the host.

    Raises:
      UserError: says how much is needed for what, and what to make smaller.
    """
    parts, free = estimate(config, sampler, batch, num_frames, dtype, switches=switches), available(mesh)
    if mesh is not None:
        videos, others = mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["context"] * mesh.shape["tensor"]
        # A batch that does not divide is whole on every device; the VAE is not cut within a video.
        copies = 1 if batch % videos == 0 else videos
        parts = {name: size * copies * (others if name.startswith("VAE") else 1) for name, size in parts.items()}
    if free is not None and sum(parts.values()) > free:
        smaller = "" if jnp.dtype(dtype).itemsize <= 2 else ", or use bfloat16"
        raise UserError(
            f"{describe(parts)} are needed{_where(mesh)}, but only {readable(free)} are free; make the picture "
            f"({sampler.height} x {sampler.width}), the window ({Window.of(sampler, num_frames).slots} latent frames) "
            f"or the batch ({batch}) smaller{smaller}"
        )


def describe(parts: dict[str, int]) -> str:
    """ "7.2 GiB (KV cache 6.9 GiB, VAE activations 310.0 MiB)"."""
    listed = ", ".join(f"{name} {readable(size)}" for name, size in parts.items() if size)
    return f"{readable(sum(parts.values()))} ({listed})"


def readable(size: int) -> str:
    """Bytes in the unit that suits them, from KiB to GiB."""
    unit, name = next((u for u in UNITS if size >= u[0]), UNITS[-1])
    return f"{size / unit:.1f} {name}"
