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
from longlive_jax.training.phases import VAEPhase
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
    """The learner is "vae", with the parts of one; the encoder's are frozen if it is not to learn."""

    name = "vae"

    def __init__(self, config, output, say):
        super().__init__(config, output, say)
        if config.init is None and not config.train_encoder:
            raise UserError("train_encoder is false, but there is no encoder yet: give init (--init FOLDER)")
        self._init, self._statistics = None, None
        if config.init is not None:
            self._init = hub.find(config.init)
            found = checkpoint.load_config(self._init).vae
            self._statistics = {"latent_mean": found.latent_mean, "latent_std": found.latent_std}
            asked = dataclasses.replace(config.vae, **self._statistics)
            if found != asked:
                raise UserError(f"init {config.init} has another VAE: {found}, the settings ask for {asked}")
            self.sources["init"] = checkpoint.checkpoint_hash(self._init)
        self._graph = structure(lambda: VAE(config.vae, rngs=nnx.Rngs(0)))

    def shapes(self):
        return self._parted(checkpoint.abstract_params("vae", self.config.vae))

    def _parted(self, params: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """What learns, by learner, and what is frozen."""
        fixed = () if self.config.train_encoder else ("encoder", "quant")
        frozen = {name: part for name, part in params.items() if name in fixed}
        return {"vae": {name: part for name, part in params.items() if name not in fixed}}, frozen

    def activations(self, phase: VAEPhase) -> dict[str, int]:
        size = jnp.dtype(self.config.run.dtype).itemsize
        pixels = phase.batch_size // self.config.run.streams * phase.frames * 64 * 64
        # Encoder and decoder keep some ten arrays a residual block at the finest level, as much again at all others.
        blocks = 2 * self.config.vae.res_blocks + 1
        return {"VAE activations": 2 * 10 * blocks * pixels * self.config.vae.base_width * size}

    def parameters(self):
        if self._init is not None:
            return self._parted(checkpoint.load(self._init, "vae", np.float32))
        return self._parted(initial(lambda: inflate(VAE(self.config.vae, rngs=nnx.Rngs(self.config.run.seed)))))

    def source(self, phase: VAEPhase, seed: int) -> VAESource:
        return VAESource(phase.frames, phase.sprites, 100 + seed, phase.steps * phase.batch_size)

    def turns(self, phase, step, *, plain=False):
        config, dtype = self.config, "float32" if plain else self.config.run.dtype
        return _turns(self._graph, phase.emphasis, config.kl_weight, config.train_encoder, dtype)

    def validate(self, best, frozen):
        clips = np.stack([make_clip(998, i, FRAMES, "test")["frames"] for i in range(4)])
        params = {**frozen, **best["vae"]}
        latents = encoded(nnx.merge(self._graph, params), clips)
        made = np.asarray(decoded(self._graph, params, latents))
        error = np.mean(np.abs(made.astype(float) - clips)) / 127.5
        return {"validation_l1": float(error)}, side_by_side(np.concatenate([clips, made]), len(clips))

    def finish(self, best, frozen, folder: Path, provenance: dict[str, Any]) -> None:
        """A folder with a VAE and nothing else; the sizes of the other parts are those of the sprites model."""
        params = {**frozen, **best["vae"]}
        statistics = self._measured(params) if self.config.train_encoder else self._statistics
        vae = dataclasses.replace(self.config.vae, **statistics)
        config = ModelConfig.sprites()
        transformer = dataclasses.replace(
            config.transformer, in_channels=vae.z_channels, out_channels=vae.z_channels
        )  # fmt: skip
        config = dataclasses.replace(config, vae=vae, transformer=transformer)
        checkpoint.save(folder, config, {"vae": params}, None, provenance, dtype=np.float32, overwrite=True)

    def _measured(self, params: dict[str, Any]) -> dict[str, tuple[float, ...]]:
        """Mean and spread of the latents, as the settings of a VAE name them."""
        clips = min(8, self.config.statistics_clips)
        batches = [
            np.stack([make_clip(999, i * clips + j, FRAMES)["frames"] for j in range(clips)])
            for i in range(self.config.statistics_clips // clips)
        ]
        mean, std = latent_statistics(nnx.merge(self._graph, params), batches)
        return {"latent_mean": tuple(mean), "latent_std": tuple(std)}


@functools.lru_cache(maxsize=16)
def _turns(graph, emphasis: float, kl_weight: float, train_encoder: bool, dtype: str) -> tuple[Turn, ...]:
    settings = {"kl_weight": kl_weight, "emphasis": emphasis, "train_encoder": train_encoder, "dtype": dtype}

    def loss(params, nets, carry, batch, keys):
        frozen = {} if train_encoder else {name: nets[name] for name in ("encoder", "quant")}
        value, metrics = vae_loss(nnx.merge(graph, {**frozen, **params}), batch["frames"], keys.own, **settings)
        return value, (carry, metrics)

    return (Turn("vae", loss),)
