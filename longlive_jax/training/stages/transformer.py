"""What stages with a transformer share; and those that learn from cached latents of the sprites world."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from longlive_jax import checkpoint, hub, sharding
from longlive_jax.config import SPATIAL_FACTOR, ModelConfig, VAEConfig, to_dict
from longlive_jax.data.latent_source import LatentSource
from longlive_jax.data.sprite_prompts import all_prompts, canonical
from longlive_jax.data.sprites import combinations_of
from longlive_jax.errors import UserError, raise_all
from longlive_jax.models.layers import initial, structure
from longlive_jax.models.text_encoder import TextEncoder
from longlive_jax.models.transformer import WanTransformer
from longlive_jax.models.vae import VAE
from longlive_jax.pipeline import LongLivePipeline
from longlive_jax.tokenizer import PromptTokenizer, train_unigram
from longlive_jax.training.latents import cached_latents
from longlive_jax.training.phases import LatentPhase
from longlive_jax.training.stages.base import Stage

CLIP_SEED = 7
"""Names the sprites clips that transformers learn from."""


class ModelStage(Stage):
    """Networks, tokeniser and sizes, from checkpoints or made."""

    def __init__(self, config, output, say):
        super().__init__(config, output, say)
        self._init = hub.find(config.init) if config.init is not None else None
        vae = hub.find(config.vae) if config.vae is not None else self._init
        self._tokenizer = self._make_tokenizer()
        text = dataclasses.replace(config.text_encoder, vocab_size=self._rows())
        # A tokeniser made here has the sprites world's few words; what the settings ask for is what has to fit.
        self.text_shape = text if self._init is not None else config.text_encoder
        self._vae_folder = vae
        if vae is not None:
            vae_cfg = checkpoint.load_config(vae).vae
        else:
            say("no VAE given (vae: FOLDER): an untrained one makes the latents, which is good for trying out only")
            vae_cfg = VAEConfig.wan()
            if (config.sampler.height, config.sampler.width) == (64, 64):
                tiny = {"base_width": 4, "multipliers": (1, 1, 1, 1), "res_blocks": 0}
                vae_cfg = dataclasses.replace(VAEConfig.sprites(), **tiny)
        self.model = ModelConfig(config.transformer, vae_cfg, text, config.sampler)
        self._compare_init()
        for role, folder in (("init", self._init), ("vae", vae)):
            if folder is not None:
                self.sources[role] = checkpoint.checkpoint_hash(folder)
        self.graphs = {
            "transformer": structure(
                lambda: WanTransformer(self.model.transformer, unroll=config.run.unroll, rngs=nnx.Rngs(0))
            ),
            "text_encoder": structure(lambda: TextEncoder(self.model.text_encoder, rngs=nnx.Rngs(0))),
        }

    @property
    def builds_logits(self) -> bool:
        """Whether attention has its logits in memory, in float32."""
        run = self.config.run
        return run.dtype == "float32" or (jax.default_backend() == "cpu" and run.device_gib is None)

    def _make_tokenizer(self) -> PromptTokenizer:
        length = self.config.transformer.text_length
        if self._init is not None:
            return PromptTokenizer.from_folder(self._init, length)
        return train_unigram(list(all_prompts()), self.config.text_encoder.vocab_size, max_length=length)

    def _rows(self) -> int:
        """Of the token embedding: those of `init`, for Wan's has more rows than its tokeniser has tokens."""
        stored = None if self._init is None else checkpoint.load_config(self._init).text_encoder
        return self._tokenizer.vocab_size if stored is None else stored.vocab_size

    def _compare_init(self) -> None:
        """Refuses a checkpoint of another model, with all that differs."""
        if self._init is None:
            return
        stored, faults = checkpoint.load_config(self._init), []
        for part in ("transformer", "text_encoder"):
            if getattr(stored, part) is None:
                faults.append(f"it has no {part}")
                continue
            old, new = to_dict(getattr(stored, part)), to_dict(getattr(self.model, part))
            faults += [f"{part}.{n} is {old[n]}, the settings say {new[n]}" for n in old if old[n] != new[n]]
        tokens = self._tokenizer.vocab_size
        if stored.text_encoder is not None and tokens > stored.text_encoder.vocab_size:
            faults.append(f"its tokeniser has {tokens} tokens, its text encoder {stored.text_encoder.vocab_size}")
        raise_all(faults, f"init {self.config.init} is of another model: ")

    def pipeline(self, params: dict[str, Any]) -> LongLivePipeline:
        """Makes validation videos; in the dtype of the run, but on a CPU in float32. On the run's mesh, so that no
        device gets a whole model; of several processes the first has it to itself."""
        run, mesh = self.config.run, None
        dtype = "float32" if jax.default_backend() == "cpu" else run.dtype
        params = jax.tree.map(lambda a: a.astype(dtype), params)
        if run.devices > 1 and jax.process_count() == 1:
            mesh = sharding.make_mesh(data=run.data, fsdp=run.fsdp)
        return LongLivePipeline(self.model, params, self._tokenizer, dtype=dtype, mesh=mesh, note=self.say)

    def first_params(self) -> dict[str, Any]:
        """Transformer and text encoder, of `init` or newly drawn."""
        seed = self.config.run.seed
        makers = {
            "transformer": lambda: WanTransformer(self.model.transformer, rngs=nnx.Rngs(3 * seed + 1)),
            "text_encoder": lambda: TextEncoder(self.model.text_encoder, rngs=nnx.Rngs(3 * seed + 2)),
        }
        if self._init is not None:
            return {part: checkpoint.load(self._init, part, np.float32) for part in makers}
        return {part: initial(make) for part, make in makers.items()}

    @functools.cache  # noqa: B019 - a stage lives as long as its run
    def _vae_params(self):
        if self._vae_folder is not None:
            return checkpoint.load(self._vae_folder, "vae", np.float32)
        return initial(lambda: VAE(self.model.vae, rngs=nnx.Rngs(0)))


class TransformerStage(ModelStage):
    """The learner is "student" or "teacher", with the networks "transformer" and (if it is trained) "text_encoder"."""

    learner: str
    whole_clips: bool
    """Whether a prompt holds for its whole clip, and training sequences begin with it."""

    def __init__(self, config, output, say):
        super().__init__(config, output, say)
        check_sprites_size(config.sampler)

    @property
    def _trained(self) -> tuple[str, ...]:
        return ("transformer", "text_encoder") if self.config.train_text_encoder else ("transformer",)

    def shapes(self):
        parts = {p: checkpoint.abstract_params(p, getattr(self.model, p)) for p in ("transformer", "text_encoder")}
        return self._parted(parts, checkpoint.abstract_params("vae", self.model.vae))

    def _parted(self, parts: dict[str, Any], vae: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        trained = {part: parts[part] for part in self._trained}
        frozen = {part: params for part, params in parts.items() if part not in trained}
        return {self.learner: trained}, {"vae": vae, **frozen}

    def activations(self, phase: LatentPhase) -> dict[str, int]:
        cfg, size = self.model.transformer, jnp.dtype(self.config.run.dtype).itemsize
        rows, columns = self.model.sampler.height // SPATIAL_FACTOR, self.model.sampler.width // SPATIAL_FACTOR
        tokens = self.sequence_frames(phase) * rows * columns // (cfg.patch[1] * cfg.patch[2])
        clips = phase.batch_size // self.config.run.streams
        of_layer = clips * tokens * (12 * cfg.dim + 2 * cfg.ffn_dim) * size
        logits = 2 * 4 * clips * cfg.num_heads * tokens * tokens if self.builds_logits else 0
        if self.config.remat == "none":
            layers = cfg.num_layers * (of_layer + logits)
        else:
            kept = cfg.dim if self.config.remat == "layer" else 6 * cfg.dim + cfg.ffn_dim
            layers = of_layer + logits + cfg.num_layers * clips * tokens * kept * size
        return {"transformer activations": layers}

    def sequence_frames(self, phase: LatentPhase) -> int:
        """Latent frames that go through the transformer at once."""
        return phase.frames

    def parameters(self):
        return self._parted(self.first_params(), self._vae_params())

    def source(self, phase: LatentPhase, seed: int) -> LatentSource:
        # Clips of one block do not change.
        block = phase.clip_frames if self.whole_clips else self.config.sampler.block_frames
        root = Path(self.config.latents) if self.config.latents else self.output / "latents"
        vae = nnx.merge(structure(lambda: VAE(self.model.vae, rngs=nnx.Rngs(0))), self._vae_params())
        latents, plans = cached_latents(
            vae, root / phase.name, clips=phase.clips, latent_frames=phase.clip_frames, block=block, seed=CLIP_SEED,
            vae_hash=self.sources.get("vae", self.sources.get("init", "untrained")), say=self.say,
            workers=self.config.run.workers,
        )  # fmt: skip
        return LatentSource(
            latents, plans, self._tokenizer, block=block, frames=phase.frames,
            group=phase.batch_size // self.config.run.streams, anywhere=not self.whole_clips,
            prompt_dropout=self.config.prompt_dropout, seed=seed, length=phase.steps * phase.batch_size,
        )  # fmt: skip

    @staticmethod
    def collate(records) -> dict[str, np.ndarray]:
        """The fields of a `Batch`."""
        columns = {name: np.stack([record[name] for record in records]) for name in records[0]}
        # One stream's clips share their positions.
        return columns | {"positions": columns["positions"][0]}

    def finish(self, best, frozen, folder: Path, provenance: dict[str, Any]) -> None:
        params = self.networks(best, frozen)
        checkpoint.save(folder, self.model, params, self._tokenizer, provenance, dtype=np.float32, overwrite=True)

    def networks(self, best: dict[str, Any], frozen: dict[str, Any]) -> dict[str, Any]:
        """Parameters of all networks by name."""
        return {**frozen, **best[self.learner]}

    def models(self, params, nets) -> tuple[WanTransformer, TextEncoder]:
        """Transformer and text encoder inside a loss."""
        text = params.get("text_encoder", nets.get("text_encoder"))
        return nnx.merge(self.graphs["transformer"], params["transformer"]), nnx.merge(
            self.graphs["text_encoder"], text
        )


def test_prompts(count: int) -> list[str]:
    """Prompts that nobody trains on, the same every time."""
    pool = combinations_of("test")
    return [canonical(pool[int(i)]) for i in np.random.default_rng(0).permutation(len(pool))[:count]]


def check_sprites_size(sampler) -> None:
    """The sprites world is drawn at one size."""
    if (sampler.height, sampler.width) != (64, 64):
        raise UserError(f"sampler: {sampler.height} x {sampler.width} pixels; the sprites world is 64 x 64")
