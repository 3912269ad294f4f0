"""Speed on one H100 beside the official PyTorch code: every row in a process of its own, each kept as it is measured.

    python experiments/speed/h100.py --torch-repo LongLive --output experiments/speed/results/h100-2026-12-01.json
    python experiments/speed/h100.py --rehearse --torch-repo LongLive --output runs/rehearsal.json    # small, on a CPU
    python experiments/speed/report.py RESULTS.json

The same command again goes on where the first one stopped: rows that are done are kept, those that failed come last.
All of them take three or four calls; each ends with our first row again. Results of another kind of machine, other
versions or a rehearsal are not gone on with. Compiled programs are kept between calls (`--cache`).
A row that fails or runs too long is recorded with its error and what it had measured, and the rest goes on.
Rows are in `rows.py`; variants of ours are lines of `VARIANTS` here. Needs JAX, Flax and PyTorch, and none of the
packages of the command line.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
LATE, CUT = "out of time", "cut short"
"""Status of a row that took longer than it may, and of one that the end of the budget stopped: the next call begins
with those."""

PACKAGES = ("jax", "jaxlib", "flax", "numpy", "torch", "triton", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13")
"""Whose versions are kept with each row."""


class Elsewhere(Exception):
    """These results are not to be gone on with here."""


VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    # Beside the exact ones, not among them: they are never the "fastest of ours".
    "int8, w8a8": {"quantize": "w8a8"},
    "int8, weights only": {"quantize": "weight_only"},
    # What each should give, by what the compiled program shows: levers.md.
    "cuBLASLt": {"env": {"XLA_FLAGS": "--xla_gpu_enable_cublaslt=true"}},
    "cuBLASLt alone": {"env": {"XLA_FLAGS": "--xla_gpu_enable_cublaslt=true --xla_gpu_enable_triton_gemm=false"}},
    "keys in 2 parts": {"transformer": {"split_kv": 2}},
    "keys in 5 parts": {"transformer": {"split_kv": 5}},
    "layers in a loop": {"transformer": {"stacked": True}},
    "steps unrolled": {"decoder": {"unroll": True}},
    "command buffers in loops": {"env": {"XLA_FLAGS": "--xla_gpu_enable_command_buffer=+WHILE"}},
    "conv2d": {"vae": {"impl": "2d"}},
    "frames at a block's end": {"early_frames": False},
}
"""Ours, by name: arguments of `longlive_jax.bench.ours.Variant` (those of the modules, and environment)."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One process.

    Attributes:
      name: in the results.
      body: function of `rows.py`.
      seconds: it is stopped after so many.
      arguments: of the function.
      variant: of ours, if it measures ours.
      official: whether it needs the clone.
    """

    name: str
    body: str
    seconds: float
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    variant: str | None = None
    official: bool = False


def ours(body: str, name: str, seconds: float, variant: str = "default", **arguments: Any) -> Row:
    return Row(name if variant == "default" else f"{name}: {variant}", body, seconds, arguments, variant)


def stock(body: str, name: str, seconds: float, **arguments: Any) -> Row:
    return Row(name, body, seconds, arguments, official=True)


INT8 = ("int8, w8a8", "int8, weights only")

ROWS: Sequence[Row] = (
    # In the order of importance: what comes last is lost first when time runs out.
    Row("ceilings", "ceilings", 120),  # and the first import of both from a cold disk
    ours("ours_dit", "DiT, ours", 240),  # five programs to compile: init, denoise, finish, switch, pass
    stock("stock_dit", "DiT, stock with the LoRA merged", 120),
    stock("stock_dit", "DiT, stock as shipped (LoRA by peft)", 120, lora=True),
    ours("ours_vae", "VAE, ours", 90),
    ours("ours_vae", "VAE, ours", 90, "conv2d"),
    stock("stock_vae", "VAE, stock", 90, variants=("stock", "channels-last", "block", "block, channels-last")),
    ours("ours_attention", "attention, ours", 60),
    Row("attention, PyTorch", "torch_attention", 45),
    ours("ours_gemms", "matrix products, ours", 60),
    Row("matrix products, PyTorch", "torch_gemms", 45),
    ours("ours_video", "end to end, ours", 150),
    stock("stock_video", "end to end, stock as shipped", 120, lora=True),
    stock("stock_recache", "prompt switch, stock merged", 75),
    stock("stock_dit", "DiT, stock merged and compiled", 200, compiled=True),
    stock("stock_vae", "VAE, stock compiled", 150, variants=("block, channels-last, compiled",)),
    *(ours("ours_dit", "DiT, ours", 120, name, brief=True) for name in INT8),
    ours("ours_start", "start from a checkpoint, ours", 240),
    ours("ours_video", "end to end, ours", 150, "int8, w8a8"),
    ours("ours_error", "error, ours", 120),
    stock("stock_error", "error, stock", 90),
    *(ours("ours_pass", "pass, ours", 90, name) for name in ("cuBLASLt alone", "keys in 2 parts")),
    ours("ours_video", "end to end, ours", 150, "frames at a block's end"),
    *(ours("ours_error", "error, ours", 120, name) for name in INT8),
    *(ours("ours_pass", "pass, ours", 90, name) for name in ("cuBLASLt", "keys in 5 parts", "layers in a loop")),
    ours("ours_dit", "DiT, ours", 120, "steps unrolled", brief=True),
    ours("ours_dit", "DiT, ours", 120, "command buffers in loops", brief=True),
)

CLOSING = ours("ours_dit", "again: DiT, ours", 75, brief=True)
"""Our first row once more at the end of every call, so that a machine that slows down or speeds up is seen."""


def command(row: Row, into: Path, options: argparse.Namespace) -> tuple[list[str], dict[str, str]]:
    """Words and environment of a row's process."""
    settings = {"body": row.body, "arguments": dict(row.arguments), "rehearse": options.rehearse}
    settings["repo"] = None if options.torch_repo is None else str(options.torch_repo)
    variant = dict(VARIANTS[row.variant]) if row.variant else {}
    env = dict(variant.pop("env", {}))
    settings["variant"] = variant if row.variant else None
    words = [sys.executable, str(HERE / "rows.py"), json.dumps(settings), str(into)]
    flags = " ".join(filter(None, (os.environ.get("XLA_FLAGS"), env.pop("XLA_FLAGS", None))))
    if options.rehearse or row.variant is None and row.name != "ceilings":
        env["JAX_PLATFORMS"] = "cpu"  # beside PyTorch, JAX only tells shapes and would take some of the GPU
    if options.rehearse:
        flags = " ".join(f for f in flags.split() if "_gpu_" not in f) + " --xla_backend_optimization_level=0"
    return words, env | ({"XLA_FLAGS": flags} if flags else {})


def run_row(words: Sequence[str], env: Mapping[str, str], into: Path, seconds: float) -> dict[str, Any]:
    """Runs a row's process and gives its entry: status, seconds, the figures in `into`, and the error if it failed."""
    into.unlink(missing_ok=True)
    start = time.monotonic()
    with tempfile.TemporaryFile("w+") as log:
        environment = os.environ | dict(env) | {"ROW_STARTED": str(time.time())}
        process = subprocess.Popen(words, stdout=log, stderr=log, env=environment, start_new_session=True)
        try:
            code = process.wait(timeout=seconds)
            status = "done" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            status, code = LATE, None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        log.seek(0)
        text = log.read()
    entry: dict[str, Any] = {"status": status, "seconds": round(time.monotonic() - start, 1), "figures": figures(into)}
    if status != "done":
        last = [line for line in text.splitlines() if line.strip()][-8:]
        entry["error"] = "\n".join(last) if code is not None else f"stopped after {seconds:.0f} s"
        entry["log"] = text[-4000:]
    return entry


def figures(path: Path) -> dict[str, Any]:
    """What a row has measured: a JSON table a line; a line that was being written when it was stopped is left out."""
    merged: dict[str, Any] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            merged |= json.loads(line)
        except ValueError:
            break
    return merged


def write(path: Path, results: dict[str, Any]) -> None:
    """Writes the results; readers see the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(partial, path)


def here(rehearse: bool) -> dict[str, Any]:
    """What results depend on beside the code: the device, versions, and whether the shapes are the small ones.

    Asked of the driver and of the packages' records: JAX, once it runs, would take some of the GPU from the rows.
    """
    device = driver = card = None
    if not rehearse and shutil.which("nvidia-smi"):
        words = ["nvidia-smi", "--query-gpu=name,driver_version,uuid", "--format=csv,noheader"]
        lines = subprocess.run(words, capture_output=True, text=True).stdout.splitlines()
        device, driver, card = (word.strip() for word in lines[0].split(",")) if lines else (None, None, None)
    told = {"device": device or f"CPU, {platform.machine()}", "driver": driver, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            told[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            told[name] = None
    return told | {"rehearsal": rehearse, "card": card}


def refusal(results: Mapping[str, Any], place: Mapping[str, Any]) -> str | None:
    """Why rows measured at `place` (see `here`) must not be put beside those in `results`; None if they may.

    Another card of the same kind may go on with a file, since a lent machine cannot be chosen; rows note theirs.
    """
    for name, row in results["rows"].items():
        if row["status"] == "not run":
            continue
        before = row.get("on") or {}
        other = [key for key in place if key != "card" and before.get(key) != place[key]]
        if other:
            told = "; ".join(f"{key} was {before.get(key)}, is {place[key]}" for key in other)
            return f"'{name}' in the results was measured elsewhere: {told}. Give another --output"
    return None


def least_left(row: Row) -> float:
    """With fewer seconds left than this a row is not started: it would hardly get to its figures."""
    return min(row.seconds, max(15.0, min(60.0, row.seconds / 3)))


def pending(rows: Sequence[Row], results: dict[str, Any]) -> list[Row]:
    """The rows to run: those not tried yet or cut short by the budget, then those that failed."""
    tried = results["rows"]
    status = lambda row: tried.get(row.name, {}).get("status", "not run")
    left = [row for row in rows if status(row) != "done"]
    return sorted(left, key=lambda row: status(row) not in ("not run", CUT))


def run_all(
    rows: Sequence[Row],
    output: Path,
    budget: float,
    words: Callable[[Row, Path], tuple[list[str], dict[str, str]]],
    about: Mapping[str, Any],
    say: Callable[[str], None] = print,
    place: Mapping[str, Any] | None = None,
    closing: Row | None = None,
) -> dict[str, Any]:
    """Runs what is pending until the budget, in seconds, is spent; writes `output` after each row.

    Args:
      rows: the table.
      output: results so far, if there are any.
      budget: in seconds.
      words: words and environment of a row's process, which writes its figures to the path.
      about: said in the results.
      say: gets a line a row.
      place: what results depend on, see `here`; kept with each row.
      closing: a row that ends every call that ran another; its time is kept back from the others.

    Raises:
      Elsewhere: the results are of another machine, other versions, or a rehearsal's.
    """
    results = json.loads(output.read_text()) if output.exists() else {"rows": {}}
    place = dict(place or {})
    if (why := refusal(results, place)) is not None:
        raise Elsewhere(why)
    results |= dict(about)
    results["calls"] = call = results.get("calls", 0) + 1
    end = time.monotonic() + budget

    def run(row: Row, name: str, until: float) -> None:
        into = Path(scratch) / "figures.jsonl"
        entry = run_row(*words(row, into), into, min(row.seconds, left := until - time.monotonic()))
        if entry["status"] == LATE and left < row.seconds:  # the budget's end, no fault of the row
            entry["status"] = CUT
        before = results["rows"].get(name, {}).get("figures", {})
        if entry["status"] != "done":  # what an earlier try has seen stays
            entry["figures"] = before | entry["figures"]
        entry["measured"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        results["rows"][name] = entry | {"on": place, "call": call}
        say(f"{entry['status']:12} {entry['seconds']:6.1f} s  {name}")
        write(output, results)

    with tempfile.TemporaryDirectory() as scratch:
        reserve, ran = (closing.seconds if closing else 0.0), False
        for row in pending(rows, results):
            if end - reserve - time.monotonic() < least_left(row):
                not_run = {"status": "not run", "error": "the time was spent", "figures": {}}
                results["rows"].setdefault(row.name, not_run)
                continue
            run(row, row.name, end - reserve)
            ran = True
        if closing and ran:
            run(closing, f"{closing.name}, end of call {call}", end)
    order = {row.name: i for i, row in enumerate(rows)}
    results["rows"] = dict(sorted(results["rows"].items(), key=lambda item: order.get(item[0], len(order))))
    write(output, results)
    return results


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="results, JSON; goes on if it is there")
    parser.add_argument("--torch-repo", type=Path, help="clone of the official repository, branch v1.0")
    parser.add_argument("--budget", type=float, default=560, help="seconds for everything")
    cache = Path(tempfile.gettempdir()) / f"longlive-speed-programs-{os.getuid()}"
    parser.add_argument("--cache", type=Path, default=cache, help=f"folder for compiled programs, {cache}")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="only rows whose name contains one of these")
    parser.add_argument("--rehearse", action="store_true", help="all rows at small shapes on the CPU")
    options = parser.parse_args(args)
    chosen = [r for r in ROWS if options.rows is None or any(part in r.name for part in options.rows)]
    if options.torch_repo is None:
        chosen = [row for row in chosen if not row.official]
        print("no --torch-repo: the rows of the official code are left out")
    elif not (options.torch_repo / "pipeline" / "causal_inference.py").is_file():
        parser.error(f"{options.torch_repo} is no clone of LongLive's branch v1.0")
    if options.rehearse:  # a slow machine is no failure of a row
        chosen = [dataclasses.replace(row, seconds=10 * row.seconds) for row in chosen]
    about = {"rehearsal": options.rehearse, "variants": {k: str(v) for k, v in VARIANTS.items()}}
    options.cache.mkdir(parents=True, exist_ok=True)
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": str(options.cache.absolute()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "TORCHINDUCTOR_CACHE_DIR": str(options.cache.absolute() / "inductor"),
    }
    words = lambda row, into: command(row, into, options)
    closing = CLOSING if any(row.body == CLOSING.body for row in chosen) else None
    place = here(options.rehearse)
    try:
        results = run_all(chosen, options.output, options.budget, words, about, place=place, closing=closing)
    except Elsewhere as error:
        print(f"{options.output}: {error}", file=sys.stderr)
        return 2
    states = [results["rows"][row.name]["status"] for row in chosen]
    print(f"{options.output}: {states.count('done')} of {len(states)} rows done")
    return 0 if all(state == "done" for state in states) else 1


if __name__ == "__main__":
    sys.exit(main())
