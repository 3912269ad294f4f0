"""The causal few-step decoder (official pipeline/causal_inference.py): `step` makes one block, `scan` makes them all.

`Decoder` holds what is fixed for a video (networks' structure, settings) and is hashable; parameters and state are
arguments. So `jax.jit(Decoder.step, static_argnums=0)` compiles once for all videos of one shape. The block-by-block
path and the scan give the same numbers; so do `denoise`, `pixels` and `finish` one after the other.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key, Num

from longlive_jax.cache import KVCache, Window
from longlive_jax.config import SPATIAL_FACTOR, SamplerConfig
from longlive_jax.decoding.state import FILLER, BlockInputs, BlockOutput, DecodeState, block_noise
from longlive_jax.decoding.switch import switch_prompt
from longlive_jax.models.transformer import WanTransformer
from longlive_jax.schedule import Passes, add_noise, to_x0

Params = dict[str, Any]
"""Pure dicts of parameters: "transformer", and "vae" where pixels are wanted."""


@dataclasses.dataclass(frozen=True)
class Decoder:
    """What is fixed for a video.

    Attributes:
      transformer, vae: structure of the networks (`nnx.split`); without a VAE only latents are made.
      sampler: settings; `rope` must be decided ("absolute" or "relative").
      window: which frames are attended.
      dtype: of activations and of the KV cache, by name.
      unroll: whether the denoising steps are unrolled instead of scanned.
    """

    transformer: nnx.GraphDef
    vae: nnx.GraphDef | None
    sampler: SamplerConfig
    window: Window
    dtype: str = "float32"
    unroll: bool = False

    @property
    def block(self) -> int:
        return self.sampler.block_frames

    @property
    def latent_size(self) -> tuple[int, int]:
        """Rows and columns of the latents."""
        return self.sampler.height // SPATIAL_FACTOR, self.sampler.width // SPATIAL_FACTOR

    def init(self, params: Params, prompt_embeds: Num[Array, "b l e"], keys: Key[Array, " b"]) -> DecodeState:
        """The state before the first block.

        Args:
          params: see `Params`.
          prompt_embeds: of the first prompt.
          keys: one a video.
        """
        model = self._transformer(params)
        cfg, batch = model.cfg, prompt_embeds.shape[0]
        rows, columns = self.latent_size
        shape = model.cache_shape(batch, self.window.slots, rows // cfg.patch[1], columns // cfg.patch[2])
        return DecodeState(
            cache=KVCache.zeros(shape, self.dtype, stacked=model.stacked),
            text_kv=model.text_kv(prompt_embeds.astype(self.dtype)),
            recent=jnp.zeros((batch, self.window.slots, rows, columns, cfg.in_channels)),
            position=jnp.zeros((), jnp.int32),
            keys=keys,
            vae=self._vae_cache(params, batch) if self.vae is not None else None,
        )

    def step(self, params: Params, state: DecodeState, noise=None) -> tuple[DecodeState, BlockOutput]:
        """Makes the next block: denoises it, writes its keys and values, decodes its pixels.

        Args:
          params: see `Params`.
          state: donate it.
          noise: see `BlockInputs`.
        """
        noise, steps = self._noise(state, noise), len(self.sampler.steps)
        latents, cache = self._passes(params, state, noise[0], noise[1:], 0, steps + 1)
        frames, vae = None, None
        if self.vae is not None:
            frames, vae = self.pixels(params, latents, state.vae, state.position == 0)
        state = self._remember(state.replace(cache=cache, vae=vae), latents)
        return self._count(state), BlockOutput(latents=latents, frames=frames)

    def denoise(self, params: Params, state: DecodeState, noise=None) -> tuple[DecodeState, Float[Array, "..."]]:
        """`step` without its last two parts, `pixels` and `finish`: frames can leave before the clean pass runs.

        Returns:
          A state that is good for `finish` only, and the block's latents.
        """
        noise = self._noise(state, noise)
        latents, cache = self._passes(params, state, noise[0], noise[1:], 0, len(self.sampler.steps))
        return self._remember(state.replace(cache=cache), latents), latents

    def finish(self, params: Params, state: DecodeState) -> DecodeState:
        """The clean pass over the block that `denoise` made: its keys and values, for the blocks to come."""
        latents, steps = state.recent[:, -self.block :], len(self.sampler.steps)
        _, cache = self._passes(params, state, latents, jnp.zeros((0, *latents.shape)), steps, steps + 1)
        return self._count(state.replace(cache=cache))

    def _noise(self, state: DecodeState, noise):
        if noise is not None:
            return noise
        shape = (*self.latent_size, state.recent.shape[-1])
        return block_noise(state.keys, state.position, self.block, len(self.sampler.steps), shape)

    def _passes(self, params: Params, state: DecodeState, x, fresh, start: int, stop: int):
        """The passes `start` to `stop` of a block, the clean one being the last of all, in one loop.

        Args:
          x: what the first of them gets.
          fresh: the noise that each pass adds, `[pass, ...]`; nothing is added after those that it has none for.

        Returns:
          The latents and the cache. The clean pass hands on what it got.
        """
        model, passes, batch = self._transformer(params), Passes.of(self.sampler), x.shape[0]

        def one_pass(carry, xs):
            x, cache = carry
            timestep, sigma, next_sigma, fresh = xs
            timesteps = jnp.full((batch, self.block), timestep)
            flow, cache = model.causal(
                x.astype(self.dtype), timesteps, state.text_kv, cache, self.window, state.position
            )
            flow = flow.astype(jnp.float32)
            if self.sampler.solver == "euler":
                return (x + (next_sigma - sigma) * flow, cache), None
            return (add_noise(to_x0(x, flow, sigma), fresh, next_sigma), cache), None

        # After the last step and the clean pass the noise has no weight.
        fresh = jnp.concatenate([fresh, jnp.zeros((stop - start - len(fresh), *x.shape))])
        tables = (jnp.asarray(a[start:stop]) for a in (passes.timestep, passes.sigma, passes.next_sigma))
        (x, cache), _ = jax.lax.scan(one_pass, (x, state.cache), (*tables, fresh), unroll=self.unroll)
        return x, cache

    def _remember(self, state: DecodeState, latents) -> DecodeState:
        return state.replace(recent=jnp.concatenate([state.recent, latents], axis=1)[:, self.block :])

    def _count(self, state: DecodeState) -> DecodeState:
        """The block's frames are in the cache and in the video."""
        cache = state.cache.replace(count=state.cache.count + self.block)
        return state.replace(cache=cache, position=state.position + self.block)

    def switch(
        self, params: Params, state: DecodeState, prompt_embeds: Num[Array, "b l e"], how: int | None = None
    ) -> DecodeState:
        """Changes the prompt before the next block, by the sampler's policy (see `switch.py`, also for `how`)."""
        model = self._transformer(params)
        return switch_prompt(model, self.sampler, self.window, state, prompt_embeds.astype(self.dtype), how)

    def scan(
        self, params: Params, state: DecodeState, inputs: BlockInputs, prompt_embeds: Num[Array, "p b l e"]
    ) -> tuple[DecodeState, BlockOutput]:
        """All blocks in one `lax.scan`.

        Args:
          params: see `Params`.
          state: of `init` with the first prompt, or of an earlier scan.
          inputs: one entry a block on the leading axis.
          prompt_embeds: the prompts that `inputs.prompt` names. With one prompt no switch is compiled.

        Returns:
          The last state, and the outputs of all blocks on a leading axis (the first block's filler included).
        """

        def body(state, block):
            if prompt_embeds.shape[0] > 1:
                state = jax.lax.cond(
                    block.switch,
                    lambda state: self.switch(params, state, prompt_embeds[block.prompt]),
                    lambda state: state,
                    state,
                )
            return self.step(params, state, block.noise)

        return jax.lax.scan(body, state, inputs)

    def _transformer(self, params: Params) -> WanTransformer:
        return nnx.merge(self.transformer, params["transformer"])

    def pixels(self, params: Params, latents: Float[Array, "b f h w c"], cache, first):
        """Decodes a block to uint8.

        Args:
          params: see `Params`.
          latents: of the block.
          cache: the state's `vae`. Donated, the old one would be copied: a convolution needs it beside the new.
          first: whether this is a video's first block. A bool compiles for that alone: nothing to decide on the device,
            and on a GPU no wait of the host for what it decides.

        Returns:
          Frames, of one shape for all blocks (see `FILLER`), and the new cache.
        """
        vae = nnx.merge(self.vae, params["vae"])
        z = latents.astype(self.dtype)

        def start(cache):
            x, cache = vae.decode(z, first=True)
            return jnp.pad(x, [(0, 0), (FILLER, 0), (0, 0), (0, 0), (0, 0)]), cache

        later = lambda cache: vae.decode(z, cache, first=False)
        if isinstance(first, bool):
            x, cache = (start if first else later)(cache)
        else:
            x, cache = jax.lax.cond(first, start, later, cache)
        return to_uint8(x), cache

    def _vae_cache(self, params: Params, batch: int):
        """Zeros in the shapes that a first block leaves."""
        vae = nnx.merge(self.vae, params["vae"])
        z = jax.ShapeDtypeStruct((batch, self.block, *self.latent_size, vae.cfg.z_channels), self.dtype)
        _, cache = jax.eval_shape(lambda z: vae.decode(z, first=True), z)
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), cache)


def to_uint8(x: Float[Array, "..."]):
    """[-1, 1] to 0..255, rounded."""
    return jnp.round((x.astype(jnp.float32) + 1) * 127.5).astype(jnp.uint8)
