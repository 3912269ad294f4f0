"""What XLA makes of the model on an H100, seen without one: compiles ahead of time and counts what is in the program.

    pip install "jax[cuda13]"            # 4.6 GB, an environment of its own; no GPU and no driver is needed
    python experiments/speed/aot.py forward step vae switch --layers 2
    python experiments/speed/aot.py step --layers 30 --json step.json --hlo step.txt

Layouts, fusions, copies, aliasing, kernels called and memory are those of the device. Autotuning needs it: GEMM tilings
are defaults here, and nothing is timed. The numbers of `--layers` n scale by (30 - n): what is counted is each layer's.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import math
import os
import pathlib
import re
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from longlive_jax.cache import Window
from longlive_jax.compilation import compiler_options
from longlive_jax.config import ModelConfig, SamplerConfig
from longlive_jax.decoding.decoder import Decoder
from longlive_jax.models.layers import structure
from longlive_jax.models.transformer import WanTransformer
from longlive_jax.models.vae import VAE

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
"""XLA's description of an H100 SXM: the data sheet's figures."""

LARGE = 1_000_000
"""Bytes from which a copy or a transpose is listed."""


# MARK: compiling


def compile_for_h100(f, *args, static_argnums=None, donate_argnums=(), options: dict | None = None):
    """The compiled program of f on one H100 that exists only for the compiler; `args` are shapes."""
    topology = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1")
    mesh = Mesh(np.array(topology.devices), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec())
    place = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) if hasattr(a, "shape") else a
    args = [a if i == static_argnums else jax.tree.map(place, a) for i, a in enumerate(args)]
    jitted = jax.jit(f, static_argnums=static_argnums, donate_argnums=donate_argnums)
    with jax.set_mesh(mesh):  # says what kernels are for
        return jitted.lower(*args).compile(compiler_options=options)


# MARK: reading a program


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    kind: str  # opcode
    type: str  # of the result, with layout
    operands: tuple[str, ...]
    line: str


ITEM_BITS = {"pred": 8, "bf16": 16, "f16": 16, "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64}


def type_bytes(text: str) -> int:
    """Bytes of all arrays in a type, such as `(bf16[2,3]{1,0}, s32[])`."""
    total = 0
    for item, sizes in re.findall(r"\b(pred|bf16|[fsu]\d+|f8\w+)\[([\d,]*)\]", text):
        bits = ITEM_BITS.get(item) or int(re.search(r"\d+", item)[0])
        total += math.prod(int(n) for n in sizes.split(",") if n) * bits // 8
    return total


def parse(hlo: str) -> tuple[str, dict[str, list[Instruction]]]:
    """Name of the entry computation, and the instructions of every computation."""
    computations, current, entry = {}, None, None
    for line in hlo.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$", line):
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (found := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)", line)):
            rest = found[2]
            end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
            kind = re.match(r"\s*([\w\-]+)\(", rest[end:])
            start = end + kind.end() - 1
            inside = rest[start + 1 : _closing(rest, start)]
            operands = tuple(re.findall(r"%([\w.\-]+)", inside))
            current.append(Instruction(found[1], kind[1], rest[:end], operands, line.strip()))
    return entry, computations


def _closing(text: str, start: int) -> int:
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    raise ValueError(f"no closing bracket in {text[start : start + 80]}")


def executed(entry: str, computations: dict[str, list[Instruction]]) -> list[tuple[Instruction, int, str]]:
    """Every instruction that the program runs, how often, and in which computation; of a conditional, the branch with
    the most instructions."""
    out = []

    def walk(name: str, times: int):
        for one in computations[name]:
            out.append((one, times, name))
            if one.kind == "while":
                trips = re.search(r'known_trip_count":\{"n":"(\d+)"', one.line)
                body = re.search(r"body=%([\w.\-]+)", one.line)[1]
                walk(body, times * (int(trips[1]) if trips else 1))
            elif one.kind == "conditional":
                names = re.search(r"branch_computations=\{([^}]*)\}", one.line)
                names = names[1] if names else ",".join(re.findall(r"(?:true|false)_computation=(%[\w.\-]+)", one.line))
                branches = [n.strip().lstrip("%") for n in names.split(",")]
                walk(max(branches, key=lambda n: _size(n, computations)), times)
            elif one.kind in ("call", "async-start"):
                walk(re.search(r"(?:to_apply|calls)=%([\w.\-]+)", one.line)[1], times)

    walk(entry, 1)
    return out


def _size(name: str, computations) -> int:
    inner = [n for one in computations[name] for n in re.findall(r"(?:body|to_apply|calls)=%([\w.\-]+)", one.line)]
    return len(computations[name]) + sum(len(computations[n]) for n in inner)


FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "async-start", "async-done", "async-update", "copy-done", "partition-id", "replica-id", "iota", "add-dependency",
}  # fmt: skip
"""Instructions that launch nothing themselves."""


def census(hlo: str) -> dict:
    """What is in an optimised program. Bytes are of results, times how often they run."""
    entry, computations = parse(hlo)
    run = executed(entry, computations)
    kinds, calls, convolutions, moved = (collections.Counter() for _ in range(4))
    traffic: collections.Counter = collections.Counter()
    types = {one.name: one.type for one, _, _ in run}
    for one, times, _ in run:
        if one.kind in FREE:
            continue
        inside = _fused(one, computations)
        target = re.search(r'custom_call_target="([^"]*)"', one.line)
        if target:
            calls[target[1]] += times
            if labels := re.search(r"dim_labels=([\w>\-]+)", one.line):
                convolutions[labels[1]] += times
        kind = target[1] if target else "fusion with dot" if any(i.kind == "dot" for i in inside) else one.kind
        kinds[kind] += times
        traffic[kind] += times * _traffic(one, inside, types)
        if (what := movement(one, computations)) and type_bytes(one.type) >= LARGE:
            moved[what] += times
            moved[f"{what}, bytes"] += times * type_bytes(one.type)
    loops = [re.search(r'known_trip_count":\{"n":"(\d+)"', one.line) for one, _, _ in run if one.kind == "while"]
    return {
        "launches": sum(kinds.values()),
        "by kind": dict(kinds.most_common()),
        "custom calls": dict(calls),
        "convolutions": dict(convolutions),
        "moved, 1 MB or more": dict(moved),
        "GB read and written": {k: round(v / 1e9, 2) for k, v in [("all", traffic.total()), *traffic.most_common()]},
        "loops, trips": [int(trips[1]) if trips else None for trips in loops],
    }


def memory(compiled) -> dict:
    """Bytes of a compiled program's buffers."""
    found = compiled.memory_analysis()
    return {
        name: getattr(found, f"{key}_size_in_bytes")
        for name, key in (("arguments", "argument"), ("outputs", "output"), ("aliased", "alias"), ("temporary", "temp"))
    }


def _fused(one: Instruction, computations) -> list[Instruction]:
    called = re.search(r"calls=%([\w.\-]+)", one.line) if one.kind == "fusion" else None
    return computations[called[1]] if called else []


def _traffic(one: Instruction, inside: list[Instruction], types: dict[str, str]) -> int:
    """Bytes that an instruction reads and writes; of what it slices or updates in place, the slice alone."""
    kinds = {i.kind for i in inside} | {one.kind}
    result = type_bytes(one.type)
    operands = [type_bytes(types.get(name, "")) for name in one.operands]
    if "dynamic-update-slice" in kinds:
        updates = [i for i in inside if i.kind == "dynamic-update-slice"]
        sizes = {i.name: type_bytes(i.type) for i in inside}
        return sum(2 * sizes.get(i.operands[1], 0) for i in updates)
    if "dynamic-slice" in kinds:
        return 2 * result
    return result + sum(operands)


MOVES = {"copy", "transpose", "slice", "dynamic-slice", "concatenate", "pad", "reverse"}
IDLE = {"parameter", "constant", "bitcast", "convert", "tuple", "get-tuple-element", "reshape", "broadcast", "select"}
INDEXING = {"compare", "clamp", "add", "subtract", "multiply"}


def movement(one: Instruction, computations) -> str | None:
    """The name of an instruction that only moves numbers: a copy, a slice, a transpose, or a fusion of such."""
    if one.kind in MOVES | {"copy-start"}:
        return one.kind
    inside = _fused(one, computations)
    # Of indices there may be arithmetic; of arrays not.
    kinds = {i.kind for i in inside if not (i.kind in INDEXING and type_bytes(i.type) <= 8)}
    return "fusion of " + "+".join(sorted(kinds & MOVES)) if kinds & MOVES and kinds <= MOVES | IDLE else None


def largest(hlo: str, count: int = 20) -> list[str]:
    """The movements of the most bytes, one line each, for reading."""
    entry, computations = parse(hlo)
    rows = []
    for one, times, where in executed(entry, computations):
        what = movement(one, computations) if one.kind not in FREE else None
        if what and (size := type_bytes(one.type)) >= LARGE:
            source = re.search(r'op_name="([^"]*)"', one.line)
            origin = source[1][-70:] if source else where
            rows.append((times * size, f"{times:4} x {size / 1e6:8.1f} MB  {what:28} {one.type[:44]:44} {origin}"))
    return [text for _, text in sorted(rows, key=lambda row: -row[0])[:count]]


# MARK: the programs


def abstract(make) -> dict:
    """Shapes of a network's parameters in bfloat16."""
    params = nnx.to_pure_dict(nnx.state(nnx.eval_shape(make)))
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16), params)


@dataclasses.dataclass
class Case:
    """Shapes of everything, for one choice of settings."""

    layers: int
    stacked: bool
    height: int
    width: int
    split_kv: int
    conv: str
    unroll: bool
    recache: str
    donate_vae: bool

    def __post_init__(self):
        config = ModelConfig.t2v_1_3b()
        self.cfg = dataclasses.replace(config.transformer, num_layers=self.layers)
        self.sampler = dataclasses.replace(SamplerConfig(), height=self.height, width=self.width, rope="absolute")
        self.window = Window.of(self.sampler, 120)
        make = lambda: WanTransformer(self.cfg, stacked=self.stacked, split_kv=self.split_kv, rngs=nnx.Rngs(0))
        make_vae = lambda: VAE(config.vae, impl=self.conv, rngs=nnx.Rngs(0))
        self.graphs = structure(make), structure(make_vae)
        self.params = {"transformer": abstract(make), "vae": abstract(make_vae)}
        self.embeds = jax.ShapeDtypeStruct((1, self.cfg.text_length, self.cfg.text_dim), jnp.bfloat16)

    def least(self) -> dict[str, float]:
        """GB that a pass must read: every layer's weights, and the keys and values of a full window."""
        state = self.state(self.decoder(False))
        gigabytes = lambda tree: round(sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree)) / 1e9, 2)
        weights = gigabytes(self.params["transformer"]["blocks"])
        return {"weights": weights, "cache": gigabytes((state.cache.k, state.cache.v))}

    def decoder(self, pixels: bool) -> Decoder:
        transformer, vae = self.graphs
        return Decoder(transformer, vae if pixels else None, self.sampler, self.window, "bfloat16", self.unroll)

    def state(self, decoder: Decoder):
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
        return jax.eval_shape(decoder.init, self.params, self.embeds, keys)


def forward(case: Case, options):
    """One pass of the causal transformer over a block."""
    decoder = case.decoder(False)
    state = case.state(decoder)
    x = jax.ShapeDtypeStruct((1, decoder.block, *decoder.latent_size, case.cfg.in_channels), jnp.bfloat16)

    def run(params, cache, x, timesteps, text_kv, position):
        return nnx.merge(case.graphs[0], params).causal(x, timesteps, text_kv, cache, case.window, position)

    times = jax.ShapeDtypeStruct((1, decoder.block), jnp.float32)
    args = case.params["transformer"], state.cache, x, times, state.text_kv, state.position
    return compile_for_h100(run, *args, donate_argnums=1, options=options)


def step(case: Case, options, pixels: bool = False):
    """A block: four denoising passes and the clean one."""
    decoder = case.decoder(pixels)
    return compile_for_h100(decoder.step, case.params, case.state(decoder), donate_argnums=1, options=options)


def step_vae(case: Case, options):
    """A block with its pixels."""
    return step(case, options, pixels=True)


def denoise(case: Case, options):
    """A block's denoising passes alone, as a stream runs them."""
    decoder = case.decoder(False)
    return compile_for_h100(decoder.denoise, case.params, case.state(decoder), donate_argnums=1, options=options)


def finish(case: Case, options):
    """A block's clean pass alone, as a stream runs it."""
    decoder = case.decoder(False)
    return compile_for_h100(decoder.finish, case.params, case.state(decoder), donate_argnums=1, options=options)


def switch(case: Case, options):
    """A prompt switch with recache; which kind is said by the host, or chosen on the device (as in a scan)."""
    decoder = case.decoder(False)
    how = {"rebuild": 1, "window": 2, "device": None}[case.recache]
    args = case.params, case.state(decoder), case.embeds, how
    return compile_for_h100(decoder.switch, *args, static_argnums=3, donate_argnums=1, options=options)


def vae(case: Case, options):
    """A block's latents to uint8 frames, for a block that is not the first."""
    decoder = case.decoder(True)
    z = jax.ShapeDtypeStruct((1, decoder.block, *decoder.latent_size, case.cfg.in_channels), jnp.float32)
    args = case.params, z, case.state(decoder).vae, False
    donate = 2 if case.donate_vae else ()
    return compile_for_h100(decoder.pixels, *args, static_argnums=3, donate_argnums=donate, options=options)


PROGRAMS = {
    "forward": forward, "step": step, "step+vae": step_vae, "denoise": denoise, "finish": finish, "switch": switch,
    "vae": vae,
}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", nargs="+", choices=PROGRAMS)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--stacked", action="store_true", help="scan over stacked layers instead of unrolling them")
    parser.add_argument("--unroll-steps", action="store_true", help="unroll the denoising steps too")
    parser.add_argument("--size", type=int, nargs=2, default=(480, 832), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--split-kv", type=int, default=1)
    parser.add_argument("--conv", choices=("2d", "3d"), default="3d", help="the VAE's causal convolutions")
    parser.add_argument("--recache", choices=("rebuild", "window", "device"), default="window")
    parser.add_argument("--donate-vae", action="store_true", help="donate the VAE's caches")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="of XLA, without --")
    parser.add_argument("--hlo", help="where to write the optimised HLO")
    parser.add_argument("--json", help="where to write the counts")
    args = parser.parse_args()
    height, width = args.size
    case = Case(
        args.layers, args.stacked, height, width, args.split_kv, args.conv, args.unroll_steps, args.recache,
        args.donate_vae,
    )  # fmt: skip
    options = compiler_options("gpu") | {k: _value(v) for k, v in (one.split("=", 1) for one in args.option)}
    print("GB that a pass must read:", case.least())
    results = {}
    for name in args.program:
        started = time.monotonic()
        compiled = PROGRAMS[name](case, options)
        hlo = compiled.as_text()
        seconds = round(time.monotonic() - started, 1)
        results[name] = {"compile seconds": seconds, "memory": memory(compiled)} | census(hlo)
        print(name, json.dumps(results[name], indent=1), *largest(hlo), sep="\n", flush=True)
        if args.hlo:
            pathlib.Path(args.hlo).write_text(hlo)
        if args.json:
            pathlib.Path(args.json).write_text(json.dumps({"settings": vars(args), "programs": results}, indent=1))


def _value(text: str):
    return {"true": True, "false": False}.get(text.lower(), text)


if __name__ == "__main__":
    sys.exit(main())
