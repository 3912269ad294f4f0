"""Self-forcing: the student makes a chunk as it will when decoding, and learns from what it made.

Every block is denoised up to a random exit step; that pass's x0 is the block, and the only pass with a gradient. Its
input, the passes before it and the clean pass that writes the cache are constants. The cache goes on from chunk to
chunk, and the prompt may change at the start of any block. Exit step, position and switch are traced: one compilation.

The gradient is taken by hand. `run` makes the chunk without one and leaves a `Tape`; `with_gradient` gives the latents
the gradient of the exit passes, made again one block at a time from the tape. So the activations of one block are
alive at a time, and a cache is never saved once a block. With `cache_gradient` "straight_through" blocks depend on each
other and the exit passes are differentiated together (`_replay`).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from longlive_jax.cache import KVCache, Window, put_frames, take_frames
from longlive_jax.config import SamplerConfig
from longlive_jax.decoding.state import block_noise
from longlive_jax.models.transformer import WanTransformer
from longlive_jax.schedule import add_noise, few_step_list, sigma_of, to_x0
from longlive_jax.training.config import DistillationConfig
from longlive_jax.training.flops import Expected
from longlive_jax.training.lora import join, parts
from longlive_jax.training.state import Prompts, RolloutDraws, StreamState, Tape
from longlive_jax.training.straight_through import reading_with_gradient
from longlive_jax.training.streams import Parted
from longlive_jax.training.switch import recache_kind, training_switch


@dataclasses.dataclass(frozen=True)
class Rollout:
    """What is fixed: the student's structure and the settings. Hashable; parameters and state are arguments.

    Attributes:
      transformer: structure of the student (`nnx.split`).
      sampler: settings of decoding, which training follows; `rope` must be decided.
      config: settings of distillation.
      dtype: of activations and cache, by name.
    """

    transformer: nnx.GraphDef
    sampler: SamplerConfig
    config: DistillationConfig
    dtype: str = "float32"

    @property
    def window(self) -> Window:
        return Window.of(self.sampler, self.config.max_frames)

    def init(self, params: Any, batch: int, rows: int, columns: int) -> StreamState:
        """The state before the first chunk; rows and columns of latents."""
        model, window = self._model(params), self.window
        cfg = model.cfg
        shape = model.cache_shape(batch, window.slots, rows // cfg.patch[1], columns // cfg.patch[2])
        frames = max(self.config.chunk_frames, window.slots)
        return StreamState(
            cache=KVCache.zeros(shape, self.dtype, stacked=model.stacked),
            recent=jnp.zeros((batch, frames, rows, columns, cfg.in_channels)),
            position=jnp.zeros((), jnp.int32),
            switched=jnp.zeros((), bool),
        )

    def draw(self, keys: Parted, state: StreamState, blocks: int) -> RolloutDraws:
        """Random numbers for the next chunk, of `blocks` blocks: noise by `own`, the exit step by the `shared` key."""
        steps, f = len(self.sampler.steps), self.sampler.block_frames
        each = jax.random.split(keys.own, state.recent.shape[0])
        # The key is the chunk's own, so frames are counted from its start.
        noise = block_noise(each, jnp.zeros((), jnp.int32), blocks * f, steps + 1, state.recent.shape[2:])
        return RolloutDraws(
            exit_step=jax.random.randint(keys.shared, (), 0, steps),
            noise=rearrange(noise, "s b (n f) h w c -> n s b f h w c", f=f),
        )

    def run(self, params: Any, state: StreamState, prompts: Prompts, draws: RolloutDraws) -> tuple[StreamState, Tape]:
        """Makes a chunk, without a gradient.

        Args:
          params: of the student: a pure dict, or `lora.Adapted`.
          state: before the chunk.
          prompts: of the video.
          draws: see `RolloutDraws`; the number of blocks is read off the noise.

        Returns:
          The state after the chunk, and the chunk with what its gradient needs.
        """
        params = jax.lax.stop_gradient(params)
        text_kvs = self._text_kvs(params, prompts)
        timesteps, sigmas = self._steps()
        sigma_context = float(sigma_of([self.sampler.context_noise], self.sampler.shift)[0])

        def block(state, noise):
            model = self._model(params)
            state, prompt = self._enter(params, state, prompts)
            text_kv = jax.tree.map(lambda a: a[prompt], text_kvs)

            def predict(x, cache, timestep, sigma):
                timesteps = jnp.full(x.shape[:2], timestep)
                args = text_kv, cache, self.window, state.position
                flow, cache = model.causal(x.astype(self.dtype), timesteps, *args)
                return to_x0(x, flow.astype(jnp.float32), sigma), cache

            def denoise(k, carry):
                x0, cache = predict(*carry, timesteps[k], sigmas[k])
                return add_noise(x0, noise[k + 1], sigmas[k + 1]), cache

            last = draws.exit_step
            with jax.named_scope("denoise"):
                x, cache = jax.lax.fori_loop(0, last, denoise, (noise[0], state.cache))
            latents, cache = predict(x, cache, timesteps[last], sigmas[last])
            context = add_noise(latents, noise[-1], sigma_context) if self.config.quirks.noisy_context else latents
            _, cache = predict(context, cache, self.sampler.context_noise, 0.0)
            clean = take_frames((cache.k, cache.v), self.window, cache.count, latents.shape[1])
            return self._leave(state, latents, clean), Tape(x=x, latents=latents, clean=clean, prompt=prompt)

        return jax.lax.scan(block, state, draws.noise)

    def with_gradient(
        self, params: Any, state: StreamState, prompts: Prompts, draws: RolloutDraws, tape: Tape
    ) -> Float[Array, "b t h w c"]:
        """The latents of a chunk that `run` made, with the gradient of the exit passes to the parameters.

        Args:
          params: as for `run`; of `lora.Adapted` only what is trained gets a gradient.
          state: before the chunk.
          prompts, draws, tape: of the chunk.
        """
        trained, frozen = parts(params)
        latents = _attach(self, trained, tape.latents, (frozen, state, prompts, draws.exit_step, tape))
        return rearrange(latents, "n b f h w c -> b (n f) h w c")

    def learning(self, tape: Tape) -> Bool[Array, " n"]:
        """Which blocks learn: those with the prompt that the chunk ends with."""
        return tape.prompt == tape.prompt[-1]

    def expected(self, *, first: bool) -> Expected:
        """What the control flow of a chunk comes to on average, for `count_flops`.

        Args:
          first: whether it is a video's first chunk; of the others each is as likely as any.
        """
        starts, switches = self.config.starts, self.config.switches
        blocks = self.config.new_frames // self.sampler.block_frames
        due = 0.0 if first or not switches else 1 / (len(starts) - 1) / blocks
        kinds = [int(recache_kind(self.sampler, self.window, self.config, switch)) for switch in switches]
        return {
            "denoise": ((len(self.sampler.steps) - 1) / 2,),
            "recache": (1 - due, due),
            "recache_kind": tuple(kinds.count(kind) / len(kinds) for kind in range(4)) if kinds else (1.0,),
        }

    # MARK: parts of a block

    def _model(self, params: Any) -> WanTransformer:
        return nnx.merge(self.transformer, join(*parts(params)))

    def _steps(self) -> tuple[Float[Array, " s"], Float[Array, " s"]]:
        steps = few_step_list(self.sampler)
        return jnp.asarray(steps, jnp.float32), jnp.asarray(sigma_of(steps, self.sampler.shift), jnp.float32)

    def _text_kvs(self, params: Any, prompts: Prompts) -> Any:
        """Keys and values of every prompt on a leading axis, by the parameters as they are now."""
        return jax.vmap(lambda embeds: self._model(params).text_kv(embeds.astype(self.dtype)))(prompts.embeds)

    def _enter(self, params: Any, state: StreamState, prompts: Prompts) -> tuple[StreamState, Int[Array, ""]]:
        """Changes the prompt if it is due; the prompt in force."""
        if prompts.embeds.shape[0] == 1:
            return state, jnp.zeros((), jnp.int32)

        def switch(state):
            embeds = prompts.embeds[1].astype(self.dtype)
            cache = training_switch(
                self._model(params), self.sampler, self.window, self.config, state.cache, state.recent, state.position,
                embeds,
            )  # fmt: skip
            return state.replace(cache=cache, switched=jnp.ones((), bool))

        due = ~state.switched & (state.position >= prompts.switch_frame)
        with jax.named_scope("recache"):
            state = jax.lax.cond(due, switch, lambda state: state, state)
        return state, state.switched.astype(jnp.int32)

    def _leave(self, state: StreamState, latents: Float[Array, "b f h w c"], clean: Any) -> StreamState:
        """The state after a block with these latents and clean keys and values."""
        cache, f = state.cache, latents.shape[1]
        k, v = put_frames((cache.k, cache.v), clean, self.window, cache.count)
        return state.replace(
            cache=KVCache(k=k, v=v, count=cache.count + f),
            recent=jnp.concatenate([state.recent, latents], axis=1)[:, f:],
            position=state.position + f,
        )

    def _exit_pass(self, trained, frozen, cache: KVCache, position, prompts: Prompts, exit_step, block: Tape):
        """A block as the exit pass makes it, with its own keys and values; differentiable."""
        model = nnx.merge(self.transformer, join(trained, jax.lax.stop_gradient(frozen)))
        timesteps, sigmas = self._steps()
        text_kv = model.text_kv(prompts.embeds[block.prompt].astype(self.dtype))
        flow, own = model.causal_reading(
            block.x.astype(self.dtype),
            jnp.full(block.x.shape[:2], timesteps[exit_step]),
            text_kv,
            cache,
            self.window,
            position,
            remat=self.config.rematerialise(),
        )
        return to_x0(block.x, flow.astype(jnp.float32), sigmas[exit_step]), own

    # MARK: gradient

    def _pull(self, trained, frozen, state: StreamState, prompts: Prompts, exit_step, tape: Tape, cotangents):
        """Cotangent of the trained parameters, summed over the blocks in float32."""

        def block(carry, xs):
            state, total = carry
            one, cotangent = xs
            state, _ = self._enter(join(trained, frozen), state, prompts)

            def forward(trained):
                return self._exit_pass(trained, frozen, state.cache, state.position, prompts, exit_step, one)[0]

            (gradient,) = jax.vjp(forward, trained)[1](cotangent)
            total = jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, gradient)
            return (self._leave(state, one.latents, one.clean), total), None

        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.promote_types(a.dtype, jnp.float32)), trained)
        (_, total), _ = jax.lax.scan(block, (state, zeros), (tape, cotangents))
        return jax.tree.map(lambda a, b: a.astype(b.dtype), total, trained)

    def _replay(self, trained, frozen, state: StreamState, prompts: Prompts, exit_step, tape: Tape):
        """All exit passes in order, the cache as it was and with the gradient to those who wrote it."""
        learns = self.learning(tape)
        f, blocks = self.sampler.block_frames, tape.prompt.shape[0]

        def block(carry, xs):
            state, written = carry
            one, learn, index = xs
            state, _ = self._enter(jax.lax.stop_gradient(join(trained, frozen)), state, prompts)
            first = f * jnp.argmax(learns)
            k, v = reading_with_gradient(
                (state.cache.k, state.cache.v), written, self.window, self.config.chunk_frames,
                count=state.cache.count, position=state.position, made=f * index, first=first, exit_step=exit_step,
            )  # fmt: skip
            cache = state.cache.replace(k=k, v=v)
            x0, own = self._exit_pass(trained, frozen, cache, state.position, prompts, exit_step, one)
            at = lambda a, new: jax.lax.dynamic_update_slice_in_dim(a, new.astype(a.dtype), f * index, axis=a.ndim - 4)
            written = jax.tree.map(at, written, own)
            return (self._leave(state, one.latents, one.clean), written), jnp.where(learn, x0, 0)

        def room(a):
            shape = (*a.shape[1:-4], f * blocks, *a.shape[-3:])
            return jnp.zeros(shape, a.dtype)

        start = state, jax.tree.map(room, tape.clean)
        body = jax.checkpoint(block, prevent_cse=False)
        return jax.lax.scan(body, start, (tape, learns, jnp.arange(blocks)))[1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attach(rollout: Rollout, trained: Any, latents: Float[Array, "n b f h w c"], constants: Any):
    """The latents as they are; their gradient goes to `trained` by the exit passes."""
    return latents


def _attach_forward(rollout, trained, latents, constants):
    return latents, (trained, constants)


def _attach_backward(rollout, residuals, cotangents):
    trained, (frozen, state, prompts, exit_step, tape) = residuals
    if rollout.config.quirks.cache_gradient == "straight_through":
        _, pull = jax.vjp(lambda t: rollout._replay(t, frozen, state, prompts, exit_step, tape), trained)
        (gradient,) = pull(cotangents)
    else:
        learns = rollout.learning(tape)[:, None, None, None, None, None]
        gradient = rollout._pull(trained, frozen, state, prompts, exit_step, tape, jnp.where(learns, cotangents, 0))
    return gradient, None, None


_attach.defvjp(_attach_forward, _attach_backward)
