"""Memory and time of `longlive convert` on folders of real size: random weights, written and converted.

    python experiments/conversion/memory.py 1.3b --folder /scratch          a Wan2.1-T2V-1.3B folder, 17 GB
    python experiments/conversion/memory.py 14b --folder /scratch           the 14B's layers and shards, 8 of 40 layers
    python experiments/conversion/memory.py small --folder /scratch         a rehearsal, 0.2 GB

Names, shapes, formats and dtypes are those of the released files. Numbers repeat every million, which neither the disk
nor the conversion notices. The folder is removed at the end, unless --keep.

The conversion is a process of its own, watched in /proc while it runs:

    peak        most memory in use at any time (VmHWM): its own and pages of files it has mapped. The system can take
                the latter back when it needs room, and counts them here all the same.
    own         most of that which is its own (RssAnon), seen ten times a second
    mapped      most of that which is pages of files (RssFile); 0.3 GB of them are the libraries' code

What the system keeps of files read and written (page cache) counts for no process and is not in these figures.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from longlive_jax import checkpoint
from longlive_jax.config import ModelConfig, TextEncoderConfig
from longlive_jax.conversion import sizes, tables
from longlive_jax.conversion.convert import DIT_NAME, TEXT_NAMES, VAE_NAMES
from longlive_jax.conversion.torch_files import stream_to_pickle
from longlive_jax.tensor_files import LazyTensor

GB = 1e9
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT32 = np.dtype(np.float32)


@dataclasses.dataclass(frozen=True)
class Layout:
    """A folder of original files: sizes, dtypes of the parts (None: not there), and size of a shard of the DiT."""

    config: ModelConfig
    transformer: np.dtype
    text_encoder: np.dtype | None
    shard_bytes: int


def layouts(layers: int | None) -> dict[str, Layout]:
    """By name; `layers` of the DiT if given."""
    cut = lambda config, default: dataclasses.replace(
        config, transformer=dataclasses.replace(config.transformer, num_layers=layers or default)
    )
    whole, large = ModelConfig.t2v_1_3b(), ModelConfig.t2v_14b()
    small = dataclasses.replace(
        cut(whole, 2), text_encoder=TextEncoderConfig(vocab_size=5000, ffn_dim=512, attention_dim=512, num_heads=8,
                                                      num_layers=2)
    )  # fmt: skip
    return {
        "1.3b": Layout(cut(whole, 30), FLOAT32, BFLOAT16, 10**12),
        "14b": Layout(cut(large, 8), FLOAT32, None, 3_000_000_000),
        "small": Layout(small, FLOAT32, BFLOAT16, 200_000_000),
    }


def random_tensors(part: str, cfg, dtype: np.dtype) -> list[LazyTensor]:
    """A part's tensors by original name, made when they are written."""
    numbers = (0.02 * np.random.default_rng(0).standard_normal(2**20, np.float32)).astype(dtype)
    shapes = tables.WAN[part](cfg).torch_shapes(checkpoint.tensor_shapes(part, cfg))
    return [LazyTensor(n, shape, dtype, lambda shape=shape: np.resize(numbers, shape)) for n, shape in shapes.items()]


def write(folder: Path, layout: Layout) -> None:
    """The folder as Wan has it; the DiT in shards if it is larger than one."""
    config = layout.config
    (folder / "config.json").write_text(json.dumps(sizes.wan_settings(config.transformer)))
    dit = random_tensors("transformer", config.transformer, layout.transformer)
    checkpoint.write_part(folder, DIT_NAME.removesuffix(".safetensors"), dit, layout.shard_bytes)
    stream_to_pickle(random_tensors("vae", config.vae, FLOAT32), folder / VAE_NAMES[0])
    if layout.text_encoder is not None:
        text = random_tensors("text_encoder", config.text_encoder, layout.text_encoder)
        stream_to_pickle(text, folder / TEXT_NAMES[0])


def watch(command: list[str]) -> dict[str, float]:
    """Runs a command; its peaks of memory in GB, and seconds."""
    started, peaks = time.monotonic(), {"VmHWM": 0, "RssAnon": 0, "RssFile": 0}
    process = subprocess.Popen(command)
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break  # just over
        lines = dict(line.split(":", 1) for line in status.splitlines())
        for name in peaks:
            peaks[name] = max(peaks[name], int(lines.get(name, "0").split()[0]) * 1024)
        time.sleep(0.1)
    if process.wait():
        sys.exit(f"{' '.join(command)} failed")
    names = {"VmHWM": "peak", "RssAnon": "own", "RssFile": "mapped"}
    figures = {names[name]: round(value / GB, 2) for name, value in peaks.items()}
    return {**figures, "seconds": round(time.monotonic() - started, 1)}


def files(folder: Path) -> dict[str, float]:
    """Sizes in GB of what is larger than a megabyte."""
    return {p.name: round(p.stat().st_size / GB, 2) for p in sorted(folder.iterdir()) if p.stat().st_size > 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("layout", choices=layouts(None))
    parser.add_argument("--folder", type=Path, required=True, help="where there is room for the files and their result")
    parser.add_argument("--layers", type=int, help="of the DiT")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=["bfloat16", "float32"])
    parser.add_argument("--plain", action="store_true", help="no second conversion with --verify")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--keep", action="store_true", help="leave the random weights")
    args = parser.parse_args()
    layout, figures = layouts(args.layers)[args.layout], {}
    folder = Path(tempfile.mkdtemp(prefix="longlive-memory-", dir=args.folder))
    try:
        (source := folder / "wan").mkdir()
        started = time.monotonic()
        write(source, layout)
        figures["written"] = {"files": files(source), "seconds": round(time.monotonic() - started, 1)}
        print("written", json.dumps(figures["written"]), flush=True)
        for dtype in args.dtype:
            for verify in ([],) if args.plain else ([], ["--verify"]):
                out = folder / "out"
                command = [sys.executable, "-c", "from longlive_jax.cli import main; main()", "convert"]
                command += ["--wan", str(source), "--output", str(out), "--dtype", dtype, *verify]
                name = " ".join([dtype, *verify])
                figures[name] = {**watch(command), "files": files(out)}
                print(name, json.dumps(figures[name]), flush=True)
                shutil.rmtree(out)
    finally:
        if not args.keep:
            shutil.rmtree(folder)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
