"""Where int8 loses what: the error of each kind of layer, and of the whole transformer, against float32.

    python experiments/int8/errors.py --output runs/int8                # all models; 1.5 GB of memory
    python experiments/int8/errors.py --output runs/int8 --models micro

    layer alone     relative error of a kind's outputs on the inputs that it has in the network, worst layer
    weights alone   relative error of the flow when only that kind's weights are rounded
    whole           relative error of the flow with all layers of the blocks in int8

One bidirectional pass over 3 frames. `micro` and `wide` (Wan's width, 2 layers) have random weights, `sprites` those
that ship. What random weights cannot show is outliers of activations, which w8a8 minds.
"""

from __future__ import annotations

import argparse
import collections
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from longlive_jax import checkpoint, hub
from longlive_jax.config import ModelConfig, TransformerConfig
from longlive_jax.models.layers import Linear, structure
from longlive_jax.models.quantization import MATMULS, Int8Linear, dequantize, quantize, quantize_params, with_int8
from longlive_jax.models.transformer import WanTransformer
from longlive_jax.sidecar import versions

CONFIGS = {
    "micro": TransformerConfig(dim=128, ffn_dim=384, num_layers=6, num_heads=4, text_dim=96, text_length=24),
    "sprites": ModelConfig.sprites().transformer,
    "wide": TransformerConfig(dim=1536, ffn_dim=8960, num_layers=2, num_heads=12, text_dim=4096, text_length=64),
}
LATENTS = {"micro": (8, 8), "sprites": (8, 8), "wide": (16, 16)}

ERRORS: dict[tuple[str, str], list[float]] = collections.defaultdict(list)
"""(kind, way to multiply) -> error of each layer, filled by `Compared`."""


class Compared(nnx.Module):
    """A float layer that notes what its int8 forms would have given."""

    def __init__(self, linear: Linear, kind: str):
        self.linear, self.kind = linear, kind
        self.int8 = nnx.List([Int8Linear(linear, matmul) for matmul in MATMULS])

    def __call__(self, x):
        y = self.linear(x)
        for layer in self.int8:
            ERRORS[self.kind, layer.matmul].append(relative(layer(x), y))
        return y


def relative(a, b) -> float:
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


def random_params(cfg: TransformerConfig) -> checkpoint.Params:
    """Kernels of variance 1 / inputs, biases 0 and norms 1, both +- 0.1."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        name, x = path[-1].key, rng.standard_normal(leaf.shape, np.float32)
        if name == "kernel":
            return x / np.float32(np.sqrt(leaf.shape[-2]))
        return np.float32(0.1) * x + np.float32(name == "weight")

    return jax.tree_util.tree_map_with_path(draw, checkpoint.abstract_params("transformer", cfg))


def kinds(params: checkpoint.Params) -> dict[str, list[tuple]]:
    """Paths of the kernels by what they are: those inside the blocks each for itself, the others by their module."""
    found = collections.defaultdict(list)
    for path, _ in jax.tree_util.tree_leaves_with_path(params):
        names = [p.key for p in path]
        if names[-1] == "kernel":
            found[".".join(names[1:-1]) if names[0] == "blocks" else names[0]].append(path)
    return found


def measure(name: str) -> dict:
    cfg, (rows, columns) = CONFIGS[name], LATENTS[name]
    params = (
        checkpoint.load(hub.find("sprites"), "transformer", np.float32) if name == "sprites" else random_params(cfg)
    )
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((1, 3, rows, columns, cfg.in_channels), np.float32))
    prompt = jnp.asarray(rng.standard_normal((1, cfg.text_length, cfg.text_dim), np.float32))
    timesteps = jnp.full((1, 3), 700.0)

    def flow(network):
        return network.bidirectional(x, timesteps, network.text_kv(prompt))

    make = lambda: WanTransformer(cfg, rngs=nnx.Rngs(0))
    run = jax.jit(lambda graph, params: flow(nnx.merge(graph, params)), static_argnums=0)
    exact = run(structure(make), params)
    whole = {
        matmul: relative(run(structure(lambda: with_int8(make(), matmul)), quantize_params(params)), exact)  # noqa: B023
        for matmul in MATMULS
    }
    found = {}
    for kind, paths in kinds(params).items():
        rounded = jax.tree_util.tree_map_with_path(
            lambda path, leaf: dequantize(*quantize(leaf)) if path in paths else leaf,  # noqa: B023
            params,
        )
        found[kind] = {"weights alone": relative(run(structure(make), rounded), exact)}
    ERRORS.clear()
    apart = structure(lambda: WanTransformer(cfg, stacked=False, rngs=nnx.Rngs(0)))
    network = nnx.merge(apart, jax.tree.map(jnp.asarray, checkpoint.unstack(params)))
    for block in network.blocks:
        for path, module in list(nnx.iter_modules(block)):
            for child in [n for n, value in vars(module).items() if type(value) is Linear]:
                setattr(module, child, Compared(getattr(module, child), ".".join([*map(str, path), child])))
    flow(network)
    for (kind, matmul), errors in ERRORS.items():
        found[kind][f"layer alone, {matmul}"] = max(errors)
    return {"kinds": found, "whole": whole}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--output", type=Path, default=Path("runs/int8"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    report = {"versions": versions()}
    for name in args.models:
        report[name] = measure(name)
        (args.output / "errors.json").write_text(json.dumps(report, indent=1) + "\n")
        print(f"\n{name}: whole " + ", ".join(f"{m} {e:.3%}" for m, e in report[name]["whole"].items()), flush=True)
        for kind, errors in report[name]["kinds"].items():
            print(f"  {kind:16} " + "   ".join(f"{what} {error:.3%}" for what, error in errors.items()), flush=True)


if __name__ == "__main__":
    main()
