"""First sprites VAE: stills, then clips. Resumable; each stage has its own folder under --output.

python experiments/sprites/train_vae.py --output runs/sprites
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from pathlib import Path

import jax
import numpy as np
import optax
from flax import nnx

from longlive_jax.config import VAEConfig
from longlive_jax.data.sprite_source import make_clip
from longlive_jax.data.sprites import render_crowd
from longlive_jax.models.vae import VAE
from longlive_jax.training.loop import run
from longlive_jax.training.vae import inflate, latent_statistics, make_vae_step

STAGES = {  # clips a batch, frames a clip, sprites a picture, steps, peak learning rate, emphasis on the sprites
    "stills": (16, 1, 1, 3600, 2e-3, 0.0),
    "clips": (3, 5, 1, 800, 1e-3, 0.0),
    "long-clips": (1, 13, 1, 200, 3e-4, 0.0),
    "sprite-stills": (16, 1, 1, 1700, 2e-3, 12.0),
    "sprite-clips": (3, 5, 1, 450, 1e-3, 12.0),
    "crowd-stills": (16, 1, 6, 1700, 2e-3, 4.0),
    "crowd-clips": (3, 5, 6, 600, 1e-3, 4.0),
}
"""The first three stages gave sprites without shape and yellow for orange, because the background is 95 % of the loss;
weighting the sprite up mended the colours, and pictures of many sprites the shapes. A new run would start there."""

KL_WEIGHT = 3e-4


def batch(stage: str, index: int) -> np.ndarray:
    clips, frames, sprites, *_ = STAGES[stage]
    seed = 100 + list(STAGES).index(stage)
    indices = range(index * clips, (index + 1) * clips)
    if sprites > 1:
        return np.stack([render_crowd(frames, sprites, np.random.default_rng([seed, i])) for i in indices])
    return np.stack([make_clip(seed, i, frames)["frames"] for i in indices])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--base-width", type=int, default=8)
    args = parser.parse_args()

    cfg = dataclasses.replace(VAEConfig.sprites(), base_width=args.base_width)
    graph, params = nnx.split(inflate(VAE(cfg, rngs=nnx.Rngs(0))))
    params = nnx.to_pure_dict(params)
    for stage, (*_, steps, rate, emphasis) in STAGES.items():
        schedule = optax.warmup_cosine_decay_schedule(0.0, rate, 100, steps, rate / 20)
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99, weight_decay=1e-4))
        state = {"params": params, "opt": optimizer.init(params), "ema": jax.tree.map(np.array, params)}
        step = make_vae_step(graph, optimizer, kl_weight=KL_WEIGHT, emphasis=emphasis)
        folder = args.output / f"vae-{stage}"
        state = run(step, state, functools.partial(batch, stage), steps=steps, folder=folder)
        params = jax.tree.map(np.array, state["ema"])
        print(f"{stage} done", flush=True)

    vae = nnx.merge(graph, params)
    clips = [np.stack([make_clip(999, i * 8 + j, 13)["frames"] for j in range(8)]) for i in range(16)]
    mean, std = latent_statistics(vae, clips)
    np.savez(
        args.output / "vae.npz", **{"/".join(map(str, p)): v for p, v in nnx.traversals.flatten_mapping(params).items()}
    )
    (args.output / "vae.json").write_text(
        json.dumps({"latent_mean": mean, "latent_std": std, "base_width": args.base_width})
    )
    print(mean, std)


if __name__ == "__main__":
    main()
