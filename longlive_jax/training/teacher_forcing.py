"""Teacher forcing: a causal student learns flow matching with the clean past beside the noisy present.

A training sequence is [clean frames | noisy frames] of one clip. Every block of noisy frames sees itself and the clean
blocks before it, as it will when decoding (where the past stands in the cache at t = 0); clean blocks see clean blocks
up to themselves. One pass therefore trains every block of the clip.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from longlive_jax import sharding
from longlive_jax.models.text_encoder import TextEncoder
from longlive_jax.models.transformer import WanTransformer
from longlive_jax.schedule import add_noise
from longlive_jax.training.batch import Batch
from longlive_jax.training.flow_matching import draw_sigma, frame_error
from longlive_jax.training.forced_attention import forced_attention


def teacher_forcing_mask(num_frames: int, block: int) -> np.ndarray:
    """Which frame sees which, bool [2T, 2T] (query, key), for [clean | noisy].

    With three blocks (c clean, n noisy):
            c0 c1 c2 n0 n1 n2
        c0   x
        c1   x  x
        c2   x  x  x
        n0            x
        n1   x           x
        n2   x  x           x
    """
    index = np.arange(num_frames) // block
    query, key = index[:, None], index[None, :]
    clean = np.concatenate([key <= query, np.zeros((num_frames, num_frames), bool)], axis=1)
    noisy = np.concatenate([key < query, key == query], axis=1)
    return np.concatenate([clean, noisy], axis=0)


def teacher_forcing_loss(
    model: WanTransformer,
    text_encoder: TextEncoder,
    batch: Batch,
    key: PRNGKeyArray,
    *,
    block: int,
    shift: float,
    context_noise: float,
    dtype: str = "float32",
    remat: Callable | None = None,
) -> Float[Array, ""]:
    """Mean squared error of the flow over the frames to learn.

    Args:
      model, text_encoder: both are trained.
      batch: see `Batch`.
      key: for noise levels (one a block) and noise.
      block: frames a block.
      shift: of the noise levels.
      context_noise: the clean past gets a noise level up to this (and t = 0 all the same), so that the student learns
        to live with the faults of its own past.
      dtype: of activations; noise, target and error are float32.
      remat: see `run_layers`.
    """
    x0 = batch.latents
    b, t = x0.shape[:2]
    keys = jax.random.split(key, 4)
    sigma = jnp.repeat(draw_sigma(keys[0], (b, t // block), shift), block, axis=1)
    noise = jax.random.normal(keys[1], x0.shape)
    noisy = add_noise(x0, noise, sigma[..., None, None, None])
    past = jax.random.uniform(keys[2], (b, 1, 1, 1, 1), maxval=context_noise)
    clean = add_noise(x0, jax.random.normal(keys[3], x0.shape), past)
    text_kv = model.text_kv(text_encoder(batch.ids, batch.mask, jnp.dtype(dtype)))
    if sharding.platform() == "cpu":
        seen = {"attention": lambda q, k, v, **_: forced_attention(q, k, v, t // block)}
    else:
        seen = {"mask": jnp.asarray(teacher_forcing_mask(t, block))}
    flow = model.bidirectional(
        jnp.concatenate([clean, noisy], axis=1).astype(dtype),
        jnp.concatenate([jnp.zeros((b, t)), 1000 * sigma], axis=1),
        text_kv,
        positions=jnp.tile(batch.positions, 2),
        **seen,
        remat=remat,
    )
    return frame_error(flow[:, t:].astype(jnp.float32), noise - x0, batch)
