"""Random weights of any size, for timing: kernels keep the scale of what they get, as trained ones do.

One table of normal numbers is repeated in all of them, so 1.4 B parameters take seconds and no compilation. Speed does
not depend on what the numbers are, but power, and with it a GPU's clock, does depend on their being neither zeros nor
alike.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax import checkpoint
from longlive_jax.config import ModelConfig

TABLE = 2**20 - 3
"""Numbers in the table; odd, so that rows of a matrix differ."""

DESCRIPTION = f"random: kernels normal with variance 1 / inputs, from one table of {TABLE} numbers repeated"


@functools.cache
def _table() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(TABLE, np.float32)


def draw(shape: tuple[int, ...], scale: float, offset: float, dtype: Any) -> np.ndarray:
    """Numbers of the table, times `scale` plus `offset`, repeated to fill `shape`."""
    size = math.prod(shape)
    table = (_table()[: min(size, TABLE)] * scale + offset).astype(jnp.dtype(dtype))
    return np.resize(table, shape)


def host(config: ModelConfig, dtype: Any) -> dict[str, Any]:
    """Parameters of the transformer and the VAE as numpy arrays, layers stacked."""

    def leaf(path, abstract):
        name = path[-1].key
        if name == "kernel":
            inputs = abstract.shape[-2] if path[0].key == checkpoint.STACKED else math.prod(abstract.shape[:-1])
            return draw(abstract.shape, inputs**-0.5, 0.0, dtype)
        return draw(abstract.shape, 0.1, float(name in ("weight", "gamma")), dtype)

    parts = {name: checkpoint.abstract_params(name, getattr(config, name)) for name in ("transformer", "vae")}
    return jax.tree_util.tree_map_with_path(leaf, parts)


def ours(config: ModelConfig, dtype: Any) -> dict[str, Any]:
    """The same on the device."""
    return jax.device_put(host(config, dtype))


def for_torch(name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """A tensor of the official state dicts."""
    if name.endswith(("bias", "modulation")):
        return draw(shape, 0.1, 0.0, dtype)
    if name.endswith("gamma") or len(shape) == 1:
        return draw(shape, 0.1, 1.0, dtype)
    return draw(shape, math.prod(shape[1:]) ** -0.5, 0.0, dtype)
