"""What does a bidirectional teacher draw? Its guided samples, read. A causal student of it may move better.

    python experiments/sprites/guided.py --checkpoint runs/teacher/checkpoint --clips 48

Prompts of combinations that were never trained on; attributes read off the last second of each clip.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from longlive_jax.config import FPS
from longlive_jax.data.sprite_prompts import canonical
from longlive_jax.data.sprites import ATTRIBUTES, combinations_of
from longlive_jax.decoding.decoder import to_uint8
from longlive_jax.evaluation.figures import adherence
from longlive_jax.evaluation.intervals import wilson
from longlive_jax.evaluation.sprites import read
from longlive_jax.pipeline import LongLivePipeline
from longlive_jax.training.flow_matching import euler_sample
from longlive_jax.video import contact_sheet, save_image

PART = 8
"""Clips made together."""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--clips", type=int, default=48, help=f"a multiple of {PART}")
    parser.add_argument("--frames", type=int, default=15, help="latent frames of a clip")
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--output", type=Path, help="a contact sheet")
    args = parser.parse_args()

    pipe = LongLivePipeline.from_pretrained(args.checkpoint)
    sampler = pipe.config.sampler
    decoder = pipe.decoder(sampler, args.frames)
    vae = nnx.merge(decoder.vae, pipe.params["vae"])
    teacher = nnx.merge(decoder.transformer, pipe.params["transformer"])
    settings = {"guidance": args.guidance, "steps": args.steps, "shift": sampler.shift}
    shape = (PART, args.frames, sampler.height // 8, sampler.width // 8, pipe.config.transformer.in_channels)
    decode = jax.jit(lambda latents: to_uint8(vae.decode(latents)[0]))

    pool = combinations_of("test")
    order = np.random.default_rng(0).permutation(len(pool))
    shown = [pool[int(i)] for i in order[: args.clips]]
    empty = jnp.repeat(pipe.encode_prompts([""]), PART, axis=0)
    readings, sheets = [], []
    for start in range(0, args.clips, PART):
        prompts = [canonical(combination) for combination in shown[start : start + PART]]
        noise = jax.random.normal(jax.random.key(start), shape)
        latents = euler_sample(teacher, pipe.encode_prompts(prompts), empty, noise, **settings)
        for frames in np.asarray(decode(latents)):
            readings.append(read(frames[-FPS:]))
            sheets.append(frames[:: len(frames) // 6][:7])
    for name, share in adherence(readings, shown).items():
        low, high = wilson(round(share * args.clips), args.clips)
        print(f"{name:12} {share:6.1%}  ({low:.1%} to {high:.1%})")
    for motion in ATTRIBUTES["motion"]:
        of = [reading.motion for reading, combination in zip(readings, shown) if combination.motion == motion]
        print(f"{motion:8} {of.count(motion)} of {len(of)}; read as {', '.join(map(str, of))}")
    if args.output is not None:
        save_image(contact_sheet(np.concatenate(sheets[:16]), 14, scale=2), args.output)


if __name__ == "__main__":
    main()
