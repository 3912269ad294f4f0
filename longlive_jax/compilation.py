"""What the compiler is told, and compiled programs kept between runs: only the first start waits for it.

Programs go to `longlive_jax/compiled` in the user's cache folder, a GPU's autotuning results beside them (jax sees to
that wherever a compilation cache is on). `LONGLIVE_COMPILATION_CACHE` names another folder, or is "off". Who has told
jax itself where to keep programs is not overruled.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

VARIABLE = "LONGLIVE_COMPILATION_CACHE"
OFF = ("off", "0", "false", "no")


def keep_compiled_programs() -> Path | None:
    """Turns the cache on for this process; call it before anything is compiled.

    Returns:
      The folder; None if the cache is off, or jax was told already.
    """
    asked = os.environ.get(VARIABLE, "")
    if asked.lower() in OFF or "JAX_COMPILATION_CACHE_DIR" in os.environ or (not asked and sys.platform == "win32"):
        return None
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(asked).expanduser().absolute() if asked else root / "longlive_jax" / "compiled"
    if "jax" not in sys.modules:  # jax reads it when it is imported; `longlive --help` must not wait for that
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
        return folder
    import jax

    if jax.config.jax_compilation_cache_dir is not None:
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    return folder


def compiler_options(backend: str) -> dict[str, bool] | None:
    """Options for `jax.jit` that a backend ("cpu", "gpu", "tpu") needs."""
    # Else 3-D convolutions are turned channels-first, with transposes of whole videos around them.
    return {"xla_gpu_force_conv_nhwc": True} if backend == "gpu" else None
