"""Distribution matching distillation: the student moves along the difference of two scores.

Noise is added to what the student made; the teacher says where the data would be from there, the critic where the
student's own videos would be. Their difference, normalised, is the gradient. The critic learns by flow matching on what
the student makes. Shapes: B videos, T frames that are judged at once, channels last.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Num

from longlive_jax.config import SamplerConfig
from longlive_jax.schedule import TRAIN_STEPS, add_noise, sigma_of, to_x0
from longlive_jax.training.config import DistillationConfig
from longlive_jax.training.lora import join, parts


@dataclasses.dataclass(frozen=True)
class NoiseLevels:
    """The noise levels of scores, for each tau = 0..999 (or for those of a batch, or of its frames).

    Attributes:
      timestep: given to the networks.
      added: sigma of the noise that is added.
      removed: sigma that turns a flow into x0; differs from `added` by the quirk `score_shift` only.
    """

    timestep: Any
    added: Any
    removed: Any

    @classmethod
    def of(cls, sampler: SamplerConfig, config: DistillationConfig) -> NoiseLevels:
        """float32 [1000] each: tau is drawn evenly, shifted as the sampler's timesteps are, and clipped."""
        u = np.arange(TRAIN_STEPS) / TRAIN_STEPS
        t = 1000 * sampler.shift * u / (1 + (sampler.shift - 1) * u)
        t = np.clip(t, config.min_timestep, config.max_timestep).astype(np.float32)
        added = removed = t / 1000
        if config.quirks.score_shift is not None:
            added, removed = sigma_of(t, sampler.shift), sigma_of(t, config.quirks.score_shift)
        return cls(*(np.asarray(a, np.float32) for a in (t, added, removed)))

    def at(self, tau: Int[Array, " b"]) -> NoiseLevels:
        """Those of a batch: timestep [B], sigmas [B, 1, 1, 1, 1]."""
        t, added, removed = (jnp.asarray(a)[tau] for a in (self.timestep, self.added, self.removed))
        return NoiseLevels(t, added[:, None, None, None, None], removed[:, None, None, None, None])

    def without_first(self, given: Bool[Array, ""], frames: int) -> NoiseLevels:
        """Those of a batch's frames, the first at level 0 if it is given: timestep [B, T], sigmas [B, T, 1, 1, 1]."""
        noisy = 1.0 - (given & (jnp.arange(frames) == 0))
        return NoiseLevels(
            self.timestep[:, None] * noisy, *(a * noisy[:, None, None, None] for a in (self.added, self.removed))
        )


@dataclasses.dataclass(frozen=True)
class Score:
    """A bidirectional network that judges chunks: teacher or critic.

    Attributes:
      transformer: its structure.
      dtype: of activations, by name.
    """

    transformer: nnx.GraphDef
    dtype: str = "float32"

    def flow(
        self,
        params: Any,
        x_t: Float[Array, "b t h w c"],
        timestep: Float[Array, " b"] | Float[Array, "b t"],
        prompt_embeds: Num[Array, "b l e"],
        remat=None,
    ) -> Float[Array, "b t h w c"]:
        """The predicted flow, float32; `params` a pure dict or `lora.Adapted`."""
        model = nnx.merge(self.transformer, join(*parts(params)))
        text_kv = model.text_kv(prompt_embeds.astype(self.dtype))
        timesteps = timestep if timestep.ndim == 2 else jnp.broadcast_to(timestep[:, None], x_t.shape[:2])
        return model.bidirectional(x_t.astype(self.dtype), timesteps, text_kv, remat=remat).astype(jnp.float32)


def guided(with_prompt, without, scale: float):
    """Classifier-free guidance in its usual form: 1 is the prompt alone."""
    return without + scale * (with_prompt - without)


def dmd_gradient(
    x: Float[Array, "b t h w c"], fake: Float[Array, "b t h w c"], real: Float[Array, "b t h w c"]
) -> tuple[Float[Array, "b t h w c"], Float[Array, ""]]:
    """(fake - real) over each video's mean |x - real|; what is not a number is 0.

    Args:
      x: what the student made.
      fake, real: the critic's and the teacher's x0.

    Returns:
      The gradient, and which share of it was not a number: from it nobody learns, so somebody must be told.
    """
    scale = jnp.mean(jnp.abs(x - real), axis=(1, 2, 3, 4), keepdims=True)
    gradient = (fake - real) / scale
    return jnp.nan_to_num(gradient), jnp.mean(~jnp.isfinite(gradient), dtype=jnp.float32)


def masked_mean(values: Float[Array, "b t h w c"], frames: Bool[Array, " t"]) -> Float[Array, ""]:
    """The mean over the frames that count."""
    return jnp.sum(jnp.mean(values, axis=(0, 2, 3, 4)) * frames) / jnp.sum(frames)


def dmd_loss(
    x: Float[Array, "b t h w c"], gradient: Float[Array, "b t h w c"], frames: Bool[Array, " t"]
) -> Float[Array, ""]:
    """Half the mean square of the gradient, with the gradient itself (over the number of elements) as derivative by x.

    As 0.5 mean (x - stop(x - gradient))^2, without the rounding of x - (x - gradient).
    """
    gradient = jax.lax.stop_gradient(gradient)
    toward = masked_mean(x * gradient, frames)
    return masked_mean(0.5 * jnp.square(gradient), frames) + toward - jax.lax.stop_gradient(toward)


def score_difference(
    teacher: Score,
    critic: Score,
    params: dict[str, Any],
    x: Float[Array, "b t h w c"],
    noise: Float[Array, "b t h w c"],
    levels: NoiseLevels,
    prompt_embeds: Num[Array, "b l e"],
    negative_embeds: Num[Array, "b l e"],
    guidance: float,
) -> tuple[Float[Array, "b t h w c"], Float[Array, ""]]:
    """The normalised gradient for x, and which share was not a number (`dmd_gradient`); nothing flows back through it.

    Args:
      teacher, critic: the two scores, parameters in `params`.
      params: of the networks by name.
      x: what the student made.
      noise: standard normal.
      levels: of each video, see `NoiseLevels.at`.
      prompt_embeds, negative_embeds: the prompt in force, and what the teacher is guided away from.
      guidance: 1 for none, which saves a pass.
    """
    params, x = jax.lax.stop_gradient((params, x))
    x_t = add_noise(x, noise, levels.added)

    def x0(score, name, embeds):
        return to_x0(x_t, score.flow(params[name], x_t, levels.timestep, embeds), levels.removed)

    fake, real = x0(critic, "critic", prompt_embeds), x0(teacher, "teacher", prompt_embeds)
    if guidance != 1:
        real = guided(real, x0(teacher, "teacher", negative_embeds), guidance)
    return dmd_gradient(x, fake, real)


def critic_flow_loss(
    critic: Score,
    params: Any,
    x: Float[Array, "b t h w c"],
    noise: Float[Array, "b t h w c"],
    levels: NoiseLevels,
    prompt_embeds: Num[Array, "b l e"],
    frames: Bool[Array, " t"],
    remat=None,
) -> Float[Array, ""]:
    """Flow matching on what the student made.

    The official code takes the flow from the critic's x0 again, with the sigma that was added: `removed / added` of it.
    """
    x = jax.lax.stop_gradient(x)
    x_t = add_noise(x, noise, levels.added)
    # A frame without noise (`NoiseLevels.without_first`) has a flow, but is not among those that count.
    ratio = levels.removed / jnp.where(levels.added > 0, levels.added, 1.0)
    flow = critic.flow(params, x_t, levels.timestep, prompt_embeds, remat) * ratio
    return masked_mean(jnp.square(flow - (noise - x)), frames)
