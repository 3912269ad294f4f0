"""`longlive train ar`: a causal student by teacher forcing, on first blocks alone and inside clips."""

from __future__ import annotations

import functools

from longlive_jax.training.batch import Batch
from longlive_jax.training.flow_matching import flow_matching_loss
from longlive_jax.training.remat import rematerialise
from longlive_jax.training.stages.base import side_by_side
from longlive_jax.training.stages.transformer import TransformerStage, test_prompts
from longlive_jax.training.step import Turn
from longlive_jax.training.teacher_forcing import teacher_forcing_loss


class StudentStage(TransformerStage):
    """A sequence of one block is a video's first: it has no past, and costs an eighth of a clip."""

    name = "ar"
    learner = "student"
    whole_clips = False

    def sequence_frames(self, phase):
        return phase.frames if phase.frames == self.config.sampler.block_frames else 2 * phase.frames

    @functools.cache  # noqa: B019
    def _turns(self, first_blocks: bool, plain: bool) -> tuple[Turn, ...]:
        sampler, context_noise = self.config.sampler, self.config.context_noise
        settings = {
            "shift": sampler.shift,
            "dtype": "float32" if plain else self.config.run.dtype,
            "remat": rematerialise("none" if plain else self.config.remat),
        }

        def loss(params, nets, carry, batch, keys):
            models = self.models(params, nets)
            if first_blocks:
                return flow_matching_loss(*models, Batch(**batch), keys.own, **settings), (carry, {})
            forcing = settings | {"block": sampler.block_frames, "context_noise": context_noise}
            return teacher_forcing_loss(*models, Batch(**batch), keys.own, **forcing), (carry, {})

        return (Turn(self.learner, loss),)

    def turns(self, phase, step, *, plain=False):
        return self._turns(phase.frames == self.config.sampler.block_frames, plain)

    def validate(self, best, frozen):
        video = self.pipeline(self.networks(best, frozen))(test_prompts(4), seconds=3)
        return {}, side_by_side(video.frames, 2)
