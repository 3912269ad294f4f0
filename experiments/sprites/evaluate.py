"""Adherence of a sprites checkpoint: which share of test-set clips show what their prompt says.

    python experiments/sprites/evaluate.py --checkpoint sprites --clips 200

Prompts of combinations that were never trained on; attributes read off the last second of each clip. Writes a JSON with
the figures (95 % intervals by Wilson) and a contact sheet to look at.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

from longlive_jax.config import FPS
from longlive_jax.data.sprite_prompts import canonical
from longlive_jax.data.sprites import ATTRIBUTES, combinations_of
from longlive_jax.evaluation.figures import adherence
from longlive_jax.evaluation.intervals import wilson
from longlive_jax.evaluation.sprites import read
from longlive_jax.pipeline import LongLivePipeline
from longlive_jax.sidecar import versions
from longlive_jax.video import contact_sheet, save_image


def evaluate(pipe: LongLivePipeline, clips: int, seconds: float, batch_size: int, **settings) -> tuple[dict, list]:
    """Adherence of `clips` clips over their last second, with 95 % intervals by Wilson.

    Returns:
      A report; and seven frames of each clip, with its combination and reading.
    """
    pool = combinations_of("test")
    order = np.random.default_rng(0).permutation(len(pool))
    combinations = [pool[int(i)] for i in np.resize(order, clips)]
    readings, sheets, started = [], [], time.monotonic()
    for start in range(0, clips, batch_size):
        part = combinations[start : start + batch_size]
        seeds = list(range(start, start + len(part)))
        video = pipe([canonical(c) for c in part], seconds=seconds, seed=seeds, **settings)
        readings += [read(frames[-FPS:]) for frames in video.frames]
        sheets += [frames[:: max(1, len(frames) // 6)][:7] for frames in video.frames]
    figures = {
        name: {"share": share, "interval": wilson(round(share * clips), clips)}
        for name, share in adherence(readings, combinations).items()
    }
    report = {
        "checkpoint": pipe.checkpoint_info, "clips": clips, "seconds": seconds, "adherence": figures,
        "settings": settings, "minutes": round((time.monotonic() - started) / 60, 2), "versions": versions(),
    }  # fmt: skip
    return report, list(zip(sheets, combinations, readings))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="sprites")
    parser.add_argument("--clips", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--steps", type=float, nargs="*")
    parser.add_argument("--output", type=Path, default=Path("outputs/adherence"))
    args = parser.parse_args()

    settings = {"steps": args.steps} if args.steps else {}
    pipe = LongLivePipeline.from_pretrained(args.checkpoint)
    report, seen = evaluate(pipe, args.clips, args.seconds, args.batch_size, **settings)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "adherence.json").write_text(json.dumps(report, indent=1) + "\n")
    sheets = np.concatenate([sheet for sheet, *_ in seen[:16]])
    save_image(contact_sheet(sheets, 14, scale=2), args.output / "clips.png")
    for name in (*ATTRIBUTES, "all"):
        share, (low, high) = report["adherence"][name].values()
        print(f"{name:12} {share:6.1%}  ({low:.1%} to {high:.1%})")
    for _, combination, reading in seen[:8]:
        print(canonical(combination), "->", {name: getattr(reading, name) for name in ATTRIBUTES})


if __name__ == "__main__":
    main()
