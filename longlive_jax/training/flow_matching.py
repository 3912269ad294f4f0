"""Flow matching without a past: what a bidirectional teacher learns, and what a student's first block is.

x_t = (1 - sigma) x0 + sigma eps, the network predicts eps - x0 (training.md A.2 has the same convention).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from longlive_jax.models.text_encoder import TextEncoder
from longlive_jax.models.transformer import WanTransformer
from longlive_jax.schedule import add_noise
from longlive_jax.training.batch import Batch


def draw_sigma(key: PRNGKeyArray, shape: tuple[int, ...], shift: float) -> Float[Array, "..."]:
    """Noise levels: uniform ones put through the timestep shift."""
    u = jax.random.uniform(key, shape)
    return shift * u / (1 + (shift - 1) * u)


def frame_error(flow: Float[Array, "b t h w c"], target: Float[Array, "b t h w c"], batch: Batch) -> Float[Array, ""]:
    """Mean squared error over the frames to learn."""
    error = jnp.mean(jnp.square(flow - target), axis=(2, 3, 4))
    return jnp.sum(error * batch.learn) / jnp.maximum(jnp.sum(batch.learn), 1)


def flow_matching_loss(
    model: WanTransformer, text_encoder: TextEncoder, batch: Batch, key: PRNGKeyArray, *, shift: float
) -> Float[Array, ""]:
    """Mean squared error of the flow, all frames of a clip at one noise level and all seeing each other.

    A clip as long as a block is the first block of a video as the causal student makes it: without a past, causal and
    bidirectional are the same. It is where what is to be seen and where is decided, and it costs an eighth of a clip.

    Args:
      model, text_encoder: both are trained.
      batch: see `Batch`.
      key: for noise levels (one a clip) and noise.
      shift: of the noise levels.
    """
    x0 = batch.latents
    keys = jax.random.split(key)
    sigma = jnp.broadcast_to(draw_sigma(keys[0], (x0.shape[0], 1), shift), x0.shape[:2])
    noise = jax.random.normal(keys[1], x0.shape)
    text_kv = model.text_kv(text_encoder(batch.ids, batch.mask))
    noisy = add_noise(x0, noise, sigma[..., None, None, None])
    flow = model.bidirectional(noisy, 1000 * sigma, text_kv, positions=batch.positions)
    return frame_error(flow, noise - x0, batch)
