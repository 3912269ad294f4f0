"""The tables of diffusers' `WanPipeline`: what `tables` says of the original files, by the names of these classes.

`WanTransformer3DModel`, `AutoencoderKLWan` (diffusers) and `UMT5EncoderModel` (transformers) hold the same numbers in
the same layouts as the original models; names and, in the VAE's decoder, lists are other ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from longlive_jax.config import TextEncoderConfig, TransformerConfig, VAEConfig
from longlive_jax.conversion.tables import (
    ATTENTION,
    CONV3D,
    GAMMA3D,
    ONE_FIRST,
    PATCHIFY,
    POINT3D,
    SAME,
    WAN_TRANSFORMER,
    Row,
    Table,
    coder_layers,
    expand,
    linear,
)

# MARK: diffusion transformer

_ATTENTIONS = (("blocks.{i}.attn1", "blocks.{i}.self_attn"), ("blocks.{i}.attn2", "blocks.{i}.cross_attn"))
_PROJECTIONS = (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "o"))

TRANSFORMER = (
    *linear("patch_embedding", "patch_embedding", transform=PATCHIFY),
    *linear("condition_embedder.text_embedder.linear_1", "text_embedding.up"),
    *linear("condition_embedder.text_embedder.linear_2", "text_embedding.down"),
    *linear("condition_embedder.time_embedder.linear_1", "time_embedding.up"),
    *linear("condition_embedder.time_embedder.linear_2", "time_embedding.down"),
    *linear("condition_embedder.time_proj", "time_projection"),
    *(row for a, b in _ATTENTIONS for p, q in _PROJECTIONS for row in linear(f"{a}.{p}", f"{b}.{q}")),
    *(Row(f"{a}.norm_{p}.weight", f"{b}.norm_{p}.weight", SAME) for a, b in _ATTENTIONS for p in "qk"),
    Row("blocks.{i}.norm2.weight", "blocks.{i}.cross_norm.weight", SAME),  # its norm1 and norm3 have no weights
    Row("blocks.{i}.norm2.bias", "blocks.{i}.cross_norm.bias", SAME),
    *linear("blocks.{i}.ffn.net.0.proj", "blocks.{i}.ffn.up"),
    *linear("blocks.{i}.ffn.net.2", "blocks.{i}.ffn.down"),
    Row("blocks.{i}.scale_shift_table", "blocks.{i}.modulation", ONE_FIRST),
    *linear("proj_out", "head.linear"),
    Row("scale_shift_table", "head.modulation", ONE_FIRST),
)


def _module(tensor: str) -> str:
    return tensor.removesuffix(".weight").removesuffix(".bias")


_ORIGINAL = {row.ours: row.torch for row in WAN_TRANSFORMER}

TRANSFORMER_MODULES = {_module(row.torch): _module(_ORIGINAL[row.ours]) for row in TRANSFORMER}
"""Modules (and bare parameters) of the DiT by diffusers' name -> by the original one: where both become the same."""

ORIGINAL_NAMES = {row.torch: _ORIGINAL[row.ours] for row in TRANSFORMER}
"""Tensors of the DiT by diffusers' name -> by the original one: the same numbers in the same layout."""


def transformer(cfg: TransformerConfig) -> Table:
    """`WanTransformer3DModel`."""
    sizes = dict(c=cfg.in_channels, p=cfg.patch[1], q=cfg.patch[2])
    return Table(tuple(expand(TRANSFORMER, cfg.num_layers)), sizes)


# MARK: text encoder

_SELF = "encoder.block.{i}.layer.0"
_FEED_FORWARD = "encoder.block.{i}.layer.1"

TEXT_ENCODER = (
    Row("shared.weight", "token_embedding", SAME),
    *(row for p in "qkvo" for row in linear(f"{_SELF}.SelfAttention.{p}", f"blocks.{{i}}.attn.{p}", bias=False)),
    Row(f"{_SELF}.SelfAttention.relative_attention_bias.weight", "blocks.{i}.attn.position_bias.embedding", SAME),
    *linear(f"{_FEED_FORWARD}.DenseReluDense.wi_0", "blocks.{i}.ffn.gate", bias=False),
    *linear(f"{_FEED_FORWARD}.DenseReluDense.wi_1", "blocks.{i}.ffn.up", bias=False),
    *linear(f"{_FEED_FORWARD}.DenseReluDense.wo", "blocks.{i}.ffn.down", bias=False),
    Row(f"{_SELF}.layer_norm.weight", "blocks.{i}.norm1.weight", SAME),
    Row(f"{_FEED_FORWARD}.layer_norm.weight", "blocks.{i}.norm2.weight", SAME),
    Row("encoder.final_layer_norm.weight", "norm.weight", SAME),
)

TIED = {"encoder.embed_tokens.weight": "shared.weight"}
"""Second name -> first name of a tensor that the text encoder's files may have under either name, or both."""


def text_encoder(cfg: TextEncoderConfig) -> Table:
    """`UMT5EncoderModel`."""
    return Table(tuple(expand(TEXT_ENCODER, cfg.num_layers)))


# MARK: VAE

VAE = (
    *linear("quant_conv", "quant", transform=POINT3D),
    *linear("post_quant_conv", "post_quant", transform=POINT3D),
    *(
        row
        for coder in ("encoder", "decoder")
        for row in (
            *linear(f"{coder}.conv_in", f"{coder}.conv_in", transform=CONV3D),
            Row(f"{coder}.norm_out.gamma", f"{coder}.norm.gamma", GAMMA3D),
            *linear(f"{coder}.conv_out", f"{coder}.conv_out", transform=CONV3D),
        )
    ),
)
"""What does not depend on the number of levels."""

RESIDUAL = (
    Row("norm1.gamma", "norm1.gamma", GAMMA3D),
    *linear("conv1", "conv1", transform=CONV3D),
    Row("norm2.gamma", "norm2.gamma", GAMMA3D),
    *linear("conv2", "conv2", transform=CONV3D),
)
SHORTCUT = tuple(linear("conv_shortcut", "shortcut", transform=POINT3D))
MIDDLE = (("resnets.0", RESIDUAL), ("attentions.0", ATTENTION), ("resnets.1", RESIDUAL))


def vae(cfg: VAEConfig) -> Table:
    """`AutoencoderKLWan` of Wan 2.1. Its encoder has one list of layers, its decoder one a level."""
    down, up = coder_layers(cfg, RESIDUAL, SHORTCUT)
    levels = len(cfg.multipliers)
    up_names = []
    for level in range(levels):
        up_names += [f"up_blocks.{level}.resnets.{i}" for i in range(cfg.res_blocks + 1)]
        up_names += [f"up_blocks.{level}.upsamplers.0"] if level < levels - 1 else []
    middle = [(f"mid_block.{name}", layer) for name, layer in MIDDLE]
    encoder = [*((f"down_blocks.{i}", layer) for i, layer in enumerate(down)), *middle]
    decoder = [*middle, *zip(up_names, up, strict=True)]
    rows = [
        Row(f"{coder}.{theirs}.{row.torch}", f"{coder}.layers.{n}.{row.ours}", row.transform)
        for coder, layers in (("encoder", encoder), ("decoder", decoder))
        for n, (theirs, layer) in enumerate(layers)
        for row in layer
    ]
    return Table((*VAE, *rows))


DIFFUSERS: dict[str, Callable[[Any], Table]] = {"transformer": transformer, "vae": vae, "text_encoder": text_encoder}
"""The table of each part in a folder of diffusers."""
