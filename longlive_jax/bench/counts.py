"""FLOPs that the model needs: two a multiplication and addition; products and convolutions only.

The transformer's by a formula, since a fused attention kernel hides its products from a count of the program; the VAE's
counted on its program. What is computed once a prompt (text keys and values) or a frame (time embedding) is left out of
the transformer's: together 0.03 % of a pass at full size.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

from longlive_jax import checkpoint
from longlive_jax.cache import Window
from longlive_jax.config import SPATIAL_FACTOR, SamplerConfig, TransformerConfig, VAEConfig
from longlive_jax.models.layers import structure
from longlive_jax.models.vae import VAE
from longlive_jax.training.flops import count_flops


def tokens_per_frame(cfg: TransformerConfig, sampler: SamplerConfig) -> int:
    rows, columns = sampler.height // SPATIAL_FACTOR, sampler.width // SPATIAL_FACTOR
    return rows // cfg.patch[1] * (columns // cfg.patch[2])


def transformer_pass(cfg: TransformerConfig, queries: int, keys: int) -> dict[str, float]:
    """FLOPs of one pass over `queries` tokens that attend `keys`, by kind; their own keys are among those."""
    d, per_patch = cfg.dim, math.prod(cfg.patch)
    layer = {
        "linears": queries * (8 * d * d + 4 * d * d + 4 * d * cfg.ffn_dim),  # q k v o, then q o of the prompt's
        "self_attention": 4 * queries * keys * d,
        "cross_attention": 4 * queries * cfg.text_length * d,
    }
    flops = {kind: float(cfg.num_layers * count) for kind, count in layer.items()}
    return flops | {"patches": 2.0 * queries * d * per_patch * (cfg.in_channels + cfg.out_channels)}


def block(cfg: TransformerConfig, sampler: SamplerConfig, window: Window) -> float:
    """FLOPs of a block in the steady state: every step and the clean pass, with the window full."""
    frame = tokens_per_frame(cfg, sampler)
    one = transformer_pass(cfg, window.block * frame, window.slots * frame)
    return (len(sampler.steps) + 1) * sum(one.values())


def recache(cfg: TransformerConfig, sampler: SamplerConfig, window: Window) -> float:
    """FLOPs of a recache once the video has outgrown the window: without the sink's frames if that is kept."""
    frame = tokens_per_frame(cfg, sampler)
    frames = window.ring if sampler.sink == "keep" and window.ring else window.slots
    return sum(transformer_pass(cfg, frames * frame, window.slots * frame).values())


def decode(cfg: VAEConfig, sampler: SamplerConfig, frames: int) -> float:
    """FLOPs of decoding `frames` latent frames in the middle of a video."""
    graph = structure(lambda: VAE(cfg, rngs=nnx.Rngs(0)))
    params = checkpoint.abstract_params("vae", cfg)
    size = sampler.height // SPATIAL_FACTOR, sampler.width // SPATIAL_FACTOR
    latents = jax.ShapeDtypeStruct((1, frames, *size, cfg.z_channels), jnp.float32)
    start = lambda params, latents: nnx.merge(graph, params).decode(latents, first=True)[1]
    later = lambda params, latents, cache: nnx.merge(graph, params).decode(latents, cache, first=False)[0]
    return count_flops(later, params, latents, jax.eval_shape(start, params, latents))
