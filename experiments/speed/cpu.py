"""Wan's own widths on a CPU: one layer of the transformer and the whole VAE over a small picture, beside diffusers'.

    taskset -c 0 python experiments/speed/cpu.py --output experiments/speed/results/cpu-widths-2026-12-01.json

Processor time of one core, in turn, random weights; a whole 1.3B model would take minutes a block.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from longlive_jax.bench import counts, machine, published, timing, weights
from longlive_jax.bench.ours import Ours, Pass
from longlive_jax.config import ModelConfig, SamplerConfig, TransformerConfig, VAEConfig

LAYER = TransformerConfig(dim=1536, ffn_dim=8960, num_layers=1, num_heads=12)
PICTURES = {"dit": SamplerConfig(height=128, width=128), "vae": SamplerConfig(height=32, width=32)}


def in_turn(mine, theirs, flops: float, pairs: int) -> dict:
    """Ours against one variant."""
    pair = timing.in_turn(lambda: timing.once(mine), lambda: timing.once(theirs, published.wait), pairs=pairs)
    return pair.summary() | {"flops": flops}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args()
    if machine.cores() > 1:
        parser.error("processor time is of one core: begin with taskset -c 0")
    timing.use_processor_time()
    results = {"hardware": machine.hardware(), "versions": machine.versions(), "weights": weights.DESCRIPTION}
    for part, sampler in PICTURES.items():
        config = ModelConfig(LAYER, VAEConfig.wan(), None, sampler)
        ours = Ours(config, weights.ours(config, "float32"), "float32")
        if part == "dit":
            mine, flops = Pass(ours, ours.init(False)), counts.block(LAYER, sampler, ours.window)
            mine.attend(sampler.window)
            flops /= len(sampler.steps) + 1
            makes = {"eager": lambda s=sampler: published.transformer_pass(LAYER, s, "float32")}
        else:
            mine, flops = ours.decode_call(), counts.decode(config.vae, sampler, sampler.block_frames)
            makes = published.vae_decodes(config.vae, sampler, "float32")
        results[part] = {}
        for name, make in makes.items():
            results[part][name] = found = in_turn(mine, make(), flops, options.pairs)
            ms = found["a"]["p50_ms"], found["b"]["p50_ms"]
            print(
                f"{part}, {name}: ours {ms[0]:.1f} ms, diffusers {ms[1]:.1f} ms, ratio {found['ratio']:.2f}", flush=True
            )
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
