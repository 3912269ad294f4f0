"""A stage's training steps compiled for a slice of TPUs, without one: memory, kernels and collectives of each program.

    pip install -e ".[tpu]"              # libtpu is 0.7 GB; no TPU is needed
    python experiments/speed/tpu_train.py --stage init --config experiments/wan/init.yaml --topology v5:2x2x2 \
        --json tpu-train.json

The run's settings, on a mesh of data x fsdp devices; no checkpoint is needed, sizes come from the settings. Memory and
collectives are those of the device. Nothing is run, so nothing is timed. `estimate_gb` is what `longlive train --check`
says of the same mesh.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import os
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

# As in tpu_aot.py, before JAX is there.
os.environ |= {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1"}

import jax
from jax.experimental import topologies
from tpu_aot import GB, census, memory

from longlive_jax import sharding
from longlive_jax.training.ahead import programs
from longlive_jax.training.config_files import read_config
from longlive_jax.training.footprint import required_memory
from longlive_jax.training.stage_config import STAGES
from longlive_jax.training.stages import stage_of


def rows(
    stage_name: str, config_path: Path, topology: str, data: int, fsdp: int, changes: dict[str, Any], text: Path | None
):
    """One program at a time, as soon as it is compiled; its HLO into the folder `text`."""
    config = read_config(config_path, STAGES[stage_name])
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, data=data, fsdp=fsdp, **changes))
    stage = stage_of(config, Path("nowhere"), lambda line: print(line, file=sys.stderr))
    devices = topologies.get_topology_desc(topology, platform="tpu").devices
    mesh = sharding.make_mesh(data=data, fsdp=fsdp, devices=devices)
    estimate = sum(required_memory(stage).values()) / mesh.size / GB
    phase = stage.config.phases[0]
    for step, turns, lowered in programs(stage, phase, mesh):
        out = {
            "stage": stage_name, "topology": topology, "data": data, "fsdp": fsdp, "streams": config.run.streams,
            "first_step": step, "turns": [turn.learner for turn in turns], "estimate_gb": round(estimate, 2),
        }  # fmt: skip
        began = time.monotonic()
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            yield out | {"error": " ".join(str(error).split())[:600]}
            continue
        if text is not None:
            text.mkdir(parents=True, exist_ok=True)
            (text / f"{stage_name}-{step}.hlo").write_text(compiled.as_text())
        used = memory(compiled, 0)
        del used["cache"]
        yield out | {"compile_s": round(time.monotonic() - began, 1), "memory_gb": used, **census(compiled)}


def table(found: list[dict[str, Any]]) -> str:
    columns = (
        "stage", "chips", "program", "arguments", "temporaries", "aliased", "peak, GB", "--check, GB", "splash",
        "collectives",
    )  # fmt: skip
    head = f"| {' | '.join(columns)} |"
    lines = [head, "|" + "---|" * len(columns)]
    for r in found:
        start = f"| {r['stage']} | {r['topology']} | {' + '.join(r['turns'])}, step {r['first_step']}"
        if "error" in r:
            lines.append(f"{start} | does not compile: {r['error']} |")
            continue
        m, kinds = r["memory_gb"], collections.Counter()
        for key, count in r["collectives"].items():
            kinds[key.split()[0]] += count
        called = sum(n for name, n in r["kernels"].items() if "splash" in name)
        lines.append(
            f"{start} | {m['arguments']} | {m['temporaries']} | {m['aliased']} | {m['peak']} | {r['estimate_gb']} | "
            f"{called} | {', '.join(f'{n} {kind}' for kind, n in sorted(kinds.items())) or '-'} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", choices=("init", "long"), required=True)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--topology", default="v5:2x2x2", help="as jax.experimental.topologies names it")
    parser.add_argument("--data", type=int, default=1)
    parser.add_argument("--fsdp", type=int, default=8)
    parser.add_argument("--streams", type=int, help="of a batch; default: the settings'")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--text", type=Path, metavar="FOLDER", help="keep the compiled programs there, as HLO")
    args = parser.parse_args(argv)
    found = []
    changes = {} if args.streams is None else {"streams": args.streams}
    for row in rows(args.stage, args.config, args.topology, args.data, args.fsdp, changes, args.text):
        found.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
        if args.json:  # as it is made: a later program may run out of memory
            versions = {name: metadata.version(name) for name in ("jax", "libtpu", "flax")}
            result = {"what": __doc__.splitlines()[0], "versions": versions, "rows": found}
            args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(table(found))
    return found


if __name__ == "__main__":
    main()
