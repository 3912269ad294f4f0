"""What does each word of the prompt tell a teacher? Its loss with a wrong word less that with the right one.

    python experiments/sprites/words.py --checkpoint runs/teacher/checkpoint --clips 64

Test-set clips, the same noise for every prompt. A word that is worth nothing at any noise level has not been learnt,
long before guided samples would show that it has.
"""

from __future__ import annotations

import argparse
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from longlive_jax.data.sprite_prompts import canonical
from longlive_jax.data.sprite_source import clip_combination, make_clip
from longlive_jax.data.sprites import ATTRIBUTES
from longlive_jax.pipeline import LongLivePipeline
from longlive_jax.schedule import add_noise
from longlive_jax.training.vae import encoded

SIGMAS = (0.5, 0.7, 0.8, 0.87, 0.92, 0.96, 0.99)
SEED, PART = 4321, 16


def wrong(combination, attribute: str, rng: np.random.Generator):
    """The same with another value of an attribute."""
    others = {*ATTRIBUTES[attribute]} - {getattr(combination, attribute)}
    return dataclasses.replace(combination, **{attribute: str(rng.choice(sorted(others)))})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--clips", type=int, default=64, help=f"a multiple of {PART}")
    parser.add_argument("--frames", type=int, default=15, help="latent frames of a clip")
    parser.add_argument("--first-given", action="store_true", help="the first frame comes without noise, not judged")
    args = parser.parse_args()
    given = int(args.first_given)

    pipe = LongLivePipeline.from_pretrained(args.checkpoint)
    decoder = pipe.decoder(pipe.config.sampler, args.frames)
    vae = nnx.merge(decoder.vae, pipe.params["vae"])
    right = [clip_combination(SEED, i, "test") for i in range(args.clips)]
    rng = np.random.default_rng(0)
    prompts = {"right": right, **{name: [wrong(c, name, rng) for c in right] for name in ATTRIBUTES}}

    @jax.jit
    def losses(params, latents, noise, sigma, embeds):
        model = nnx.merge(decoder.transformer, params)
        sigmas = jnp.full(latents.shape[:2], sigma).at[:, :given].set(0.0)
        noisy = add_noise(latents, noise, sigmas[..., None, None, None])
        flow = model.bidirectional(noisy, 1000 * sigmas, model.text_kv(embeds))
        return jnp.mean(jnp.square(flow - (noise - latents))[:, given:], axis=(1, 2, 3, 4))

    found = {name: [] for name in prompts}
    for start in range(0, args.clips, PART):
        part = range(start, start + PART)
        clips = np.stack([make_clip(SEED, i, 4 * args.frames - 3, "test")["frames"] for i in part])
        latents = jnp.concatenate([encoded(vae, clips[i : i + 4]) for i in range(0, PART, 4)])
        noise = jax.random.normal(jax.random.key(start), latents.shape)
        for name, combinations in prompts.items():
            embeds = pipe.encode_prompts([canonical(combinations[i]) for i in part])
            of = [losses(pipe.params["transformer"], latents, noise, sigma, embeds) for sigma in SIGMAS]
            found[name].append(np.stack([np.asarray(one) for one in of]))
    found = {name: np.concatenate(parts, axis=1) for name, parts in found.items()}
    print(f"{'noise level':24}", *(f"{sigma:12g}" for sigma in SIGMAS))
    print(f"{'loss':24}", *(f"{one:12.4f}" for one in found["right"].mean(1)))
    for name in ATTRIBUTES:
        more = found[name] - found["right"]
        errors = more.std(1, ddof=1) / args.clips**0.5
        cells = (f"{mean:.4f} ({error:.4f})" for mean, error in zip(more.mean(1), errors))
        print(f"{'wrong ' + name + ' (std. error)':30}", *(f"{cell:>15}" for cell in cells))


if __name__ == "__main__":
    main()
