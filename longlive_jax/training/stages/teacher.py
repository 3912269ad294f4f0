"""`longlive train teacher`: a bidirectional flow-matching model with prompts left out at times, for guidance."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from longlive_jax.config import SPATIAL_FACTOR
from longlive_jax.models.layers import structure
from longlive_jax.models.vae import VAE
from longlive_jax.training.batch import Batch
from longlive_jax.training.flow_matching import euler_sample, flow_matching_loss
from longlive_jax.training.remat import rematerialise
from longlive_jax.training.stages.base import decoded, side_by_side
from longlive_jax.training.stages.transformer import TransformerStage, test_prompts
from longlive_jax.training.step import Turn

GUIDANCE, STEPS = 3.0, 16
"""Of validation videos."""


class TeacherStage(TransformerStage):
    """Whole clips at one noise level, all frames seeing each other."""

    name = "teacher"
    learner = "teacher"
    whole_clips = True

    @functools.cache  # noqa: B019
    def _turns(self, plain: bool) -> tuple[Turn, ...]:
        settings = {
            "shift": self.config.sampler.shift,
            "first_given": self.config.first_given,
            "dtype": "float32" if plain else self.config.run.dtype,
            "remat": rematerialise("none" if plain else self.config.remat),
        }

        def loss(params, nets, carry, batch, keys):
            return flow_matching_loss(*self.models(params, nets), Batch(**batch), keys.own, **settings), (carry, {})

        return (Turn(self.learner, loss),)

    def turns(self, phase, step, *, plain=False):
        return self._turns(plain)

    def validate(self, best, frozen):
        params = self.networks(best, frozen)
        prompts = test_prompts(4)
        tokens, empty = (jax.tree.map(jnp.asarray, self._tokenizer(texts)) for texts in (prompts, [""] * len(prompts)))
        model, text = self.models(params, params)
        sampler = self.model.sampler
        frames = self.config.phases[-1].frames
        shape = (sampler.height // SPATIAL_FACTOR, sampler.width // SPATIAL_FACTOR, self.model.transformer.in_channels)
        noise = jax.random.normal(jax.random.key(0), (len(prompts), frames, *shape))
        latents = euler_sample(
            model, text(tokens.ids, tokens.mask), text(empty.ids, empty.mask), noise, guidance=GUIDANCE, steps=STEPS,
            shift=sampler.shift,
        )  # fmt: skip
        video = np.asarray(decoded(structure(lambda: VAE(self.model.vae, rngs=nnx.Rngs(0))), params["vae"], latents))
        return {}, side_by_side(video, 2)
