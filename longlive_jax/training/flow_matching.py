"""Flow matching without a past: what a bidirectional teacher learns, and what a student's first block is.

x_t = (1 - sigma) x0 + sigma eps, the network predicts eps - x0 (training.md A.2 has the same convention).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Num, PRNGKeyArray

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
    model: WanTransformer,
    text_encoder: TextEncoder,
    batch: Batch,
    key: PRNGKeyArray,
    *,
    shift: float,
    first_given: float = 0.0,
    dtype: str = "float32",
    remat: Callable | None = None,
) -> Float[Array, ""]:
    """Mean squared error of the flow, all frames of a clip at one noise level and all seeing each other.

    A clip as long as a block is the first block of a video as the causal student makes it: without a past, causal and
    bidirectional are the same. It is where what is to be seen and where is decided, and it costs an eighth of a clip.

    Args:
      model, text_encoder: both are trained.
      batch: see `Batch`.
      key: for noise levels (one a clip) and noise.
      shift: of the noise levels.
      first_given: share of clips whose first frame comes without noise and is not judged. How the others go on from
        it is then for the prompt alone to say; at one noise level for all, they say so themselves.
      dtype: of activations; noise, target and error are float32.
      remat: see `run_layers`.
    """
    x0 = batch.latents
    keys = jax.random.split(key)
    sigma = jnp.broadcast_to(draw_sigma(keys[0], (x0.shape[0], 1), shift), x0.shape[:2])
    if first_given:
        given = jax.random.bernoulli(jax.random.fold_in(key, 2), first_given, (x0.shape[0], 1))
        given = given & (jnp.arange(x0.shape[1]) == 0)
        sigma, batch = jnp.where(given, 0.0, sigma), batch.replace(learn=batch.learn & ~given)
    noise = jax.random.normal(keys[1], x0.shape)
    text_kv = model.text_kv(text_encoder(batch.ids, batch.mask, jnp.dtype(dtype)))
    noisy = add_noise(x0, noise, sigma[..., None, None, None]).astype(dtype)
    flow = model.bidirectional(noisy, 1000 * sigma, text_kv, positions=batch.positions, remat=remat)
    return frame_error(flow.astype(jnp.float32), noise - x0, batch)


def euler_sample(
    model: WanTransformer,
    prompt_embeds: Num[Array, "b l e"],
    empty_embeds: Num[Array, "b l e"],
    noise: Float[Array, "b t h w c"],
    *,
    guidance: float,
    steps: int,
    shift: float,
) -> Float[Array, "b t h w c"]:
    """Latents from a bidirectional model: Euler steps along the guided flow, all frames together.

    Args:
      model: the teacher.
      prompt_embeds, empty_embeds: of the prompts, and of what to go away from.
      noise: where the flow begins.
      guidance: ordinary scale, 1 for none.
      steps: evenly spaced before the shift.
      shift: of the noise levels.
    """
    graph, params = nnx.split(model)
    u = jnp.linspace(1.0, 0.0, steps + 1)
    sigmas = shift * u / (1 + (shift - 1) * u)
    return _euler(graph, params, jnp.concatenate([prompt_embeds, empty_embeds]), noise, sigmas, guidance)


@functools.partial(jax.jit, static_argnums=0)
def _euler(graph, params, embeds, noise, sigmas, guidance):
    """Prompted and unprompted flows are one batch."""
    model = nnx.merge(graph, params)
    text_kv = model.text_kv(embeds)

    def step(x, pair):
        sigma, after = pair
        timesteps = jnp.full((2 * x.shape[0], x.shape[1]), 1000 * sigma)
        with_prompt, without = jnp.split(model.bidirectional(jnp.concatenate([x, x]), timesteps, text_kv), 2)
        return x + (after - sigma) * (without + guidance * (with_prompt - without)), None

    return jax.lax.scan(step, noise, (sigmas[:-1], sigmas[1:]))[0]
