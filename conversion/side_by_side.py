"""Both implementations in one go: records with the official code, runs ours on the same inputs, compares and times."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from longlive_jax.conversion.record import typical
from longlive_jax.conversion.recording import Run
from longlive_jax.errors import UserError


def side_by_side(
    torch_repo: Path, run: Run, checkpoint: Path | None = None, output: Path | None = None, atol: float = 1e-4
) -> dict[str, Any]:
    """Runs both.

    Args:
      torch_repo: clone of the official repository, branch v1.0.
      run: what the official code runs on.
      checkpoint: ours, converted from the same files; by default they are converted for the occasion, in float32.
      output: where to keep the recorded case; by default it is not kept.
      atol: the largest absolute error that is ok.

    Returns:
      An entry as of `parity.run_case`, with `psnr` (dB, over the range of the official values) of each quantity, and
      `official` and `ours`: what each ran on, and its times in ms: `latents_ms` from noise and embeddings to latents,
      prompt switches included, and `vae_decode_ms`. Both sides are timed in a second run, after a first one to warm up.

    Raises:
      UserError: what the recorder or `run_case` refuses.
    """
    run.check()
    if output is not None and output.exists():
        raise UserError(f"{output} exists; name another --output")
    run = dataclasses.replace(run, warmup=max(run.warmup, 1))
    with tempfile.TemporaryDirectory() as scratch:
        folder, case_file = run.wan, output or Path(scratch) / "official.npz"
        if run.random_weights:
            folder = run.write_weights or Path(scratch) / "wan"
            run = dataclasses.replace(run, write_weights=folder)
        # In a process of its own, and before jax wakes up here: each side gets the whole GPU.
        words = ["--repo", str(torch_repo), "--output", str(case_file), *run.arguments()]
        done = subprocess.run(
            [sys.executable, "-m", "longlive_jax.conversion.record", *words], stderr=subprocess.PIPE, text=True,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        if done.returncode:
            last = done.stderr.strip().rpartition("\n")[2]
            if not last.startswith("record: "):
                print(done.stderr, file=sys.stderr)
            raise UserError(f"the official side did not run: {last.removeprefix('record: ')}")
        if checkpoint is None:
            checkpoint = _convert(folder, run, Path(scratch) / "checkpoint")
        return compare_and_time(checkpoint, case_file, atol)


def _convert(folder: Path, run: Run, output: Path) -> Path:
    from longlive_jax.conversion.convert import convert_wan

    loras = [(run.lora, 1.0)] if run.lora else []
    convert_wan(
        folder, output, generator=run.generator, generator_key=run.generator_key, loras=loras,
        lora_alpha=run.lora_alpha, dtype="float32",
    )  # fmt: skip
    return output


def compare_and_time(checkpoint: Path, case_file: Path, atol: float) -> dict[str, Any]:
    """Runs ours on a case of the recorder; see `side_by_side`."""
    import jax

    from longlive_jax.conversion.parity import compare, exact, read_case
    from longlive_jax.conversion.rollout import case_dtype, prepare, prepare_pixels

    case, times = read_case(case_file), {}
    with exact(case, checkpoint):
        latents, times["latents_ms"] = _timed(prepare(checkpoint, case))
        outputs = {"latents": (latents, case.frames("latents"))}
        if "pixels" in case.arrays:
            decode = prepare_pixels(checkpoint, case)
            pixels, times["vae_decode_ms"] = _timed(lambda: decode(latents))
            outputs["pixels"] = (pixels, case.frames("pixels"))
    entry = compare(case, outputs, atol)
    for name, quantity in entry["quantities"].items():
        quantity["psnr"] = psnr(quantity["rms"], case.arrays[name])
    recorded, parts = case.meta["recorded"], ("vae_decode_ms", "text_encode_ms")
    spent = {name: sum(values) for name, values in recorded["times"].items()}
    official = typical(recorded["times"]) | {name: spent[name] for name in parts if name in spent}
    official["latents_ms"] = official.pop("total_ms") - sum(spent.get(name, 0.0) for name in parts)
    ours = {
        "device": jax.devices()[0].device_kind,
        "dtype": case_dtype(case).name,
        "jax": jax.__version__,
        "times": times,
    }
    return entry | {"official": recorded | {"times": official}, "ours": ours}


def _timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """The result, and the milliseconds of a second call."""
    import jax

    jax.block_until_ready(function())
    start = time.perf_counter()
    result = jax.block_until_ready(function())
    return result, 1000 * (time.perf_counter() - start)


def psnr(rms: float, expected) -> float | None:
    """Peak signal to noise ratio in dB, the peak being the range of the expected values; None without any error."""
    peak = float(expected.max()) - float(expected.min())
    return 20 * math.log10(peak / rms) if rms > 0 and peak > 0 else None


def report(entry: dict[str, Any]) -> str:
    """An entry as lines to print."""
    lines = []
    for name, quantity in entry["quantities"].items():
        ratio = "exact" if quantity["psnr"] is None else f"{quantity['psnr']:.1f} dB"
        lines.append(f"{name}: max {quantity['max_abs']:.2e} rms {quantity['rms']:.2e} PSNR {ratio}")
    for side, versions in (("official", "torch"), ("ours", "jax")):
        told = entry[side]
        times = ", ".join(
            f"{name.removesuffix('_ms').replace('_', ' ')} {told['times'][name]:.1f} ms"
            for name in ("latents_ms", "vae_decode_ms", "text_encode_ms")
            if name in told["times"]
        )
        lines.append(f"{side} ({versions} {told[versions]}, {told['dtype']}, {told['device']}): {times}")
    return "\n".join(lines)
