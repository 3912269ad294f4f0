"""How much memory a video takes, before anything is started, so that too much is refused instead of half done."""

from __future__ import annotations

import math
import os

import jax
import jax.numpy as jnp
from flax import nnx

from longlive_jax.cache import Window
from longlive_jax.config import SPATIAL_FACTOR, TEMPORAL_FACTOR, ModelConfig, SamplerConfig
from longlive_jax.errors import UserError
from longlive_jax.models.transformer import WanTransformer
from longlive_jax.models.vae import VAE

GIB = 2**30


def count_params(make) -> int:
    """Parameters of a network, counted; allocates nothing."""
    return sum(math.prod(a.shape) for a in jax.tree.leaves(nnx.state(nnx.eval_shape(make))))


def estimate(config: ModelConfig, sampler: SamplerConfig, batch: int, num_frames: int, dtype) -> dict[str, int]:
    """Bytes on the device, by what needs them.

    Args:
      config, sampler: what is run.
      batch: videos at once.
      num_frames: latent frames of a video; matters only when the window remembers all.
      dtype: of weights, activations and cache.
    """
    size, cfg = jnp.dtype(dtype).itemsize, config.transformer
    rows, columns = sampler.height // SPATIAL_FACTOR, sampler.width // SPATIAL_FACTOR
    tokens = rows // cfg.patch[1] * (columns // cfg.patch[2])
    slots = Window.of(sampler, num_frames).slots
    queries = sampler.block_frames * tokens
    pixels = batch * TEMPORAL_FACTOR * sampler.block_frames * sampler.height * sampler.width
    attention = 0
    if jax.default_backend() == "cpu" or size == 4:  # logits are built there, in float32
        attention = 2 * batch * cfg.num_heads * queries * slots * tokens * 4
    weights = count_params(lambda: WanTransformer(cfg, rngs=nnx.Rngs(0))) + count_params(
        lambda: VAE(config.vae, rngs=nnx.Rngs(0))
    )
    return {
        "weights": weights * size,
        "KV cache": 2 * cfg.num_layers * batch * slots * tokens * cfg.dim * size,
        "prompt keys and values": 2 * cfg.num_layers * batch * cfg.text_length * cfg.dim * size,
        "transformer activations": batch * queries * (cfg.ffn_dim + 8 * cfg.dim) * size + attention,
        # Widest level of the decoder: a convolution's input, output and padded copy, and the caches of all levels.
        "VAE activations": pixels * config.vae.base_width * size * 6,
    }


def available() -> int | None:
    """Free bytes on the device, or None where nobody says."""
    device = jax.devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else None


def check(
    config: ModelConfig, sampler: SamplerConfig, batch: int, num_frames: int, dtype, *, loaded: bool = False
) -> dict[str, int]:
    """The estimate, if it fits.

    Args:
      loaded: the weights are on the device already, so they need no more.

    Raises:
      UserError: it does not; says how much is needed for what, and what to make smaller.
    """
    parts, free = estimate(config, sampler, batch, num_frames, dtype), available()
    if loaded:
        parts["weights"] = 0
    need = sum(parts.values())
    if free is not None and need > free:
        raise UserError(
            f"{describe(parts)} are needed, but only {free / GIB:.1f} GiB are free; make the picture, the window "
            f"({Window.of(sampler, num_frames).slots} latent frames) or the batch ({batch}) smaller, or use bfloat16"
        )
    return parts


def describe(parts: dict[str, int]) -> str:
    """ "7.2 GiB (weights 2.7, KV cache 3.2, ...)"."""
    listed = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items() if size)
    return f"{sum(parts.values()) / GIB:.1f} GiB ({listed})"
