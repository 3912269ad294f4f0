"""Rotary position embedding over frame, row and column (official wan/modules/causal_model.py).

Neighbouring channels form pairs. Of a head of width d, the frame index turns d - 4 floor(d/6) channels, row and column
2 floor(d/6) each (44, 42, 42 of 128). Angles are made in float64 on the host: in bfloat16 position 257 would be 256.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from longlive_jax.config import MAX_ABSOLUTE_FRAMES
from longlive_jax.models import products

Rotation = tuple[Float[Array, "t n half"], Float[Array, "t n half"]]
"""Cosine and sine for each of n tokens of t frames."""


def axis_widths(head_dim: int) -> tuple[int, int, int]:
    """Channels turned by frame, row and column."""
    sixth = 2 * (head_dim // 6)
    return head_dim - 2 * sixth, sixth, sixth


def axis_angles(positions: int, width: int, theta: float) -> np.ndarray:
    """Angles float64 [positions, width / 2]; the exponent is divided by the axis' own width."""
    frequencies = theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)
    return np.arange(positions, dtype=np.float64)[:, None] * frequencies


def rotation(positions: Int[Array, " t"], rows: int, columns: int, head_dim: int, theta: float) -> Rotation:
    """The rotation of every token of the frames at `positions` (each below 1024), tokens in row-major order."""
    widths = axis_widths(head_dim)
    by_frame = axis_angles(MAX_ABSOLUTE_FRAMES, widths[0], theta)
    by_row, by_column = axis_angles(rows, widths[1], theta), axis_angles(columns, widths[2], theta)
    parts = []
    for f in (np.cos, np.sin):
        frame = jnp.asarray(f(by_frame), jnp.float32)[positions]
        grid = np.concatenate(
            [np.repeat(f(by_row), columns, axis=0), np.tile(f(by_column), (rows, 1))], axis=-1
        ).astype(np.float32)
        frame = jnp.broadcast_to(frame[:, None], (frame.shape[0], rows * columns, frame.shape[1]))
        grid = jnp.broadcast_to(grid, (frame.shape[0], *grid.shape))
        parts.append(jnp.concatenate([frame, grid], axis=-1))
    return parts[0], parts[1]


def rotate(x: Num[Array, "b t n h d"], rotated_by: Rotation) -> Num[Array, "b t n h d"]:
    """Turns each pair of neighbouring channels; in float32, back in the dtype of x."""
    cos, sin = (a[:, :, None] for a in rotated_by)
    if products.by_matrix_units(x.dtype):
        # Picking every other channel is slow there; a product with 0, 1 and -1 is exact.
        across = products.product(x, jnp.asarray(_across(x.shape[-1]), x.dtype)).astype(jnp.float32)
        return (x.astype(jnp.float32) * jnp.repeat(cos, 2, -1) + across * jnp.repeat(sin, 2, -1)).astype(x.dtype)
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


def _across(width: int) -> np.ndarray:
    """x times this has -odd where x has even, and even where it has odd."""
    across = np.zeros((width, width), np.float32)
    even = np.arange(0, width, 2)
    across[even + 1, even], across[even, even + 1] = -1, 1
    return across
