"""What a backward pass computes again instead of keeping it."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax


def rematerialise(policy: str) -> Callable | None:
    """A wrapper for `run_layers`: "none", "layer" (keep each layer's input) or "dots" (keep matrix products too)."""
    if policy == "none":
        return None
    kept = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if policy == "dots" else None
    # Inside a scan the compiler has nothing to merge the second computation with.
    return functools.partial(jax.checkpoint, prevent_cse=False, policy=kept)
