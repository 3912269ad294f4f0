"""Streaming long tuning: a video goes on from step to step, and every step judges its newest frames.

    frames   0 ............... 20 | 21 ........ 38 | 39 ........ 56 | ...
    chunk 1  [......... 21 .......]
    chunk 2                [3 old |..... 18 new ...]
    chunk 3                                 [3 old |..... 18 new ...]

Teacher and critic are made for whole videos, so what they judge must begin as one: its first frame is decoded to a
picture (as the end of what came before) and encoded alone. Old frames are judged with the new but do not learn.
With one chunk a video this is the training of stage 1, without streaming.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from longlive_jax.models.vae import VAE
from longlive_jax.schedule import TRAIN_STEPS, add_noise
from longlive_jax.training.config import DistillationConfig
from longlive_jax.training.dmd import NoiseLevels, Score, critic_flow_loss, dmd_loss, score_difference
from longlive_jax.training.rollout import Rollout
from longlive_jax.training.state import ChunkDraws, Prompts, StreamState, Tape
from longlive_jax.training.streams import Parted

Params = dict[str, Any]
"""Parameters by network: "generator", "teacher", "critic", "vae"; pure dicts, or `lora.Adapted` for trained ones."""


@dataclasses.dataclass(frozen=True)
class Distillation:
    """Structure of all networks and the settings. Hashable; parameters and state are arguments.

    A trainer jits `value_and_grad(distillation.generator_loss, has_aux=True)(params["generator"], params, ...)`, and
    the same of `critic_loss` with `params["critic"]`.

    Attributes:
      rollout: of the student.
      teacher, critic: the scores.
      vae: its structure; None will do where every video has one chunk.
    """

    rollout: Rollout
    teacher: Score
    critic: Score
    vae: nnx.GraphDef | None = None

    def __post_init__(self):
        self.config.check(self.rollout.sampler)

    @property
    def config(self) -> DistillationConfig:
        return self.rollout.config

    def draw(self, keys: Parted, state: StreamState, *, first: bool) -> ChunkDraws:
        """Random numbers for a step on the next chunk."""
        frames = self.config.chunk_frames if first else self.config.new_frames
        of_rollout, of_tau, of_noise = jax.random.split(keys.own, 3)
        share, given = self.config.first_given, None
        if share:
            given = jax.random.bernoulli(jax.random.fold_in(keys.own, 3), share)
        batch, _, *shape = state.recent.shape
        blocks = frames // self.rollout.sampler.block_frames
        return ChunkDraws(
            rollout=self.rollout.draw(keys.replace(own=of_rollout), state, blocks),
            tau=jax.random.randint(of_tau, (batch,), 0, TRAIN_STEPS),
            noise=jax.random.normal(of_noise, (batch, self.config.chunk_frames, *shape)),
            first_given=given,
        )

    def generator_loss(
        self, generator: Any, params: Params, state: StreamState, prompts: Prompts, keys: Parted, *, first: bool
    ) -> tuple[Float[Array, ""], tuple[StreamState, dict[str, Array]]]:
        """Makes the next chunk and scores it for the student.

        Args:
          generator: the student's parameters; the gradient is by these.
          params: of the other networks.
          state: before the chunk.
          prompts: of the video.
          keys: for all that is random; `keys_of(key)` for a stream alone.
          first: whether the video begins with this chunk (then `state.position` is 0).

        Returns:
          The loss; and the state after the chunk with metrics.
        """
        draws = self.draw(keys, state, first=first)
        loss, (state, terms) = self.generator_terms(generator, params, state, prompts, draws, first=first)
        size, lost = jnp.mean(jnp.abs(terms["dmd_gradient"])), terms["scores_not_finite"]
        return loss, (state, self._metrics(draws) | {"dmd_gradient": size, "scores_not_finite": lost})

    def critic_loss(
        self, critic: Any, params: Params, state: StreamState, prompts: Prompts, keys: Parted, *, first: bool
    ) -> tuple[Float[Array, ""], tuple[StreamState, dict[str, Array]]]:
        """Makes the next chunk and trains the critic on it; arguments as for `generator_loss`."""
        draws = self.draw(keys, state, first=first)
        loss, (state, _) = self.critic_terms(critic, params, state, prompts, draws, first=first)
        return loss, (state, self._metrics(draws))

    def generator_terms(
        self, generator: Any, params: Params, state: StreamState, prompts: Prompts, draws: ChunkDraws, *, first: bool
    ) -> tuple[Float[Array, ""], tuple[StreamState, dict[str, Array]]]:
        """`generator_loss` with given draws; the terms are new_latents, window, dmd_gradient and scores_not_finite."""
        after, tape = self.rollout.run(generator, state, prompts, draws.rollout)
        new = self.rollout.with_gradient(generator, state, prompts, draws.rollout, tape)
        window, frames = self.judged(params, state, new, tape, first)
        gradient, lost = score_difference(
            self.teacher, self.critic, params, window, draws.noise, self._levels(draws),
            prompts.embeds[tape.prompt[-1]], prompts.negative, self.config.guidance,
        )  # fmt: skip
        terms = {"new_latents": new, "window": window, "dmd_gradient": gradient, "scores_not_finite": lost}
        return dmd_loss(window, gradient, self._counted(frames, draws)), (after, jax.lax.stop_gradient(terms))

    def critic_terms(
        self, critic: Any, params: Params, state: StreamState, prompts: Prompts, draws: ChunkDraws, *, first: bool
    ) -> tuple[Float[Array, ""], tuple[StreamState, dict[str, Array]]]:
        """`critic_loss` with given draws; the terms are new_latents and window."""
        after, tape = self.rollout.run(params["generator"], state, prompts, draws.rollout)
        new = joined(tape)
        window, frames = self.judged(params, state, new, tape, first)
        loss = self.critic_window_loss(critic, window, prompts, draws, tape, frames)
        return loss, (after, {"new_latents": new, "window": window})

    def critic_window_loss(self, critic: Any, window, prompts: Prompts, draws: ChunkDraws, tape: Tape, frames):
        """The critic's loss on frames that are judged."""
        return critic_flow_loss(
            self.critic, critic, window, draws.noise, self._levels(draws), prompts.embeds[tape.prompt[-1]],
            self._counted(frames, draws), self.config.rematerialise(),
        )  # fmt: skip

    def teacher_flows(
        self, params: Params, window, prompts: Prompts, draws: ChunkDraws, tape: Tape
    ) -> tuple[Array, ...]:
        """The teacher's passes that a score difference needs: with the prompt and, guided, with the negative one."""
        levels = self._levels(draws)
        x_t = add_noise(window, draws.noise, levels.added)
        embeds = [prompts.embeds[tape.prompt[-1]], prompts.negative][: 1 if self.config.guidance == 1 else 2]
        return tuple(self.teacher.flow(params["teacher"], x_t, levels.timestep, e) for e in embeds)

    def _levels(self, draws: ChunkDraws) -> NoiseLevels:
        levels = NoiseLevels.of(self.rollout.sampler, self.config).at(draws.tau)
        return levels if draws.first_given is None else levels.without_first(draws.first_given, draws.noise.shape[1])

    def _counted(self, frames: Bool[Array, " s"], draws: ChunkDraws) -> Bool[Array, " s"]:
        """Those that count in a loss, without the first if it is given."""
        return frames if draws.first_given is None else frames & ~(draws.first_given & (jnp.arange(len(frames)) == 0))

    def _metrics(self, draws: ChunkDraws) -> dict[str, Array]:
        return {"exit_step": draws.rollout.exit_step, "timestep": jnp.mean(self._levels(draws).timestep)}

    def judged(
        self, params: Params, state: StreamState, new: Float[Array, "b t h w c"], tape: Tape, first: bool
    ) -> tuple[Float[Array, "b s h w c"], Bool[Array, " s"]]:
        """The frames that are judged, and which of them count in a loss."""
        counts = jnp.repeat(self.rollout.learning(tape), self.rollout.sampler.block_frames)
        if self.config.quirks.score_before_switch:
            counts = jnp.ones_like(counts)
        if first:
            return new, counts
        chunk = self.config.chunk_frames
        vae = nnx.merge(self.vae, jax.lax.stop_gradient(params["vae"]))
        past = state.recent[:, state.recent.shape[1] - chunk :]
        old = jnp.zeros(chunk - new.shape[1], bool)
        window = begin_as_video(vae, past, new, self.rollout.dtype, self.config.picture_context)
        return window, jnp.concatenate([old, counts])


def joined(tape: Tape) -> Float[Array, "b t h w c"]:
    """The chunk's latents, blocks joined."""
    return jnp.concatenate([*tape.latents], axis=1)


def begin_as_video(
    vae: VAE, past: Float[Array, "b r h w c"], new: Float[Array, "b t h w c"], dtype: str, context: int | None = None
) -> Float[Array, "b r h w c"]:
    """The newest R of past and new frames, the first of them encoded again as the first frame of a video.

    Args:
      vae: for the encoding.
      past: the newest R frames before.
      new: at most R; the gradient flows to these.
      dtype: of the VAE's activations.
      context: how many frames up to that first one are decoded for its picture; None for all.
    """
    frames = jnp.concatenate([jax.lax.stop_gradient(past), new], axis=1)
    start = frames.shape[1] - past.shape[1] + 1
    before, rest = frames[:, :start], frames[:, start:]
    seen = before if context is None else before[:, -context:]
    picture = last_picture(vae, jax.lax.stop_gradient(seen).astype(dtype))
    first, _ = vae.encode(picture)
    return jnp.concatenate([jax.lax.stop_gradient(first).astype(rest.dtype), rest], axis=1)


def last_picture(vae: VAE, latents: Float[Array, "b t h w c"]) -> Float[Array, "b 1 H W 3"]:
    """The last pixel frame of latents decoded as a video, frame by frame so that memory does not grow with them."""
    graph, params = nnx.split(vae)
    picture, cache = vae.decode(latents[:, :1], first=True)

    def step(carry, latent):
        pixels, cache = nnx.merge(graph, params).decode(latent[:, None], carry[1], first=False)
        return (pixels[:, -1:], cache), None

    (picture, _), _ = jax.lax.scan(step, (picture, cache), jnp.moveaxis(latents[:, 1:], 1, 0))
    return picture
