"""What int8 costs on the sprites model: the same prompts and seeds in float32 and in int8, clip by clip.

    python experiments/int8/quality.py --clips 200 --output runs/int8

Pictures: PSNR against float32, all decoded by the same VAE in float32. Adherence: what a clip shows, read off its last
second, against its prompt; the difference to float32 on the same clips with its 95 % interval (of paired differences).
A line a clip is appended to `clips.jsonl`; a run that was interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from longlive_jax.config import FPS, replace
from longlive_jax.data.sprite_prompts import canonical
from longlive_jax.data.sprites import ATTRIBUTES, combinations_of
from longlive_jax.decoding.decoder import Decoder, to_uint8
from longlive_jax.evaluation.sprites import read
from longlive_jax.pipeline import LongLivePipeline
from longlive_jax.prompts import latent_frames
from longlive_jax.sidecar import versions

VARIANTS = {
    "float32": {"dtype": "float32"},
    "int8 weight_only": {"dtype": "float32", "quantize": "int8", "int8_matmul": "weight_only"},
    "int8 w8a8": {"dtype": "float32", "quantize": "int8", "int8_matmul": "w8a8"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8 w8a8, text encoder int8": {
        "dtype": "float32", "quantize": "int8", "quantize_text_encoder": True, "int8_matmul": "w8a8",
    },
}  # fmt: skip


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """dB between uint8 videos."""
    error = np.mean((a.astype(np.float64) - b) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-12)))


_init, _step = (jax.jit(method, static_argnums=0) for method in (Decoder.init, Decoder.step))
_pixels = jax.jit(lambda graph, params, z: to_uint8(nnx.merge(graph, params).decode(z)[0]), static_argnums=0)


def run(pipe: LongLivePipeline, prompts: list[str], seeds, num_frames: int) -> np.ndarray:
    """Latents of videos. Without the VAE, whose program would be compiled again for each variant."""
    sampler = replace(pipe.config.sampler, rope="absolute")
    decoder = dataclasses.replace(pipe.decoder(sampler, num_frames), vae=None)
    keys = jax.numpy.stack([jax.random.key(seed) for seed in seeds])
    state, latents = _init(decoder, pipe.params, pipe.encode_prompts(prompts), keys), []
    for _ in range(num_frames // sampler.block_frames):
        state, out = _step(decoder, pipe.params, state)
        latents.append(np.asarray(out.latents))
    return np.concatenate(latents, axis=1)


def measure(args) -> list[dict]:
    """A record a clip: for each variant the attributes that are right, and the PSNR; from the file where it has it."""
    pool = combinations_of("test")
    order = np.random.default_rng(0).permutation(len(pool))
    combinations = [pool[int(i)] for i in np.resize(order, args.clips)]
    file = args.output / "clips.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    names = list(VARIANTS)[: args.variants]
    pipes = {name: LongLivePipeline.from_pretrained(args.checkpoint, **VARIANTS[name]) for name in names}
    exact = pipes["float32"]
    num_frames = latent_frames(args.seconds, exact.config.sampler.block_frames)
    for start in range(len(records), args.clips, args.batch_size):
        part = combinations[start : start + args.batch_size]
        seeds, frames, seconds = range(start, start + len(part)), {}, {}
        for name, pipe in pipes.items():
            began = time.process_time()
            latents = run(pipe, [canonical(c) for c in part], seeds, num_frames)
            seconds[name] = (time.process_time() - began) / len(part)
            frames[name] = np.asarray(_pixels(exact._vae, exact.params["vae"], latents))
        lines = []
        for i, combination in enumerate(part):
            record = {"prompt": canonical(combination), "seed": start + i}
            for name, videos in frames.items():
                reading = read(videos[i][-FPS:])
                right = {a: getattr(reading, a) == getattr(combination, a) for a in ATTRIBUTES}
                close = psnr(videos[i], frames["float32"][i])
                record[name] = {"right": right, "psnr": close, "cpu_seconds": round(seconds[name], 3)}
            lines.append(record)
        with open(file, "a", encoding="utf-8") as out:
            out.writelines(json.dumps(line) + "\n" for line in lines)
        records += lines
        print(len(records), {name: round(value, 2) for name, value in seconds.items()}, flush=True)
    return records[: args.clips]


def paired(after: np.ndarray, before: np.ndarray) -> dict[str, float]:
    """Mean of the differences in points, and its 95 % interval."""
    difference = 100 * (after.astype(float) - before)
    half = 1.96 * difference.std(ddof=1) / np.sqrt(len(difference))
    return {"points": difference.mean(), "low": difference.mean() - half, "high": difference.mean() + half}


def summary(records: list[dict]) -> dict:
    found = {}
    for name in (n for n in VARIANTS if n in records[0]):
        shares, differences = {}, {}
        rights = lambda n: np.array([[r[n]["right"][a] for a in ATTRIBUTES] for r in records])
        for i, attribute in enumerate(ATTRIBUTES):
            shares[attribute] = rights(name)[:, i].mean()
            differences[attribute] = paired(rights(name)[:, i], rights("float32")[:, i])
        # Of a clip's attributes, the share that is right.
        shares["mean"] = rights(name).mean()
        differences["mean"] = paired(rights(name).mean(1), rights("float32").mean(1))
        close = [r[name]["psnr"] for r in records]
        found[name] = {
            "shares": shares, "against float32": differences,
            "psnr": {"median": float(np.median(close)), "5 %": float(np.quantile(close, 0.05)), "worst": min(close)},
            "cpu_seconds": float(np.median([r[name]["cpu_seconds"] for r in records])),
        }  # fmt: skip
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="sprites")
    parser.add_argument("--clips", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--batch-size", type=int, default=10)
    parser.add_argument("--variants", type=int, default=3, help="how many of the variants, in their order")
    parser.add_argument("--output", type=Path, default=Path("runs/int8"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    found = summary(measure(args))
    report = {
        "checkpoint": args.checkpoint,
        "clips": args.clips,
        "seconds": args.seconds,
        "variants": found,
        "versions": versions(),
    }
    (args.output / "quality.json").write_text(json.dumps(report, indent=1) + "\n")
    for name, figures in found.items():
        print(f"\n{name}: PSNR median {figures['psnr']['median']:.1f} dB, worst {figures['psnr']['worst']:.1f} dB")
        for attribute, share in figures["shares"].items():
            d = figures["against float32"][attribute]
            print(f"  {attribute:12} {share:6.1%}   {d['points']:+.1f} points ({d['low']:+.1f} to {d['high']:+.1f})")


if __name__ == "__main__":
    main()
