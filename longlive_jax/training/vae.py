"""Training the VAE of a small world: stills first, then clips.

L1 reconstruction and a small KL term, AdamW. Stills need a third of the work a frame, so the picture is learnt there;
`inflate` then starts the clips from a network that treats every frame alone.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray, UInt8

from longlive_jax.models.vae import VAE, Downsample, Upsample


def sprite_weight(video: Float[Array, "b t h w 3"], emphasis: float) -> Float[Array, "b t h w 1"]:
    """1 for the background of the sprites world, 1 + `emphasis` for what is within `AROUND` pixels of a sprite.

    A sprite is 3 to 11 % of the picture: without a weight the background is learnt to the last bit while yellow and
    orange, or a square and a circle, stay the same. The pixels around it count as much: were they cheaper, whatever
    lies between the points of a star would best be painted over. A sprite is what differs from the median of its row.
    """
    return 1 + emphasis * _dilated(_sprite(video), AROUND)


AROUND = 2
"""Pixels."""


def _sprite(video: Float[Array, "b t h w 3"]) -> Float[Array, "b t h w 1"]:
    background = jnp.median(video, axis=3, keepdims=True)
    return (jnp.max(jnp.abs(video - background), axis=-1, keepdims=True) > 0.1).astype(jnp.float32)


def _dilated(mask: Float[Array, "b t h w 1"], pixels: int) -> Float[Array, "b t h w 1"]:
    size = 2 * pixels + 1
    return jax.lax.reduce_window(mask, 0.0, jax.lax.max, (1, 1, size, size, 1), (1, 1, 1, 1, 1), "SAME")


def vae_loss(
    vae: VAE,
    frames: UInt8[Array, "b t h w 3"],
    key: PRNGKeyArray,
    *,
    kl_weight: float,
    emphasis: float = 0.0,
    train_encoder: bool = True,
    dtype: str = "float32",
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Weighted mean absolute error of the reconstruction in [-1, 1] plus `kl_weight` times the mean KL a latent number.

    Args:
      vae: trained.
      frames: clips.
      key: for the posterior's sample.
      kl_weight: of the KL term.
      emphasis: see `sprite_weight`.
      train_encoder: whether there is a gradient to the latents.
      dtype: of activations; latents' statistics, sampling and errors are float32.

    Returns:
      The loss; and {"l1", "kl", "sprite"}, the unweighted error of all pixels, the KL, and the error of the sprite.
    """
    video = frames.astype(jnp.float32) / 127.5 - 1
    mean, log_variance, _ = vae.moments(video.astype(dtype))
    mean, log_variance = mean.astype(jnp.float32), jnp.clip(log_variance.astype(jnp.float32), -20, 10)
    noise = jax.random.normal(key, mean.shape)
    z = mean + jnp.exp(log_variance / 2) * noise
    if not train_encoder:
        z = jax.lax.stop_gradient(z)
    cfg = vae.cfg
    normalised = (z - jnp.asarray(cfg.latent_mean)) / jnp.asarray(cfg.latent_std)
    pixels, _ = vae.decode(normalised.astype(dtype))
    pixels = pixels.astype(jnp.float32)
    error, weight = jnp.mean(jnp.abs(pixels - video), axis=-1, keepdims=True), sprite_weight(video, emphasis)
    sprite = _sprite(video)
    kl = jnp.mean(jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance) / 2
    metrics = {"l1": jnp.mean(error), "kl": kl, "sprite": jnp.sum(error * sprite) / jnp.maximum(jnp.sum(sprite), 1)}
    return jnp.sum(error * weight) / jnp.sum(weight) + kl_weight * kl, metrics


def inflate(vae: VAE) -> VAE:
    """Makes time do nothing, in place: convolutions see the newest frame only, changes of frame rate repeat or skip.

    Right after initialisation this lets training on stills carry over to clips, as Wan's VAE grew from an image VAE.
    """
    for _, module in nnx.iter_modules(vae):
        if isinstance(module, (Upsample, Downsample)) and module.time_conv is not None:
            kernel = module.time_conv.kernel
            identity = jnp.eye(kernel.shape[3])
            copies = kernel.shape[4] // kernel.shape[3]
            kernel.set_value(jnp.zeros(kernel.shape).at[-1, 0, 0].set(jnp.tile(identity, (1, copies))))
        elif hasattr(module, "valid"):
            module.kernel.set_value(module.kernel.get_value().at[:-1].set(0.0))
    return vae


@functools.partial(jax.jit, static_argnums=0)
def _moments(graph: nnx.GraphDef, params: Any, video: Float[Array, "b t h w 3"]) -> tuple[Array, Array]:
    return nnx.merge(graph, params).moments(video)[:2]


def encoded(vae: VAE, frames: UInt8[np.ndarray, "b t h w 3"]) -> Float[Array, "b f rows columns c"]:
    """Normalised latents of clips (the mean, no sampling)."""
    mean, _ = _moments(*nnx.split(vae), jnp.asarray(frames, jnp.float32) / 127.5 - 1)
    return (mean - jnp.asarray(vae.cfg.latent_mean)) / jnp.asarray(vae.cfg.latent_std)


def latent_statistics(vae: VAE, batches) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each latent channel before normalisation, over batches of uint8 clips.

    The spread counts the posterior's own variance: a channel the encoder does not use keeps a spread near 1
    instead of being blown up to it.
    """
    graph, params = nnx.split(vae)
    count, total, square = 0, 0.0, 0.0
    for frames in batches:
        mean, log_variance = _moments(graph, params, jnp.asarray(frames, jnp.float32) / 127.5 - 1)
        axes = tuple(range(mean.ndim - 1))
        count += mean[..., 0].size
        total = total + jnp.sum(mean, axes)
        square = square + jnp.sum(jnp.square(mean) + jnp.exp(log_variance), axes)
    average = total / count
    return average.tolist(), jnp.sqrt(square / count - jnp.square(average)).tolist()
