"""Attention on a TPU: JAX's splash kernel (Pallas, compiled by Mosaic), fitted to our shapes.

The kernel wants lengths that its tiles divide, heads a multiple of 128 wide and scaled queries, and the compiler cannot
cut it over a mesh by itself. So here lengths are padded to tiles (4680 queries to 4704, 18720 keys to 18816 at
480 x 832), keys that do not exist are another segment than the queries, and on a mesh every device runs the kernel on
its own videos and heads. No logits are built, forward or backward.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Int, Num

from longlive_jax import sharding
from longlive_jax.errors import UserError

LANES = 128
"""Numbers that a TPU handles side by side: the unit of head widths and of keys in a tile."""


def refusal(q, mask) -> str | None:
    """Why splash cannot do this attention, or None. What it refuses is XLA's, unless splash was asked for by name."""
    if sharding.platform() != "tpu":
        return "it needs a TPU"
    if mask is not None:
        return "a mask is not supported (a dense one is as large as the logits, which splash is there to avoid)"
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"{q.dtype} is neither bfloat16 nor float32"
    if q.shape[-1] % LANES:
        # Narrow heads, as the sprites model's 32, belong to small models, whose logits are small as well; padded to
        # 128 they would do four times the work.
        return f"heads {q.shape[-1]} wide are no multiple of {LANES}"
    return None


def attention(
    q: Num[Array, "b t n d"],
    k: Num[Array, "b s n d"],
    v: Num[Array, "b s n d"],
    *,
    key_length: Int[Array, ""] | None = None,
    mask: Bool[Array, "t s"] | None = None,
) -> Num[Array, "b t n d"]:
    """See `models.attention.attention`.

    Raises:
      UserError: the kernel cannot run; see `refusal`.
    """
    if reason := refusal(q, mask):
        raise UserError(f'attention "splash" cannot run: {reason}; use implementation="xla"')
    return on_mesh(q, k, v, key_length)


def on_mesh(q, k, v, key_length=None, *, interpret: bool = False):
    """The kernel on every device of the mesh in force (`jax.set_mesh`), if there is one, for its own share.

    Args:
      q, k, v, key_length: see `models.attention.attention`.
      interpret: run the kernel as plain JAX operations, on any backend; for tests.
    """
    run = functools.partial(attend, interpret)
    mesh = jax.sharding.get_abstract_mesh()
    free = set(mesh.axis_names) - set(mesh.manual_axes)
    if mesh.empty or not free:
        return run(q, k, v, key_length)
    spec = sharding.heads_spec(mesh, q.shape[0], q.shape[2])
    specs = (spec, spec, spec, None if key_length is None else PartitionSpec())
    return jax.shard_map(run, in_specs=specs, out_specs=spec, axis_names=free, check_vma=False)(q, k, v, key_length)


# Forward alone and forward with backward are padded differently, because their tiles differ: hence a rule of our own
# round the kernel's.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(interpret: bool, q, k, v, key_length=None):
    """The kernel on one device; arguments as `on_mesh`."""
    return _padded(q, k, v, key_length, _tiles(q, k, backward=False), interpret)


def _forward(interpret, q, k, v, key_length):
    tiles = _tiles(q, k, backward=True)
    return jax.vjp(lambda q, k, v: _padded(q, k, v, key_length, tiles, interpret), q, k, v)


def _backward(interpret, pull_back, y):
    return *pull_back(y), None


attend.defvjp(_forward, _backward)


def _padded(q, k, v, key_length, tiles: Tiles, interpret: bool):
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import SegmentIds

    (_, t, _, d), s = q.shape, k.shape[1]
    whole_t, whole_s = _round_up(t, tiles.q), _round_up(s, tiles.kv)
    by_head = lambda a, length: jnp.pad(jnp.swapaxes(a, 1, 2), [(0, 0), (0, 0), (0, length - a.shape[1]), (0, 0)])
    q = (q.astype(jnp.float32) * d**-0.5).astype(q.dtype)  # the kernel does not scale
    segments = None
    if key_length is not None or whole_s > s:
        # Queries of the padding may see what they like: their rows are cut off, and get no gradient.
        exists = jnp.arange(whole_s) < (s if key_length is None else key_length)
        segments = SegmentIds(q=jnp.ones(whole_t, jnp.int32), kv=exists.astype(jnp.int32))
    kernel = _kernel(whole_t // tiles.q, whole_s // tiles.kv, key_length, tiles, interpret)
    attend = jax.vmap(lambda q, k, v: kernel(q, k, v, segments))
    y = attend(by_head(q, whole_t), by_head(k, whole_s), by_head(v, whole_s))
    return jnp.swapaxes(y[:, :, :t], 1, 2)


def _kernel(rows: int, columns: int, key_length, tiles: Tiles, interpret: bool):
    """The kernel for a grid of tiles.

    Made by hand: `make_splash_mha` lists the tiles of a mask on the host, which takes half a second a call, needs a
    device to be there, and cannot depend on `key_length`.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as library
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

    all_tiles = visited = MaskInfo(None, None, None, None, None)
    sizes = {"block_q": tiles.q, "block_kv": tiles.kv, "block_kv_compute": tiles.kv_compute}
    if tiles.backward:
        sizes |= {
            "block_q_dkv": tiles.q, "block_kv_dkv": tiles.kv, "block_kv_dkv_compute": tiles.kv_compute,
            "block_q_dq": tiles.q, "block_kv_dq": tiles.kv,
        }  # fmt: skip
    elif key_length is not None:
        # Tiles without a key are neither fetched (the tile before is named again) nor multiplied: a video's first
        # block does not pay for a window that is still empty.
        column = jnp.broadcast_to(jnp.arange(columns), (1, rows, columns))
        live = column * tiles.kv < key_length
        last = jnp.maximum(key_length - 1, 0) // tiles.kv
        visited = MaskInfo(jnp.minimum(column, last), None, jnp.where(live, 2, 0), None, None)
    return library.SplashAttentionKernel(
        visited,
        all_tiles if tiles.backward else None,
        all_tiles if tiles.backward else None,
        block_sizes=library.BlockSizes(**sizes),
        is_mqa=False,
        save_residuals=False,
        mask_value=library.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=None,
        mask_function=None,
        interpret=interpret,
    )


# MARK: tiles


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Rows that the kernel holds in VMEM at a time.

    Attributes:
      q: queries.
      kv: keys and values fetched together.
      kv_compute: keys of one product; divides `kv`.
      backward: whether there is a backward.
    """

    q: int
    kv: int
    kv_compute: int
    backward: bool


def _tiles(q, k, *, backward: bool) -> Tiles:
    """Tiles for queries `[b, t, n, d]` and keys `[b, s, n, d]`.

    Large, since the keys are read once for every tile of queries: 784 queries do 784 multiplications for each number
    of K and V that is fetched, where the hardware needs 170 (v5p) to 560 (v6e) to keep its matrix units busy; the
    kernel's default of 128 starves them. Small enough for the 16 MiB of VMEM that XLA grants a kernel by default on
    v5e and v5p: with 1184 queries, 2688 keys and 384 a product the compiler counted 17.99 MiB for a v5p and refused.
    About 2.8 of them are the keys and values, held twice since the next are fetched meanwhile; the rest (logits,
    accumulator, maximum, sum, segments) grows with the queries, so 784 should take 13. The backward holds more tiles
    of logits, and wants its queries in lanes.
    """
    wide = q.shape[-1] // LANES * q.dtype.itemsize // 2 or 1  # against heads of 128 in bfloat16
    if backward:
        rows, kv = _tile(q.shape[1], 512, LANES), _tile(k.shape[1], max(512 // wide, LANES), LANES)
    else:
        rows, kv = _tile(q.shape[1], max(800 // wide, 256), 16), _tile(k.shape[1], 2816 // wide, LANES)
    lanes = kv // LANES
    compute = max(n for n in range(1, 5) if lanes % n == 0) * LANES
    return Tiles(rows, kv, compute, backward)


def _tile(length: int, most: int, unit: int) -> int:
    """The tile of at most `most` rows, in units, that costs least: a tile is taken to cost 64 rows beside its own."""
    sizes = [_round_up(math.ceil(length / n), unit) for n in range(1, math.ceil(length / unit) + 1)]
    return min((size for size in sizes if size <= most), key=lambda size: math.ceil(length / size) * (size + 64))


def _round_up(length: int, unit: int) -> int:
    return math.ceil(length / unit) * unit
