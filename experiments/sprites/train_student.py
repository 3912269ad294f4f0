"""First sprites student: latents, flow matching of first blocks, then teacher forcing of clips.

    python experiments/sprites/train_student.py --output runs/sprites

What is to be seen and where is decided in a video's first block, which has no past: learning that alone costs an eighth
of learning it inside clips. Clips then teach how it goes on.

Needs what `train_vae.py` left there. `--init sprites` goes on from the weights of a checkpoint, with its VAE
if there is no other. Resumable; every stage ends with a checkpoint folder, the last being
`runs/sprites/checkpoint-clips`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from longlive_jax import checkpoint, hub
from longlive_jax.config import MAX_ABSOLUTE_FRAMES, ModelConfig, SamplerConfig, VAEConfig
from longlive_jax.data.sprite_prompts import all_prompts, canonical, paraphrase
from longlive_jax.models.layers import structure
from longlive_jax.models.text_encoder import TextEncoder
from longlive_jax.models.transformer import WanTransformer
from longlive_jax.models.vae import VAE
from longlive_jax.tokenizer import train_unigram
from longlive_jax.training.batch import Batch
from longlive_jax.training.flow_matching import flow_matching_loss
from longlive_jax.training.latents import encode_clips, scheduled_clip
from longlive_jax.training.loop import run
from longlive_jax.training.teacher_forcing import teacher_forcing_loss

BLOCK, SHIFT, CLIP_SEED = 3, 3.0, 7


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of training.

    Attributes:
      clips: how many are cached as latents.
      latent_frames: of a cached clip.
      frames: of a training sequence.
      batch_size, steps: of training.
      rate: peak learning rate.
    """

    clips: int
    latent_frames: int
    frames: int
    batch_size: int
    steps: int
    rate: float


STAGES = {
    "first-blocks": Stage(clips=8192, latent_frames=3, frames=3, batch_size=64, steps=4000, rate=2e-3),
    # Frames: the sink, and three blocks from anywhere in the clip.
    "clips": Stage(clips=1024, latent_frames=15, frames=12, batch_size=8, steps=1500, rate=1e-3),
}


def load_vae(folder: Path) -> tuple[VAEConfig, dict]:
    """Sizes and parameters that train_vae.py wrote."""
    info = json.loads((folder / "vae.json").read_text())
    cfg = dataclasses.replace(
        VAEConfig.sprites(),
        base_width=info["base_width"],
        latent_mean=tuple(info["latent_mean"]),
        latent_std=tuple(info["latent_std"]),
    )
    flat = {
        tuple(int(p) if p.isdigit() else p for p in k.split("/")): v for k, v in np.load(folder / "vae.npz").items()
    }
    return cfg, nnx.traversals.unflatten_mapping(flat)


class LatentData:
    """Training batches from cached latents; a batch is a function of its index."""

    def __init__(self, folder: Path, tokenizer, stage: Stage):
        self.latents = np.concatenate([np.load(p)["latents"] for p in sorted(folder.glob("*.npz"))])
        # Combinations of each clip and where they change, without drawing it.
        plans = [
            scheduled_clip(CLIP_SEED, i, stage.latent_frames, BLOCK, draw=False)[1:] for i in range(len(self.latents))
        ]
        self.combinations, self.change = zip(*plans)
        self.tokenizer, self.stage = tokenizer, stage

    def __call__(self, index: int) -> Batch:
        rng = np.random.default_rng([1, index])
        # All of a batch share their positions: the window lies anywhere after the sink, up to four minutes later.
        frames = self.stage.frames
        gap = 0 if rng.random() < 0.5 else int(rng.integers(0, MAX_ABSOLUTE_FRAMES - 2 * frames))
        positions = np.arange(frames) + np.where(np.arange(frames) >= BLOCK, gap, 0)
        latents, prompts, learn = zip(*(self._example(rng, gap == 0) for _ in range(self.stage.batch_size)))
        tokens = self.tokenizer(list(prompts))
        return Batch(np.stack(latents).astype(np.float32), positions, tokens.ids, tokens.mask, np.stack(learn))

    def _example(self, rng: np.random.Generator, from_start: bool):
        i = int(rng.integers(len(self.latents)))
        frames, last = self.stage.frames, (self.stage.latent_frames - self.stage.frames) // BLOCK
        start = BLOCK * (0 if from_start else int(rng.integers(0, last + 1)))  # of the window, after the sink
        index = np.concatenate([np.arange(BLOCK), np.arange(start + BLOCK, start + frames)])
        second = index >= self.change[i]
        # The prompt is that of the end or of the beginning; frames of the other one are past, not to be learnt.
        shows_second = bool(second[-1]) and (second.all() or rng.random() < 0.7)
        combination = self.combinations[i][int(shows_second)]
        prompt = canonical(combination) if rng.random() < 0.5 else paraphrase(combination, rng)[0]
        learn = np.ones(frames, bool) if self.combinations[i][0] == self.combinations[i][1] else second == shows_second
        return self.latents[i][index], prompt, learn


def make_step(text_graph, graph, optimizer, stage: Stage, decay: float = 0.998):
    def loss(params, batch, key):
        model, text = nnx.merge(graph, params["transformer"]), nnx.merge(text_graph, params["text_encoder"])
        if stage.frames == BLOCK:
            return flow_matching_loss(model, text, batch, key, shift=SHIFT)
        return teacher_forcing_loss(model, text, batch, key, block=BLOCK, shift=SHIFT, context_noise=0.15)

    def step(state, batch, key):
        value, grads = jax.value_and_grad(loss)(state["params"], batch, key)
        updates, opt = optimizer.update(grads, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        ema = optax.incremental_update(params, state["ema"], 1 - decay)
        return {"params": params, "opt": opt, "ema": ema}, {"loss": value, "grad_norm": optax.tree.norm(grads)}

    return jax.jit(step, donate_argnums=0)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--init", help="checkpoint whose weights to start from")
    args = parser.parse_args()

    start = hub.find(args.init) if args.init else None
    if start is not None and not (args.output / "vae.json").exists():
        vae_cfg, vae_params = checkpoint.load_config(start).vae, checkpoint.load(start, "vae", np.float32)
    else:
        vae_cfg, vae_params = load_vae(args.output)
    vae_graph = structure(lambda: VAE(vae_cfg, rngs=nnx.Rngs(0)))
    tokenizer = train_unigram(list(all_prompts()), 256, max_length=24)
    cfg = ModelConfig.sprites()
    text_cfg = dataclasses.replace(cfg.text_encoder, vocab_size=tokenizer.vocab_size)
    cfg = dataclasses.replace(cfg, vae=vae_cfg, text_encoder=text_cfg)
    networks = {
        "transformer": WanTransformer(cfg.transformer, rngs=nnx.Rngs(1)),
        "text_encoder": TextEncoder(cfg.text_encoder, rngs=nnx.Rngs(2)),
    }
    graphs = {name: nnx.split(net)[0] for name, net in networks.items()}
    params = {name: nnx.to_pure_dict(nnx.split(net)[1]) for name, net in networks.items()}
    if start is not None:
        params = {name: checkpoint.load(start, name, np.float32) for name in params}
    print({name: sum(a.size for a in jax.tree.leaves(p)) for name, p in params.items()}, flush=True)

    for name, stage in STAGES.items():
        latents = args.output / f"latents-{name}"
        encode_clips(
            nnx.merge(vae_graph, vae_params), latents, clips=stage.clips, latent_frames=stage.latent_frames,
            block=BLOCK, seed=CLIP_SEED,
        )  # fmt: skip
        print(f"{name}: latents done", flush=True)
        schedule = optax.warmup_cosine_decay_schedule(0.0, stage.rate, 100, stage.steps, 2e-5)
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99, weight_decay=0.01))
        state = {"params": params, "opt": optimizer.init(params), "ema": jax.tree.map(np.array, params)}
        step = make_step(graphs["text_encoder"], graphs["transformer"], optimizer, stage)
        data = LatentData(latents, tokenizer, stage)
        state = run(step, state, data, steps=stage.steps, folder=args.output / f"student-{name}", seed=3)
        params = jax.tree.map(np.array, state["ema"])

        sampler = dataclasses.replace(SamplerConfig.sprites(), steps=STEPS, solver="euler", shift=SHIFT)
        provenance = {"recipe": "experiments/sprites", "made": time.strftime("%Y-%m-%d"), "last stage": name}
        checkpoint.save(
            args.output / f"checkpoint-{name}", dataclasses.replace(cfg, sampler=sampler),
            {"vae": vae_params, **params}, tokenizer, provenance, dtype=jnp.float32, overwrite=True,
        )  # fmt: skip
        print(f"checkpoint in {args.output / f'checkpoint-{name}'}", flush=True)


STEPS = tuple(float(round(step)) for step in np.linspace(1000, 0, 16, endpoint=False))
"""Not distilled yet: sixteen steps along the flow instead of four with fresh noise (eight: colour 80 %, not 86)."""


if __name__ == "__main__":
    main()
