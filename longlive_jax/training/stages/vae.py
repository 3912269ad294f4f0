"""`longlive train vae`: pictures and clips of the sprites world, coded and decoded."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from longlive_jax import checkpoint, hub
from longlive_jax.config import ModelConfig
from longlive_jax.data.sprite_source import make_clip
from longlive_jax.data.sprites import render_crowd
from longlive_jax.errors import UserError
from longlive_jax.models.layers import initial, structure
from longlive_jax.models.vae import VAE
from longlive_jax.training.stage_config import VAEPhase
from longlive_jax.training.stages.base import Stage, decoded, side_by_side
from longlive_jax.training.step import Turn
from longlive_jax.training.vae import encoded, inflate, latent_statistics, vae_loss

FRAMES = 17
"""Of validation clips and of those whose latents are measured: the VAE must do at any length what it learnt."""


@dataclasses.dataclass(frozen=True)
class VAESource:
    """Clips for a VAE: record i is {"frames": uint8 [T, 64, 64, 3]}."""

    frames: int
    sprites: int
    seed: int
    length: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index) -> dict[str, np.ndarray]:
        if self.sprites == 1:
            return {"frames": make_clip(self.seed, int(index), self.frames)["frames"]}
        return {"frames": render_crowd(self.frames, self.sprites, np.random.default_rng([self.seed, int(index)]))}


class VAEStage(Stage):
    """The learner is "vae"; nothing is frozen."""

    name = "vae"

    def __init__(self, config, output, say):
        super().__init__(config, output, say)
        self._init = None
        if config.init is not None:
            self._init = hub.find(config.init)
            stored = dataclasses.replace(
                checkpoint.load_config(self._init).vae, latent_mean=config.vae.latent_mean,
                latent_std=config.vae.latent_std,
            )  # fmt: skip
            if stored != config.vae:
                raise UserError(f"init {config.init} has another VAE: {stored}, the settings ask for {config.vae}")
            self.sources["init"] = checkpoint.checkpoint_hash(self._init)
        self._graph = structure(lambda: VAE(config.vae, rngs=nnx.Rngs(0)))

    def shapes(self):
        return {"vae": {"vae": checkpoint.abstract_params("vae", self.config.vae)}}, {}

    def activations(self, phase: VAEPhase) -> dict[str, int]:
        size = jnp.dtype(self.config.run.dtype).itemsize
        pixels = phase.batch_size // self.config.run.streams * phase.frames * 64 * 64
        # Encoder and decoder keep some ten arrays a residual block at the finest level, as much again at all others.
        blocks = 2 * self.config.vae.res_blocks + 1
        return {"VAE activations": 2 * 10 * blocks * pixels * self.config.vae.base_width * size}

    def parameters(self):
        if self._init is not None:
            return {"vae": {"vae": checkpoint.load(self._init, "vae", np.float32)}}, {}
        make = lambda: inflate(VAE(self.config.vae, rngs=nnx.Rngs(self.config.run.seed)))
        return {"vae": {"vae": initial(make)}}, {}

    def source(self, phase: VAEPhase, seed: int) -> VAESource:
        return VAESource(phase.frames, phase.sprites, 100 + seed, phase.steps * phase.batch_size)

    def turns(self, phase, step, *, plain=False):
        return _turns(self._graph, phase.emphasis, self.config.kl_weight, "float32" if plain else self.config.run.dtype)

    def validate(self, best, frozen):
        clips = np.stack([make_clip(998, i, FRAMES, "test")["frames"] for i in range(4)])
        params = best["vae"]["vae"]
        latents = encoded(nnx.merge(self._graph, params), clips)
        made = np.asarray(decoded(self._graph, params, latents))
        error = np.mean(np.abs(made.astype(float) - clips)) / 127.5
        return {"validation_l1": float(error)}, side_by_side(np.concatenate([clips, made]), len(clips))

    def finish(self, best, frozen, folder: Path, provenance: dict[str, Any]) -> None:
        """A folder with a VAE and nothing else; the sizes of the other parts are those of the sprites model."""
        params = best["vae"]["vae"]
        clips = min(8, self.config.statistics_clips)
        batches = [
            np.stack([make_clip(999, i * clips + j, FRAMES)["frames"] for j in range(clips)])
            for i in range(self.config.statistics_clips // clips)
        ]
        mean, std = latent_statistics(nnx.merge(self._graph, params), batches)
        vae = dataclasses.replace(self.config.vae, latent_mean=tuple(mean), latent_std=tuple(std))
        config = ModelConfig.sprites()
        transformer = dataclasses.replace(
            config.transformer, in_channels=vae.z_channels, out_channels=vae.z_channels
        )  # fmt: skip
        config = dataclasses.replace(config, vae=vae, transformer=transformer)
        checkpoint.save(folder, config, {"vae": params}, None, provenance, dtype=np.float32, overwrite=True)


@functools.lru_cache(maxsize=16)
def _turns(graph, emphasis: float, kl_weight: float, dtype: str) -> tuple[Turn, ...]:
    def loss(params, nets, carry, batch, key):
        vae = nnx.merge(graph, params["vae"])
        value, metrics = vae_loss(vae, batch["frames"], key, kl_weight=kl_weight, emphasis=emphasis, dtype=dtype)
        return value, (carry, metrics)

    return (Turn("vae", loss),)
