"""What XLA makes of a feed-forward layer in int8 on an H100, seen without one.

    pip install "jax[cuda13]"            # an environment of its own; no GPU and no driver is needed
    python experiments/int8/h100.py --hlo runs/int8

4680 tokens (a block of LongLive at 480p), 1536 -> 8960 -> 1536, bfloat16 activations; layers apart and scanned. Prints
the kernels of each program, what they write, and the temporary memory. Times need the device.
"""

# ruff: noqa: E402 - see below
from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "speed"))
import jax
import jax.numpy as jnp
from aot import compile_for_h100  # before jax: it keeps jax from looking for a GPU
from flax import nnx

from longlive_jax.models.layers import layer_norm, run_layers, stack_layers
from longlive_jax.models.quantization import MATMULS, with_int8
from longlive_jax.models.transformer import MLP, gelu_tanh

TOKENS, WIDTH, HIDDEN, LAYERS = 4680, 1536, 8960, 2


class Network(nnx.Module):
    """Normalised feed-forward layers, each added to its input."""

    def __init__(self, stacked: bool):
        make = lambda rngs: MLP(WIDTH, HIDDEN, WIDTH, gelu_tanh, rngs=rngs)
        if stacked:
            self.blocks = stack_layers(make, LAYERS, nnx.Rngs(0))
        else:
            self.blocks = nnx.List([make(nnx.Rngs(i)) for i in range(LAYERS)])

    def __call__(self, x):
        layer = lambda mlp, x, _: (x + mlp(layer_norm(x, 1e-6).astype(x.dtype)), None)
        xs = None if not isinstance(self.blocks, nnx.List) else [None] * LAYERS
        return run_layers(self.blocks, layer, x, xs)[0]


def program(matmul: str | None, stacked: bool):
    make = lambda: Network(stacked)
    graph, state = nnx.split(nnx.eval_shape((lambda: with_int8(make(), matmul)) if matmul else make))
    half = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype if a.dtype == jnp.int8 else jnp.bfloat16)
    scales = lambda path, a: a if path[-1].key == "scale" else half(a)
    params = jax.tree_util.tree_map_with_path(scales, nnx.to_pure_dict(state))
    x = jax.ShapeDtypeStruct((TOKENS, WIDTH), jnp.bfloat16)
    return compile_for_h100(lambda params, x: nnx.merge(graph, params)(x), params, x)


def kernels(text: str):
    """Lines of the program that start a kernel: what it writes, and its kind."""
    for line in text.splitlines():
        found = re.match(r"\s*(?:ROOT )?%(\S+) = (\(.*?\)|\S+) (fusion|custom-call|copy|transpose)\(", line)
        if found and "kind=kLoop, calls=%wrapped" not in line:
            target = re.search(r'custom_call_target="([^"]+)"|"kind":"([^"]+)"|kind=(\w+)', line)
            yield found[1], found[2], next((g for g in target.groups() if g), "") if target else found[3]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hlo", type=Path, help="folder for the programs' text")
    args = parser.parse_args()
    for stacked in (False, True):
        for matmul in (None, *MATMULS):
            name = f"{matmul or 'bfloat16'}-{'scanned' if stacked else 'apart'}"
            compiled = program(matmul, stacked)
            memory = compiled.memory_analysis()
            print(f"\n{name}: weights and input {memory.argument_size_in_bytes / 1e6:.0f} MB, "
                  f"temporaries {memory.temp_size_in_bytes / 1e6:.0f} MB")  # fmt: skip
            for kernel, shape, kind in kernels(compiled.as_text()):
                print(f"    {kind:28} {shape:32} {kernel}", flush=True)
            if args.hlo:
                args.hlo.mkdir(parents=True, exist_ok=True)
                (args.hlo / f"{name}.hlo").write_text(compiled.as_text())


if __name__ == "__main__":
    main()
