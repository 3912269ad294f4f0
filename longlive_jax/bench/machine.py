"""What a measurement ran on, and what that could do at most: a large matrix product, and a copy."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from longlive_jax.bench.timing import measure, once

PACKAGES = ("jax", "jaxlib", "flax", "numpy", "torch", "diffusers", "triton")
GPU_QUERY = "name,driver_version,power.limit,clocks.max.sm,clocks.sm,clocks.mem,temperature.gpu"


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def hardware() -> dict[str, Any]:
    """Device, processor and load of this machine; reads only."""
    devices = jax.devices()
    found = {
        "backend": jax.default_backend(),
        "device": devices[0].device_kind,
        "devices": len(devices),
        "processor": _processor(),
        "cores": cores(),
        "load": os.getloadavg() if hasattr(os, "getloadavg") else None,
    }
    return found | ({"gpu": gpu} if (gpu := nvidia()) else {})


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def nvidia() -> dict[str, str] | None:
    """What the driver says of the first GPU; None without one."""
    if shutil.which("nvidia-smi") is None:
        return None
    words = ["nvidia-smi", f"--query-gpu={GPU_QUERY}", "--format=csv,noheader"]
    told = subprocess.run(words, capture_output=True, text=True)
    lines = told.stdout.splitlines()
    return dict(zip(GPU_QUERY.split(","), (v.strip() for v in lines[0].split(",")))) if lines else None


def versions() -> dict[str, str | None]:
    """Of Python and of the packages that matter for speed; None where one is not installed."""
    return {"python": platform.python_version()} | {name: _version(name) for name in ("longlive-jax", *PACKAGES)}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


MOST_AT_ONCE = 20
"""Calls between two looks at the clock: with one, its start and the wait for it would count as the machine's."""


def at_once(ms: float, seconds: float) -> int:
    """How many calls of `ms` fill `seconds`; at least one."""
    return max(1, min(MOST_AT_ONCE, int(1000 * seconds / ms)))


def matmul_ceiling(dtype: Any, seconds: float = 0.05, largest: int = 8192) -> dict[str, float]:
    """FLOP/s of a square matrix product, as large as takes `seconds` or `largest` rows; random numbers.

    Quick ones are started one after another and waited for together; `calls` says how many.
    """
    product = jax.jit(lambda a, b: a @ b)
    rows = 512
    while True:
        a, b = (jax.random.normal(jax.random.key(i), (rows, rows), dtype) for i in range(2))
        jax.block_until_ready(product(a, b))
        one = once(lambda: product(a, b))  # noqa: B023 - called at once
        if rows >= largest or one > 1000 * seconds:
            break
        rows *= 2
    calls = at_once(one, seconds)
    times = measure(lambda: [product(a, b) for _ in range(calls)], warmup=1, calls=10, seconds=20 * seconds)
    ms = times.p50 / calls
    return {
        "rows": rows, "dtype": jnp.dtype(dtype).name, "calls": calls, "ms": ms, "flops_per_second": 2e3 * rows**3 / ms
    }  # fmt: skip


def copy_ceiling(megabytes: int, seconds: float = 0.05) -> dict[str, float]:
    """Bytes a second of an elementwise pass over an array, read and written ones counted; many at once if quick."""
    x = jnp.arange(megabytes * 2**20 // 4, dtype=jnp.float32)
    size = x.nbytes
    step = jax.jit(lambda x: x + 1, donate_argnums=0)  # else calls that wait in the queue could hold an array each

    def passes(count: int):
        nonlocal x
        for _ in range(count):
            x = step(x)
        return x

    jax.block_until_ready(passes(1))
    calls = at_once(once(lambda: passes(1)), seconds)
    times = measure(lambda: passes(calls), warmup=2, calls=10, seconds=2)
    ms = times.p50 / calls
    return {"megabytes": megabytes, "calls": calls, "ms": ms, "bytes_per_second": 2e3 * size / ms}


def ceilings(dtype: Any) -> dict[str, dict[str, float]]:
    """Both, at sizes that suit the machine."""
    accelerator = jax.default_backend() != "cpu"
    return {"matmul": matmul_ceiling(dtype), "copy": copy_ceiling(4096 if accelerator else 256)}


def peak_memory() -> dict[str, int | str]:
    """Most bytes in use so far: of the device where it says (and those in use now), else of this process, with the
    compiler's."""
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return {"bytes": stats["peak_bytes_in_use"], "now": stats["bytes_in_use"], "of": "device"}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "of": "process"}
