"""Which tensor of the original PyTorch files becomes which parameter of ours, and how: one table a model.

A row names a torch tensor, our tensor (as in the files of a checkpoint, a name a layer) and the rearrangement between
the two, which works both ways. The functions expand a table for given sizes; nothing else knows the names.

Original names are those of Wan 2.1's own files; LongLive's are the same once `readers` has taken off the wrappers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from einops import rearrange

from longlive_jax.config import TextEncoderConfig, TransformerConfig, VAEConfig


@dataclasses.dataclass(frozen=True)
class Transform:
    """An invertible change of layout, written as einops patterns.

    Attributes:
      name: for messages.
      torch, ours: the axes on either side.
    """

    name: str
    torch: str
    ours: str

    def to_ours(self, array: np.ndarray, **sizes: int) -> np.ndarray:
        """Our layout; a view where one is possible. Raises ValueError if the axes do not fit."""
        return self._apply(array, self.torch, self.ours, sizes)

    def to_torch(self, array: np.ndarray, **sizes: int) -> np.ndarray:
        """The inverse; `sizes` of axes that ours has merged."""
        return self._apply(array, self.ours, self.torch, sizes)

    def _apply(self, array, source: str, target: str, sizes: dict[str, int]) -> np.ndarray:
        axes = source.replace("(", " ").replace(")", " ").split()
        used = {name: size for name, size in sizes.items() if name in axes}
        return rearrange(array, f"{source} -> {target}", **used)


SAME = Transform("same", "...", "...")
LINEAR = Transform("linear", "o i", "i o")
CONV3D = Transform("conv3d", "o i t h w", "t h w i o")
CONV2D = Transform("conv2d", "o i h w", "h w i o")
POINT3D = Transform("point3d", "o i 1 1 1", "i o")  # a 1 x 1 x 1 convolution is a linear layer
POINT2D = Transform("point2d", "o i 1 1", "i o")
GAMMA3D = Transform("gamma3d", "c 1 1 1", "c")
GAMMA2D = Transform("gamma2d", "c 1 1", "c")
ONE_FIRST = Transform("one first", "1 s d", "s d")
PATCHIFY = Transform("patchify", "o c 1 p q", "(c p q) o")


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor on either side.

    Attributes:
      torch, ours: names; patterns with `{i}` until `expand` has put the layers in.
      transform: between the layouts.
    """

    torch: str
    ours: str
    transform: Transform

    def torch_shape(self, shape: tuple[int, ...], sizes: dict[str, int]) -> tuple[int, ...]:
        """The torch shape of our tensor of shape `shape`."""
        return self.transform.to_torch(np.broadcast_to(np.int8(0), shape), **sizes).shape


@dataclasses.dataclass(frozen=True)
class Table:
    """All rows of a model, and the sizes that transforms need to be inverted."""

    rows: tuple[Row, ...]
    sizes: dict[str, int] = dataclasses.field(default_factory=dict)

    def torch_shapes(self, ours: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Name and shape of every torch tensor, given the shapes of ours."""
        return {row.torch: row.torch_shape(ours[row.ours], self.sizes) for row in self.rows}


def expand(rows: Iterable[Row], layers: int) -> list[Row]:
    """Rows with `{i}` once a layer, the others once."""
    expanded = []
    for row in rows:
        numbers = range(layers) if "{i}" in row.torch else [0]
        expanded += [dataclasses.replace(row, torch=row.torch.format(i=i), ours=row.ours.format(i=i)) for i in numbers]
    return expanded


def linear(torch: str, ours: str, *, transform: Transform = LINEAR, bias: bool = True) -> list[Row]:
    """A linear layer or convolution: weight and bias."""
    rows = [Row(f"{torch}.weight", f"{ours}.kernel", transform)]
    return rows + [Row(f"{torch}.bias", f"{ours}.bias", SAME)] if bias else rows


# MARK: diffusion transformer

_ATTENTIONS = ("blocks.{i}.self_attn", "blocks.{i}.cross_attn")

WAN_TRANSFORMER = (
    *linear("patch_embedding", "patch_embedding", transform=PATCHIFY),
    *linear("text_embedding.0", "text_embedding.up"),
    *linear("text_embedding.2", "text_embedding.down"),
    *linear("time_embedding.0", "time_embedding.up"),
    *linear("time_embedding.2", "time_embedding.down"),
    *linear("time_projection.1", "time_projection"),
    *(row for a in _ATTENTIONS for p in "qkvo" for row in linear(f"{a}.{p}", f"{a}.{p}")),
    *(Row(f"{a}.norm_{p}.weight", f"{a}.norm_{p}.weight", SAME) for a in _ATTENTIONS for p in "qk"),
    Row("blocks.{i}.norm3.weight", "blocks.{i}.cross_norm.weight", SAME),
    Row("blocks.{i}.norm3.bias", "blocks.{i}.cross_norm.bias", SAME),
    *linear("blocks.{i}.ffn.0", "blocks.{i}.ffn.up"),
    *linear("blocks.{i}.ffn.2", "blocks.{i}.ffn.down"),
    Row("blocks.{i}.modulation", "blocks.{i}.modulation", ONE_FIRST),
    *linear("head.head", "head.linear"),
    Row("head.modulation", "head.modulation", ONE_FIRST),
)


def wan_transformer(cfg: TransformerConfig) -> Table:
    """Wan's and LongLive's DiT."""
    sizes = dict(c=cfg.in_channels, p=cfg.patch[1], q=cfg.patch[2])
    return Table(tuple(expand(WAN_TRANSFORMER, cfg.num_layers)), sizes)


def wan_lora(cfg: TransformerConfig) -> Table:
    """Adapters of every linear layer inside the DiT's blocks: peft's names, and those of `training.lora`."""
    layers = [row for row in wan_transformer(cfg).rows if row.torch.startswith("blocks.") and row.transform is LINEAR]
    return Table(
        tuple(
            Row(
                f"base_model.model.{row.torch.removesuffix('weight')}lora_{side}.weight",
                f"{row.ours.removesuffix('kernel')}lora_{side.lower()}",
                LINEAR,
            )
            for row in layers
            for side in "AB"
        )
    )


# MARK: text encoder

WAN_TEXT_ENCODER = (
    Row("token_embedding.weight", "token_embedding", SAME),
    *(row for p in "qkvo" for row in linear(f"blocks.{{i}}.attn.{p}", f"blocks.{{i}}.attn.{p}", bias=False)),
    Row("blocks.{i}.pos_embedding.embedding.weight", "blocks.{i}.attn.position_bias.embedding", SAME),
    *linear("blocks.{i}.ffn.gate.0", "blocks.{i}.ffn.gate", bias=False),
    *linear("blocks.{i}.ffn.fc1", "blocks.{i}.ffn.up", bias=False),
    *linear("blocks.{i}.ffn.fc2", "blocks.{i}.ffn.down", bias=False),
    Row("blocks.{i}.norm1.weight", "blocks.{i}.norm1.weight", SAME),
    Row("blocks.{i}.norm2.weight", "blocks.{i}.norm2.weight", SAME),
    Row("norm.weight", "norm.weight", SAME),
)


def wan_text_encoder(cfg: TextEncoderConfig) -> Table:
    """umT5 as Wan stores it."""
    return Table(tuple(expand(WAN_TEXT_ENCODER, cfg.num_layers)))


# MARK: VAE

WAN_VAE = (
    *linear("conv1", "quant", transform=POINT3D),
    *linear("conv2", "post_quant", transform=POINT3D),
    *(
        row
        for coder in ("encoder", "decoder")
        for row in (
            *linear(f"{coder}.conv1", f"{coder}.conv_in", transform=CONV3D),
            Row(f"{coder}.head.0.gamma", f"{coder}.norm.gamma", GAMMA3D),
            *linear(f"{coder}.head.2", f"{coder}.conv_out", transform=CONV3D),
        )
    ),
)
"""What does not depend on the number of levels."""

RESIDUAL = (
    Row("residual.0.gamma", "norm1.gamma", GAMMA3D),
    *linear("residual.2", "conv1", transform=CONV3D),
    Row("residual.3.gamma", "norm2.gamma", GAMMA3D),
    *linear("residual.6", "conv2", transform=CONV3D),
)
SHORTCUT = tuple(linear("shortcut", "shortcut", transform=POINT3D))
ATTENTION = (
    Row("norm.gamma", "norm.gamma", GAMMA2D),
    *linear("to_qkv", "qkv", transform=POINT2D),
    *linear("proj", "proj", transform=POINT2D),
)
RESAMPLE = tuple(linear("resample.1", "conv", transform=CONV2D))
TIME_CONV = tuple(linear("time_conv", "time_conv", transform=CONV3D))
MIDDLE = (RESIDUAL, ATTENTION, RESIDUAL)


def wan_vae(cfg: VAEConfig) -> Table:
    """Wan's VAE. Its lists hold what ours hold, in the same order, but the middle has a list of its own."""
    down, up = coder_layers(cfg, RESIDUAL, SHORTCUT)
    layers = [
        *(("encoder.downsamples", i, "encoder.layers", i, layer) for i, layer in enumerate(down)),
        *(("encoder.middle", i, "encoder.layers", len(down) + i, layer) for i, layer in enumerate(MIDDLE)),
        *(("decoder.middle", i, "decoder.layers", i, layer) for i, layer in enumerate(MIDDLE)),
        *(("decoder.upsamples", i, "decoder.layers", len(MIDDLE) + i, layer) for i, layer in enumerate(up)),
    ]
    rows = [
        Row(f"{theirs}.{m}.{row.torch}", f"{ours}.{n}.{row.ours}", row.transform)
        for theirs, m, ours, n, layer in layers
        for row in layer
    ]
    return Table((*WAN_VAE, *rows))


def coder_layers(
    cfg: VAEConfig, residual: tuple[Row, ...], shortcut: tuple[Row, ...]
) -> tuple[list[tuple[Row, ...]], list[tuple[Row, ...]]]:
    """The rows of each layer of the encoder before its middle, and of the decoder after its middle.

    Args:
      cfg: sizes.
      residual: rows of a residual block, by the names of some layout.
      shortcut: those it has besides where the width changes.
    """

    def levels(multipliers, blocks, temporal, after) -> list[tuple[Row, ...]]:
        """Level by level: residual blocks, then a change of size; `after` is the width past it."""
        layers, dim = [], cfg.base_width * multipliers[0]
        for level, multiplier in enumerate(multipliers):
            width = cfg.base_width * multiplier
            for _ in range(blocks):
                layers.append(residual + shortcut if dim != width else residual)
                dim = width
            if level < len(temporal):
                layers.append(RESAMPLE + TIME_CONV if temporal[level] else RESAMPLE)
                dim = after(dim)
        return layers

    down = levels(cfg.multipliers, cfg.res_blocks, cfg.temporal, lambda width: width)
    up = levels(cfg.multipliers[::-1], cfg.res_blocks + 1, cfg.temporal[::-1], lambda width: width // 2)
    return down, up


WAN: dict[str, Callable[[Any], Table]] = {
    "transformer": wan_transformer,
    "vae": wan_vae,
    "text_encoder": wan_text_encoder,
}
"""The table of each part in the original Wan layout."""
