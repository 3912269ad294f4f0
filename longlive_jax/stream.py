"""`VideoStream`: videos block by block, with prompts that may be set while they run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax import sharding
from longlive_jax.config import SamplerConfig, to_dict
from longlive_jax.decoding import programs
from longlive_jax.decoding.state import BlockInputs, BlockOutput, drop_filler
from longlive_jax.decoding.switch import how_to_recache
from longlive_jax.errors import UserError
from longlive_jax.prompts import LATENTS_PER_SECOND, Schedule

if TYPE_CHECKING:
    from longlive_jax.pipeline import LongLivePipeline


class VideoStream:
    """Videos in the making. Iterating gives each block's frames, uint8 [B, t, H, W, 3], as soon as they are made.

    Attributes:
      plans: one a video. Prompts set by `set_prompt` come on top.
      seeds: one a video.
      latents: of the newest block, float32 [B, f, h, w, C].
      position: latent frames made or begun so far.
      applied: (seconds, prompts) of every prompt change so far, as it took effect; not those inside `scan`.
    """

    def __init__(self, pipe: LongLivePipeline, sampler: SamplerConfig, plans, seeds, endless: bool):
        self.pipe, self.sampler, self.plans, self.seeds, self.endless = pipe, sampler, plans, seeds, endless
        self.decoder = pipe.decoder(sampler, plans[0].num_frames)
        self.position = 0
        self.latents: np.ndarray | None = None
        self.applied: list[tuple[float, tuple[str, ...]]] = []
        self._asked: tuple[str, ...] | None = None
        self._embeds = self._encode([plan.prompts for plan in plans])
        keys = jnp.stack([jax.random.key(seed) for seed in seeds])
        first, keys = sharding.shard_batch((self._embeds[0], keys), pipe.mesh)
        with sharding.using(pipe.mesh):
            self._state = programs.init(self.decoder, pipe.params, first, keys)

    @property
    def num_blocks(self) -> int | None:
        """Blocks in all; None for a stream without end."""
        return None if self.endless else self.plans[0].num_frames // self.sampler.block_frames

    def set_prompt(self, text: str | Sequence[str]) -> float:
        """Changes the prompt (of all videos, or one text each) at the next block; returns that time in seconds.

        Setting it again before the next block replaces it.
        """
        if not isinstance(text, (str, list, tuple)):
            raise UserError(f"a prompt is text, not {text!r}; give one, or one for each video")
        texts = (text,) * len(self.plans) if isinstance(text, str) else tuple(text)
        if len(texts) != len(self.plans):
            raise UserError(f"{len(texts)} prompts for {len(self.plans)} videos; give one, or one each")
        for one in texts:
            Schedule((one,))  # refuses what no prompt can be
        self._asked = texts
        return self.position / LATENTS_PER_SECOND

    def prepare_switch(self) -> None:
        """Compiles what a change of prompt needs, now instead of at the first one; the video stays what it is.

        For whoever streams to a viewer: call it before the start, or after the first block. Once compiled it takes as
        long as a recache. It works on a copy of the state, so a second KV cache must fit beside the first.
        """
        window, embeds = self.decoder.window, sharding.shard_batch(self._embeds[0], self.pipe.mesh)
        # As early as a switch can come, and when the video has outgrown the window.
        places = (self.sampler.block_frames, window.slots + self.sampler.block_frames)
        with sharding.using(self.pipe.mesh):
            for how in {how_to_recache(self.sampler, window, place) for place in places}:
                copy = jax.tree.map(jnp.copy, self._state)
                jax.block_until_ready(programs.switch(self.decoder, self.pipe.params, copy, embeds, how))

    def __iter__(self) -> VideoStream:
        return self

    def __next__(self) -> np.ndarray:
        return self._fetch(self._begin())

    def ahead(self) -> Iterator[np.ndarray]:
        """As iterating, but the device is given the next block before the frames of the last are handed out.

        For whoever has no prompt to set in between: one that is set waits for the block after the one begun.
        """
        for first in self:
            yield first  # before anything else: the second block may have to be compiled
            break
        begun = None
        while self.num_blocks is None or self._block < self.num_blocks:
            last, begun = begun, self._begin()
            if last is not None:
                yield self._fetch(last)
        if begun is not None:
            yield self._fetch(begun)

    @property
    def _block(self) -> int:
        """Index of the block to come."""
        return self.position // self.sampler.block_frames

    def _begin(self) -> tuple[BlockOutput, bool]:
        """Gives the device the work of a block and does not wait for it; what comes out, and whether it is the first.

        Copies to the host are asked for at once: they then run beside whatever the device does next.
        """
        if self.num_blocks is not None and self._block >= self.num_blocks:
            raise StopIteration
        first = self.position == 0
        with sharding.using(self.pipe.mesh):
            self._change_prompt(first)
            out = self._make(first)
        jax.tree.map(lambda a: a.copy_to_host_async(), out)
        self.position += self.sampler.block_frames
        return out, first

    def _change_prompt(self, first: bool) -> None:
        """Another prompt for the block to come, if there is one."""
        texts, embeds = self._prompt_for(self._block)
        if embeds is None:
            return
        if first:  # nothing to recache: the state is made anew with the text that was set before the start
            self._state = programs.init(self.decoder, self.pipe.params, embeds, self._state.keys)
        else:
            how = how_to_recache(self.sampler, self.decoder.window, self.position)
            self._state = programs.switch(self.decoder, self.pipe.params, self._state, embeds, how)
        self.applied.append((self.position / LATENTS_PER_SECOND, texts))

    def _make(self, first: bool) -> BlockOutput:
        params = self.pipe.params
        if not self.pipe.program.early_frames:
            self._state, out = programs.step(self.decoder, params, self._state)
            return out
        state, latents = programs.denoise(self.decoder, params, self._state)
        frames, vae = programs.pixels(self.decoder, params, latents, state.vae, first)
        self._state = programs.finish(self.decoder, params, state.replace(vae=vae))
        return BlockOutput(latents, frames)

    def _fetch(self, begun: tuple[BlockOutput, bool]) -> np.ndarray:
        """The frames of a block, once they are there."""
        out, first = begun
        frames, self.latents = np.asarray(out.frames), np.asarray(out.latents)
        return drop_filler(frames, first)

    def scan(self) -> tuple[np.ndarray, np.ndarray]:
        """All blocks by one compiled scan: frames [B, T, H, W, 3] and latents [B, F, h, w, C]."""
        if self.endless or self.position:
            raise UserError("a scan makes a whole video of known length from the start; iterate instead")
        inputs = BlockInputs.plan(self.num_blocks, self.plans[0].switch_blocks)
        embeds = sharding.shard_batch(self._embeds, self.pipe.mesh, axis=1)
        with sharding.using(self.pipe.mesh):
            self._state, out = programs.scan(self.decoder, self.pipe.params, self._state, inputs, embeds)
        self.position = self.plans[0].num_frames
        frames, latents = (np.concatenate(np.asarray(a), axis=1) for a in (out.frames, out.latents))
        return drop_filler(frames, True), latents

    def run_record(self, timings: dict[str, Any]) -> dict[str, Any]:
        """Settings, checkpoint and timings for a sidecar."""
        settings = to_dict(self.sampler) | {"dtype": self.pipe.dtype.name} | self.pipe.quantization_record()
        return {"settings": settings, "checkpoint": self.pipe.checkpoint_info, "timings": timings}

    def _prompt_for(self, block: int):
        """Texts and embeddings if the prompt changes at this block: what was asked for live goes before the plan."""
        planned = self.plans[0].switch_blocks
        if self._asked is not None:
            texts, self._asked = self._asked, None
            return texts, sharding.shard_batch(self.pipe.encode_prompts(texts), self.pipe.mesh)
        if block in planned:
            number = planned.index(block) + 1
            return tuple(p.prompts[number] for p in self.plans), sharding.shard_batch(
                self._embeds[number], self.pipe.mesh
            )
        return None, None

    def _encode(self, prompts: Sequence[tuple[str, ...]]) -> jax.Array:
        """[P, B, L, D] for B videos of P prompts each."""
        return jnp.stack([self.pipe.encode_prompts(texts) for texts in zip(*prompts)])
