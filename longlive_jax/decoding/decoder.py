"""The causal few-step decoder (reference section 4): `step` makes one block, `scan` makes them all.

`Decoder` holds what is fixed for a video (networks' structure, settings) and is hashable; parameters and state are
arguments. So `jax.jit(Decoder.step, static_argnums=0)` compiles once for all videos of one shape. The block-by-block
path and the scan give the same numbers.
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
        model = self._transformer(params)
        passes, steps = Passes.of(self.sampler), len(self.sampler.steps)
        if noise is None:
            shape = (*self.latent_size, model.cfg.in_channels)
            noise = block_noise(state.keys, state.position, self.block, steps, shape)
        batch = noise.shape[1]

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

        # The noise that follows a pass; after the last step and the clean pass its factor is 0.
        fresh = jnp.concatenate([noise[1:], jnp.zeros((2, *noise.shape[1:]))])
        xs = (*(jnp.asarray(a) for a in (passes.timestep, passes.sigma, passes.next_sigma)), fresh)
        (latents, cache), _ = jax.lax.scan(one_pass, (noise[0], state.cache), xs, unroll=self.unroll)

        frames, vae = None, None
        if self.vae is not None:
            frames, vae = self._pixels(params, latents, state.vae, state.position == 0)
        recent = jnp.concatenate([state.recent, latents], axis=1)[:, self.block :]
        state = state.replace(
            cache=cache.replace(count=cache.count + self.block),
            recent=recent,
            position=state.position + self.block,
            vae=vae,
        )
        return state, BlockOutput(latents=latents, frames=frames)

    def switch(self, params: Params, state: DecodeState, prompt_embeds: Num[Array, "b l e"]) -> DecodeState:
        """Changes the prompt before the next block, by the sampler's policy (see `switch.py`)."""
        model = self._transformer(params)
        return switch_prompt(model, self.sampler, self.window, state, prompt_embeds.astype(self.dtype))

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

    def _pixels(self, params: Params, latents, cache, first):
        """Decodes a block to uint8; both branches give one shape, see `FILLER`."""
        vae = nnx.merge(self.vae, params["vae"])
        z = latents.astype(self.dtype)

        def start(cache):
            x, cache = vae.decode(z, first=True)
            return jnp.pad(x, [(0, 0), (FILLER, 0), (0, 0), (0, 0), (0, 0)]), cache

        x, cache = jax.lax.cond(first, start, lambda cache: vae.decode(z, cache, first=False), cache)
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
