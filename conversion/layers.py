"""The numerical proof of a conversion, layer by layer: PyTorch's on the original tensors, ours on the written ones.

Checksums say that the disk kept what was meant; this says that what was meant is right. Each linear layer, convolution,
norm and embedding gets random input and is computed twice in float32: by `torch.nn.functional` on the tensors of the
source (LoRAs applied beside the weight, x W + scale x A B, instead of merged), and by our layer on the tensors as they
were written. One layer is in memory at a time.

The two may differ by the rounding of the cast and by the order of float32 sums. The error is relative, the root mean
square of ours - theirs over that of theirs. Random input makes it that of the weights, each of which rounding changes
by at most half a unit in the last place.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from einops import rearrange
from flax import nnx

from longlive_jax.conversion import tables
from longlive_jax.conversion.lora import Lora
from longlive_jax.conversion.readers import Reader
from longlive_jax.conversion.tables import Row, Table
from longlive_jax.errors import UserError
from longlive_jax.models.layers import LayerNorm, Linear, RMSNorm, structure
from longlive_jax.models.quantization import INT8, SCALE, dequantize
from longlive_jax.models.vae import CausalConv, ChannelNorm, Conv2d
from longlive_jax.tensor_files import SafetensorsPart

SUMS = 1e-5
"""Relative error that the order of float32 sums may make."""

VECTORS = 8
"""Random inputs of a layer."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer of either side, its tensors read when they are asked for.

    Attributes:
      name: original name.
      rows: by the last part of the original name ("weight", "bias", "gamma", ...).
      reader, files: of the source, and of what was written.
      loras: that were merged.
      original: the name by which LoRAs know a parameter, by our name.
      eps: of the norms.
    """

    name: str
    rows: dict[str, Row]
    reader: Reader
    files: SafetensorsPart
    loras: Sequence[Lora]
    original: dict[str, str]
    eps: float

    @property
    def row(self) -> Row:
        """The weight's, or that of whatever else stands first."""
        return next(iter(self.rows.values()))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.reader.shapes[self.row.torch]

    def draw(self, *shape: int) -> np.ndarray:
        seed = int.from_bytes(self.name.encode()[-16:], "little")  # the same numbers in every run
        return np.random.default_rng(seed).standard_normal(shape, np.float32)

    def theirs(self) -> list[Any]:
        """The original tensors, float32: [weight] or [weight, bias], whole differences of LoRAs added."""
        tensors = []
        for row in self.rows.values():
            diffs = (lora.difference(self.original[row.ours]) for lora in self.loras)
            tensor = _torch(self.reader.read(row.torch)).float()
            tensors.append(sum((_torch(diff) for diff in diffs if diff is not None), tensor))
        return tensors

    def factors(self) -> list[tuple[np.float32, np.ndarray, np.ndarray]]:
        """(scale, B, A) of each LoRA that was merged into the weight."""
        factors = [lora.factors(self.original[self.row.ours]) for lora in self.loras]
        return [found for found in factors if found is not None]

    def written(self) -> dict[str, np.ndarray]:
        """Our parameters by name within the layer; an int8 kernel as the floats that it stands for."""
        return {row.ours.rpartition(".")[2]: read(self.files, row.ours) for row in self.rows.values()}

    def ours(self, layer: Callable[..., nnx.Module], args: Callable[[dict], tuple], x: np.ndarray) -> np.ndarray:
        """Output of `layer(*args(params))`, one of our modules, with the written parameters."""
        params = self.written()
        module = nnx.merge(_structure(layer, *args(params)), jax.tree.map(jnp.asarray, params))
        y = module(jnp.asarray(x))
        return np.asarray(y[0] if isinstance(y, tuple) else y)  # a causal convolution also gives its history


def read(files: SafetensorsPart, name: str) -> np.ndarray:
    """A tensor that was written, as it is or in int8."""
    if name in files.shapes:
        return files.read(name)
    layer = name.removesuffix(".kernel")
    return dequantize(files.read(f"{layer}.{INT8}"), files.read(f"{layer}.{SCALE}"))


@functools.lru_cache(maxsize=256)
def _structure(layer: Callable[..., nnx.Module], *args) -> nnx.GraphDef:
    return structure(lambda: layer(*args))


def _torch(array: np.ndarray) -> Any:
    """A tensor over the same memory; numpy has no bfloat16 of its own, so the bits go over as integers."""
    import torch

    array = np.ascontiguousarray(array)
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


# MARK: kinds of layers. Each gives PyTorch's output and ours, in PyTorch's layout.

Outputs = tuple[Any, np.ndarray]


def _make_linear(i: int, o: int, bias: bool) -> Linear:
    return Linear(i, o, bias=bias, rngs=nnx.Rngs(0))


def _linear_args(params: dict) -> tuple:
    return (*params["kernel"].shape, "bias" in params)


def linear(layer: Layer, f) -> Outputs:
    x = layer.draw(VECTORS, layer.shape[1])
    theirs = f.linear(_torch(x), *layer.theirs())
    for scale, b, a in layer.factors():
        theirs = theirs + float(scale) * f.linear(f.linear(_torch(x), _torch(a)), _torch(b))
    return theirs, layer.ours(_make_linear, _linear_args, x)


def patch_embedding(layer: Layer, f) -> Outputs:
    _, channels, *patch = layer.shape
    x = layer.draw(1, channels, 2, 2 * patch[1], 2 * patch[2])
    theirs = f.conv3d(_torch(x), *layer.theirs(), stride=tuple(patch))
    patches = rearrange(x, "b c t (h p) (w q) -> b t h w (c p q)", p=patch[1], q=patch[2])
    return theirs, np.moveaxis(layer.ours(_make_linear, _linear_args, patches), -1, 1)


def point_convolution(layer: Layer, f) -> Outputs:
    """A convolution with a kernel of one pixel, ours a linear layer."""
    x = layer.draw(2, layer.shape[1], *(3,) * (len(layer.shape) - 2))
    theirs = (f.conv3d if x.ndim == 5 else f.conv2d)(_torch(x), *layer.theirs())
    return theirs, np.moveaxis(layer.ours(_make_linear, _linear_args, np.moveaxis(x, 1, -1)), -1, 1)


def _make_conv3d(*shape: int) -> CausalConv:
    return CausalConv(*shape[3:], shape[:3], impl="2d", rngs=nnx.Rngs(0))


def conv3d(layer: Layer, f) -> Outputs:
    t, h, w = layer.shape[2:]
    x = layer.draw(1, layer.shape[1], 3, 4, 4)
    causal = f.pad(_torch(x), (w // 2, w // 2, h // 2, h // 2, t - 1, 0))
    theirs = f.conv3d(causal, *layer.theirs())
    return theirs, np.moveaxis(layer.ours(_make_conv3d, lambda p: p["kernel"].shape, np.moveaxis(x, 1, -1)), -1, 1)


def _make_conv2d(size: int, _: int, i: int, o: int) -> Conv2d:
    return Conv2d(i, o, size, rngs=nnx.Rngs(0))


def conv2d(layer: Layer, f) -> Outputs:
    x = layer.draw(2, layer.shape[1], 4, 4)
    theirs = f.conv2d(_torch(x), *layer.theirs(), padding="same")
    ours = layer.ours(_make_conv2d, lambda p: p["kernel"].shape, rearrange(x, "b c h w -> b 1 h w c"))
    return theirs, rearrange(ours, "b 1 h w c -> b c h w")


def rms_norm(layer: Layer, f) -> Outputs:
    x = layer.draw(VECTORS, *layer.shape)
    theirs = f.rms_norm(_torch(x), layer.shape, *layer.theirs(), layer.eps)
    return theirs, layer.ours(RMSNorm, lambda p: (*p["weight"].shape, layer.eps), x)


def layer_norm(layer: Layer, f) -> Outputs:
    x = layer.draw(VECTORS, *layer.shape)
    theirs = f.layer_norm(_torch(x), layer.shape, *layer.theirs(), layer.eps)
    return theirs, layer.ours(LayerNorm, lambda p: (*p["weight"].shape, layer.eps), x)


def channel_norm(layer: Layer, f) -> Outputs:
    """The VAE's norm: onto the sphere, times the root of the number of channels."""
    x = layer.draw(2, layer.shape[0], *(3,) * (len(layer.shape) - 1))
    (gamma,) = layer.theirs()
    theirs = f.normalize(_torch(x), dim=1) * layer.shape[0] ** 0.5 * gamma
    return theirs, np.moveaxis(layer.ours(ChannelNorm, lambda p: p["gamma"].shape, np.moveaxis(x, 1, -1)), -1, 1)


def embedding(layer: Layer, f) -> Outputs:
    ids = np.linspace(0, layer.shape[0] - 1, VECTORS).astype(np.int64)
    theirs = f.embedding(_torch(ids), _torch(layer.reader.read(layer.row.torch)))  # rows are taken before the cast
    return theirs.float(), layer.files.read(layer.row.ours)[ids]


def parameter(layer: Layer, f) -> Outputs:
    """No layer of its own: what is added to the modulation."""
    return layer.theirs()[0], layer.files.read(layer.row.ours).reshape(layer.shape)


KINDS = {
    tables.LINEAR: linear,
    tables.PATCHIFY: patch_embedding,
    tables.POINT3D: point_convolution,
    tables.POINT2D: point_convolution,
    tables.CONV3D: conv3d,
    tables.CONV2D: conv2d,
    tables.GAMMA3D: channel_norm,
    tables.GAMMA2D: channel_norm,
    tables.ONE_FIRST: parameter,
}
"""Kinds of layers by the transform of their weight. `kind` knows those whose layout stays as it is."""


def kind(rows: dict[str, Row]) -> Callable[[Layer, Any], Outputs]:
    """How a layer is compared."""
    row = next(iter(rows.values()))
    if row.transform != tables.SAME:
        return KINDS[row.transform]
    if row.ours.endswith("embedding"):
        return embedding
    return layer_norm if "bias" in rows else rms_norm


# MARK: comparison


@dataclasses.dataclass(frozen=True)
class Difference:
    """What came out for a layer: relative error, and how much the dtypes explain."""

    name: str
    kind: str
    error: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed  # not so for a nan


def compare(
    table: Table,
    reader: Reader,
    files: SafetensorsPart,
    eps: float,
    loras: Sequence[Lora],
    original: dict[str, str],
    compared: Callable[[int, int], None] = lambda tensors, nbytes: None,
) -> list[Difference]:
    """Compares every layer of a part.

    Args:
      table: of the names.
      reader: the source.
      files: what was written.
      eps: of the norms with eps.
      loras: that were merged.
      original: the name by which LoRAs know a parameter, by our name.
      compared: is told the number of tensors of each layer that was compared, and their bytes in the source.
    """
    from torch.nn import functional

    groups: dict[str, dict[str, Row]] = {}
    for row in table.rows:
        layer, _, role = row.torch.rpartition(".")
        bare = role not in ("weight", "bias", "gamma")
        groups.setdefault(row.torch if bare else layer, {})[role] = row
    differences = []
    for name, rows in groups.items():
        compute = kind(rows)
        changing = [lora for lora in loras if any(lora.changes(original[row.ours]) for row in rows.values())]
        with jax.default_matmul_precision("highest"):  # GPUs and TPUs round the inputs of products otherwise
            theirs, ours = compute(Layer(name, rows, reader, files, changing, original, eps), functional)
        theirs, ours = np.asarray(theirs), np.asarray(ours, np.float32)
        error, norm = np.linalg.norm(ours - theirs), np.linalg.norm(theirs)
        allowed = max(_allowed(row, reader, files, bool(changing)) for row in rows.values())
        relative = float(error / norm) if norm else float("inf" if error else 0)
        differences.append(Difference(name, compute.__name__, relative, allowed))
        compared(*size(reader, rows.values()))
    return differences


def size(reader: Reader, rows: Iterable[Row]) -> tuple[int, int]:
    """Number of the original tensors of some rows, and their bytes."""
    sizes = [math.prod(reader.shapes[row.torch]) * reader.dtypes[row.torch].itemsize for row in rows]
    return len(sizes), sum(sizes)


def _allowed(row: Row, reader: Reader, files: SafetensorsPart, merged: bool) -> float:
    """The order of sums; and twice the rounding to the written dtype, if it cannot hold all the source has.

    Of int8, the most that rounding can do: half a scale in every weight.
    """
    if row.ours not in files.shapes:
        scale, kernel = files.read(f"{row.ours.removesuffix('.kernel')}.{SCALE}"), read(files, row.ours)
        return SUMS + float(0.5 * np.sqrt(np.mean(np.square(scale)) / np.mean(np.square(kernel))))
    source, written = reader.dtypes[row.torch], files.dtypes[row.ours]
    exact = jnp.promote_types(np.float32 if merged else source, written) == written
    return SUMS if exact else SUMS + float(ml_dtypes.finfo(written).eps)


def report(differences: Sequence[Difference]) -> dict[str, dict[str, Any]]:
    """Of each kind: how many, the worst error, where, and what the dtypes explain there.

    Raises:
      UserError: some layer differs by more; each kind with its worst.
    """
    kinds: dict[str, list[Difference]] = {}
    for difference in differences:
        kinds.setdefault(difference.kind, []).append(difference)
    # By how far it is beyond what is allowed: a nan before all.
    worst = {k: max(found, key=lambda d: np.nan_to_num(d.error / d.allowed, nan=np.inf)) for k, found in kinds.items()}
    faults = [
        f"{sum(not d.ok for d in kinds[k])} of {len(kinds[k])} {k} layers (worst {d.name}: relative error "
        f"{d.error:.2g}, rounding explains {d.allowed:.2g})"
        for k, d in worst.items()
        if not d.ok
    ]
    if faults:
        raise UserError(f"converted layers differ from PyTorch's, nothing was written: {'; '.join(faults)}")
    return {
        k: {"modules": len(kinds[k]), "worst": d.error, "at": d.name, "allowed": d.allowed} for k, d in worst.items()
    }
