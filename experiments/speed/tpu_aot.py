"""What XLA makes of the model on TPUs, seen without one: compiles ahead of time and reads the program.

    pip install -e ".[tpu]"              # libtpu is 0.7 GB; no TPU is needed
    python experiments/speed/tpu_aot.py --chips v5e v5p v6e --json tpu.json

Compiles one decoded block of Wan 2.1 1.3B at 832 x 480 (4 steps, clean pass, window 12, bfloat16, with and without its
pixels) for one chip and for four. Memory, aliasing, kernels and collectives are those of the device. Nothing is run, so
nothing is timed: `floor_ms` is arithmetic on the data sheets' peaks, what no program can beat, not what this one does.

XLA's own count of FLOPs takes the body of a loop once and nothing inside a kernel; `tflop` is counted on the program
by `longlive_jax.training.flops`.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import itertools
import json
import math
import os
import re
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

# Two of libtpu's compilers may run side by side, and nobody is to be asked which TPU this machine is.
os.environ |= {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1"}

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from longlive_jax import checkpoint, sharding
from longlive_jax.cache import Window
from longlive_jax.config import ModelConfig
from longlive_jax.decoding.decoder import Decoder
from longlive_jax.models.layers import structure
from longlive_jax.models.transformer import WanTransformer
from longlive_jax.models.vae import VAE
from longlive_jax.training.flops import count_flops

GB = 1e9


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU chip: its smallest topology, and the data sheet's bfloat16 TFLOP/s, GB/s and GB of HBM."""

    topology: str
    tflops: float
    bandwidth: float
    memory: float


CHIPS = {
    "v5e": Chip("v5e:2x2", 197, 819, 16),
    "v5p": Chip("v5:2x2x1", 459, 2765, 95),
    "v6e": Chip("v6e:2x2", 918, 1640, 32),
}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


# MARK: programs


def make_decoder(config: ModelConfig, pixels: bool) -> Decoder:
    """As `LongLivePipeline` makes it."""
    transformer = structure(lambda: WanTransformer(config.transformer, rngs=nnx.Rngs(0)))
    vae = structure(lambda: VAE(config.vae, rngs=nnx.Rngs(0))) if pixels else None
    return Decoder(transformer, vae, config.sampler, Window.of(config.sampler, 21), dtype="bfloat16")


def arguments(decoder: Decoder, config: ModelConfig) -> tuple[Any, Any]:
    """Shapes of the parameters and of the state of one video."""
    parts = ("transformer", "vae") if decoder.vae is not None else ("transformer",)
    params = {part: checkpoint.abstract_params(part, getattr(config, part)) for part in parts}
    params = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16), params)
    cfg = config.transformer
    embeds = jax.ShapeDtypeStruct((1, cfg.text_length, cfg.text_dim), jnp.bfloat16)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
    return params, jax.eval_shape(decoder.init, params, embeds, keys)


def placed(tree: Any, mesh: Mesh, spec) -> Any:
    """Shapes with a place: `spec(path, shape)` on the mesh."""

    def place(path, leaf):
        name = "/".join(str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", p)))) for p in path)
        where = NamedSharding(mesh, spec(name, leaf.shape))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return jax.tree_util.tree_map_with_path(place, tree)


def compile_step(decoder: Decoder, config: ModelConfig, mesh: Mesh, layout: str = "default"):
    """The program of one block on the mesh, its state donated; with layout "auto" in the layouts it likes best."""
    params, state = arguments(decoder, config)

    def state_spec(name: str, shape) -> PartitionSpec:
        if re.match(r"(cache/[kv]|text_kv)\b", name):  # [layer, batch, ..., head, channel]
            batch, _, heads = sharding.heads_spec(mesh.abstract_mesh, shape[1], shape[-2])
            return PartitionSpec(None, batch, *[None] * (len(shape) - 4), heads, None)
        return PartitionSpec()

    params = placed(params, mesh, lambda name, shape: sharding.param_spec(name.partition("/")[2], shape, mesh))
    state = placed(state, mesh, state_spec)
    keep = jax.tree.map(lambda a: a.sharding, state)
    how: dict[str, Any] = {"out_shardings": (keep, None)}
    if layout == "auto":
        auto = jax.tree.map(lambda a: Format(Layout.AUTO, a.sharding), state)
        state = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), state)
        how = {"in_shardings": (None, auto), "out_shardings": (auto, None)}
    with sharding.using(mesh):
        step = jax.jit(Decoder.step, static_argnums=0, donate_argnums=2, **how)
        return step.lower(decoder, params, state).compile()


# MARK: reading a program


def array_bytes(text: str) -> int:
    """Bytes of the arrays in an HLO type, without the padding of their layouts."""
    bits = {"pred": 8, "bf16": 16}
    found = re.findall(r"\b(pred|bf16|[fsu]\d+)\[([\d,]*)\]", text)
    sizes = [bits.get(kind) or int(kind[1:]) for kind, _ in found]
    return sum(math.prod(int(n) for n in dims.split(",") if n) * size // 8 for size, (_, dims) in zip(sizes, found))


def census(compiled) -> dict[str, Any]:
    """Kernels, copies and collectives in the text of a program; what is in a loop counts once."""
    kernels, collectives, copies = collections.Counter(), collections.Counter(), []
    for line in compiled.as_text().splitlines():
        found = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\(", line)
        if not found:
            continue
        name, kind, opcode = found.groups()
        if opcode == "custom-call" and "tpu_custom_call" in line:
            kernels[re.sub(r"\.\d+$", "", name)] += 1
        elif opcode.removesuffix("-start") in COLLECTIVES:
            collectives[f"{opcode.removesuffix('-start')} {kind.split('{')[0]}"] += 1
        elif opcode in ("copy", "copy-start"):
            copies.append(array_bytes(kind) // (2 if opcode == "copy-start" else 1))
    return {"kernels": dict(kernels), "collectives": dict(collectives), "largest_copy_gb": max(copies, default=0) / GB}


def memory(compiled, cache_bytes: int) -> dict[str, Any]:
    """GB a chip needs; `peak` is arguments, temporaries and what of the results is not written over arguments."""
    m = compiled.memory_analysis()
    sizes = {
        "arguments": m.argument_size_in_bytes, "temporaries": m.temp_size_in_bytes, "aliased": m.alias_size_in_bytes,
        "program": m.generated_code_size_in_bytes,
    }  # fmt: skip
    sizes["peak"] = sum((sizes["arguments"], sizes["temporaries"], sizes["program"], m.output_size_in_bytes))
    sizes["peak"] -= sizes["aliased"]
    return {name: round(size / GB, 3) for name, size in (sizes | {"cache": cache_bytes}).items()}


def traffic(config: ModelConfig, params: Any, state: Any, pixels: bool) -> float:
    """Bytes that must cross HBM for a block at least: weights and cache once a pass, the decoder's caches both ways."""
    size = lambda tree: sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(tree))
    passes = len(config.sampler.steps) + 1
    total = passes * (size(params["transformer"]) + size((state.cache.k, state.cache.v)))
    return total + (size(params["vae"]) + 2 * size(state.vae) if pixels else 0)


@dataclasses.dataclass(frozen=True)
class Case:
    """A program: chip and how many of it, on which axis of the mesh, with pixels or without, layout of the state."""

    chip: str
    chips: int
    axis: str | None
    pixels: bool
    layout: str


def row(case: Case, config: ModelConfig) -> dict[str, Any]:
    """One program, compiled and read; with the compiler's message where it does not fit."""
    chip, chips = CHIPS[case.chip], case.chips
    topology = topologies.get_topology_desc(chip.topology, platform="tpu")
    mesh = sharding.make_mesh(**({case.axis: chips} if case.axis else {}), devices=topology.devices)
    decoder = make_decoder(config, case.pixels)
    params, state = arguments(decoder, config)
    flops, moved = count_flops(decoder.step, params, state), traffic(config, params, state, case.pixels)
    out = {
        **dataclasses.asdict(case), "layers": config.transformer.num_layers, "tflop": round(flops / 1e12, 2),
        "floor_ms": {
            "arithmetic": round(flops / chips / chip.tflops / 1e9, 1),
            "memory": round(moved / chips / chip.bandwidth / 1e6, 1),
        },
    }  # fmt: skip
    began = time.monotonic()
    try:
        compiled = compile_step(decoder, config, mesh, case.layout)
    except jax.errors.JaxRuntimeError as error:
        return out | {"fits": False, "error": str(error).splitlines()[0][:300]}
    cache = math.prod(state.cache.k.shape) * 2 * state.cache.k.dtype.itemsize
    used = memory(compiled, cache)
    cost = compiled.cost_analysis() or {}
    return out | {
        "compile_s": round(time.monotonic() - began, 1), "memory_gb": used, "fits": used["peak"] < chip.memory,
        "xla_tflop": round(cost.get("flops", 0) / 1e12, 3), **census(compiled),
    }  # fmt: skip


# MARK: command line


def table(rows: list[dict[str, Any]]) -> str:
    columns = (
        "chip", "chips", "layout", "pixels", "TFLOP", "floor, ms", "arguments", "temporaries", "aliased", "peak, GB",
        "splash", "collectives",
    )  # fmt: skip
    head = f"| {' | '.join(columns)} |"
    lines = [head, "|" + "---|" * (head.count("|") - 1)]
    for r in rows:
        m = r.get("memory_gb")
        floor = max(r["floor_ms"].values())
        pixels = "yes" if r["pixels"] else "no"
        start = f"| {r['chip']} | {r['chips']} | {r['layout']} | {pixels} | {r['tflop']} | {floor} |"
        if m is None:
            lines.append(f"{start} does not fit: {r['error']} |")
            continue
        kinds = collections.Counter()
        for key, count in r["collectives"].items():
            kinds[key.split()[0]] += count
        called = sum(n for name, n in r["kernels"].items() if "splash" in name)
        lines.append(
            f"{start} {m['arguments']} | {m['temporaries']} | {m['aliased']} | {m['peak']} | {called} | "
            f"{', '.join(f'{n} {kind}' for kind, n in sorted(kinds.items())) or '-'} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--counts", nargs="+", type=int, default=[1, 4], help="chips of one program: 1, 2 or 4")
    parser.add_argument("--pixels", nargs="+", choices=("no", "yes"), default=["no", "yes"])
    parser.add_argument("--axis", choices=("context", "tensor"), default="context", help="mesh axis for several chips")
    parser.add_argument("--layout", choices=("default", "auto"), default="default", help="of the state in memory")
    parser.add_argument("--layers", type=int, default=30, help="fewer for a quick look")
    parser.add_argument("--json", type=Path, help="rows that are there already are kept and not compiled again")
    args = parser.parse_args(argv)
    config = ModelConfig.t2v_1_3b()
    transformer = dataclasses.replace(config.transformer, num_layers=args.layers)
    config = dataclasses.replace(config, transformer=transformer)
    versions = {name: metadata.version(name) for name in ("jax", "libtpu", "flax")}
    rows = json.loads(args.json.read_text())["rows"] if args.json and args.json.exists() else []
    for pixels, count, chip in itertools.product(args.pixels, args.counts, args.chips):
        case = Case(chip, count, args.axis if count > 1 else None, pixels == "yes", args.layout)
        wanted = dataclasses.asdict(case) | {"layers": args.layers}
        if any(wanted.items() <= old.items() for old in rows):
            continue
        rows.append(row(case, config))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        if args.json:  # as it is made: a later row may run out of memory
            result = {"what": __doc__.splitlines()[0], "versions": versions, "rows": rows}
            args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(table(rows))
    return rows


if __name__ == "__main__":
    main()
