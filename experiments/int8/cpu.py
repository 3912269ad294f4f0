"""Speed of int8 on this CPU: one pass of a block of Wan's width in float32, weight_only and w8a8, taken in turn.

    python experiments/int8/cpu.py --tokens 256

CPU seconds of the process, so that other work on the machine matters little; median over the rounds, and the median of
each round's ratio to float32. What it gains depends on the CPU: int8 units (VNNI, AMX) or none.
"""

from __future__ import annotations

import argparse
import json
import platform
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from longlive_jax.config import TransformerConfig
from longlive_jax.models.layers import structure
from longlive_jax.models.quantization import quantize_params, with_int8
from longlive_jax.models.transformer import WanTransformer

CONFIG = TransformerConfig(dim=1536, ffn_dim=8960, num_layers=1, num_heads=12, text_dim=64, text_length=64)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256, help="a square number")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    side = 2 * round(args.tokens**0.5)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((1, 1, side, side, 16), np.float32))
    make = lambda: WanTransformer(CONFIG, rngs=nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(make()))
    int8 = jax.tree.map(jnp.asarray, quantize_params(params))
    programs = {"float32": (structure(make), params)}
    programs |= {m: (structure(lambda m=m: with_int8(make(), m)), int8) for m in ("weight_only", "w8a8")}

    def flow(graph, params, x):
        network = nnx.merge(graph, params)
        return network.bidirectional(x, jnp.full((1, 1), 500.0), network.text_kv(jnp.ones((1, 64, 64))))

    run = jax.jit(flow, static_argnums=0)
    seconds = {name: [] for name in programs}
    for number in range(args.rounds + 1):
        for name, program in programs.items():
            began = time.process_time()
            run(*program, x).block_until_ready()
            if number:  # the first compiles
                seconds[name].append(time.process_time() - began)
    exact = np.array(seconds["float32"])
    for name, taken in seconds.items():
        ratio = np.median(np.array(taken) / exact)
        line = {"program": name, "tokens": args.tokens, "cpu_seconds": round(float(np.median(taken)), 4)}
        print(json.dumps(line | {"of_float32": round(float(ratio), 3), "machine": platform.processor()}), flush=True)


if __name__ == "__main__":
    main()
