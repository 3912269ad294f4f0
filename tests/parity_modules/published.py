"""What the tests here share: the published networks with random weights, ours with the same ones, and the comparison.

diffusers' and transformers' names are mapped to Wan's original ones here, independently of the package, and from there
by the package's own tables: so the tests are also a second opinion on any table with diffusers' names.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from einops import rearrange
from flax import nnx

from longlive_jax import checkpoint
from longlive_jax.conversion import tables
from longlive_jax.models.layers import structure

RENAMES = {
    "transformer": (
        (r"^condition_embedder\.(time|text)_embedder\.linear_1", r"\1_embedding.0"),
        (r"^condition_embedder\.(time|text)_embedder\.linear_2", r"\1_embedding.2"),
        (r"^condition_embedder\.time_proj", "time_projection.1"),
        (r"\.attn1\.", ".self_attn."),
        (r"\.attn2\.", ".cross_attn."),
        (r"\.to_([qkv])\.", r".\1."),
        (r"\.to_out\.0\.", ".o."),
        (r"^(blocks\.\d+)\.norm2\.", r"\1.norm3."),  # the only norm of a block with weights, third in Wan's own count
        (r"\.ffn\.net\.0\.proj\.", ".ffn.0."),
        (r"\.ffn\.net\.2\.", ".ffn.2."),
        (r"^scale_shift_table", "head.modulation"),
        (r"\.scale_shift_table", ".modulation"),
        (r"^proj_out", "head.head"),
    ),
    "text_encoder": (
        (r"^(shared|encoder\.embed_tokens)\.", "token_embedding."),
        (r"^encoder\.block\.", "blocks."),
        (r"\.layer\.0\.SelfAttention\.relative_attention_bias\.", ".pos_embedding.embedding."),
        (r"\.layer\.0\.SelfAttention\.", ".attn."),
        (r"\.layer\.1\.DenseReluDense\.wi_0\.", ".ffn.gate.0."),
        (r"\.layer\.1\.DenseReluDense\.wi_1\.", ".ffn.fc1."),
        (r"\.layer\.1\.DenseReluDense\.wo\.", ".ffn.fc2."),
        (r"\.layer\.0\.layer_norm\.", ".norm1."),
        (r"\.layer\.1\.layer_norm\.", ".norm2."),
        (r"^encoder\.final_layer_norm\.", "norm."),
    ),
    "vae": (
        (r"^quant_conv", "conv1"),
        (r"^post_quant_conv", "conv2"),
        (r"coder\.conv_in", "coder.conv1"),
        (r"coder\.norm_out", "coder.head.0"),
        (r"coder\.conv_out", "coder.head.2"),
        (r"\.mid_block\.attentions\.0\.", ".middle.1."),
        (r"\.mid_block\.resnets\.0\.", ".middle.0."),
        (r"\.mid_block\.resnets\.1\.", ".middle.2."),
        (r"\.down_blocks\.", ".downsamples."),
        (r"\.conv_shortcut\.", ".shortcut."),
        (r"(\d)\.norm1\.", r"\1.residual.0."),
        (r"(\d)\.conv1\.", r"\1.residual.2."),
        (r"(\d)\.norm2\.", r"\1.residual.3."),
        (r"(\d)\.conv2\.", r"\1.residual.6."),
    ),
}
"""Patterns, applied in order, that turn the published name of a weight into Wan's."""


def original_name(part: str, name: str, res_blocks: int = 0) -> str:
    """Wan's name of a published weight. Wan's decoder has one list of layers, the published one a list of levels."""
    for pattern, replacement in RENAMES[part]:
        name = re.sub(pattern, replacement, name)
    if match := re.match(r"decoder\.up_blocks\.(\d+)\.(?:resnets\.(\d+)|upsamplers\.0)\.(.*)", name):
        level, layer, rest = match.groups()
        index = int(level) * (res_blocks + 2) + (res_blocks + 1 if layer is None else int(layer))
        name = f"decoder.upsamples.{index}.{rest}"
    return name


def randomised(network: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """The network with weights that keep activations near 1 and in which no bias and no norm is trivial."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if name.endswith("gamma") or (parameter.ndim == 1 and name.endswith("weight")):
            values = 1 + 0.3 * values
        elif name.endswith(("bias", "scale_shift_table")):
            values = 0.3 * values
        elif "embed_tokens" not in name and "shared" not in name and "relative_attention_bias" not in name:
            values = values / np.sqrt(parameter[0].numel())
        parameter.data = values
    return network.eval().requires_grad_(False)


def converted(part: str, cfg: Any, network: torch.nn.Module) -> dict[str, Any]:
    """The network's weights as ours, each layer's apart. All of them are used, and they are all that ours need."""
    res_blocks = getattr(cfg, "res_blocks", 0)
    state = {original_name(part, name, res_blocks): value.numpy() for name, value in network.state_dict().items()}
    table = tables.WAN[part](cfg)
    assert sorted(state) == sorted(row.torch for row in table.rows)
    flat = {row.ours: row.transform.to_ours(state[row.torch], **table.sizes) for row in table.rows}
    shapes = {name: array.shape for name, array in flat.items()}
    assert not checkpoint.compare_shapes(part, checkpoint.tensor_shapes(part, cfg), shapes)
    params: dict[str, Any] = {}
    for name, array in flat.items():
        *path, last = (int(key) if key.isdigit() else key for key in name.split("."))
        node = params
        for key in path:
            node = node.setdefault(key, {})
        node[last] = jnp.asarray(array)
    return params


def stacked(params: dict[str, Any]) -> dict[str, Any]:
    """The same weights for a network that scans over its layers."""
    blocks = params["blocks"]
    return params | {"blocks": jax.tree.map(lambda *a: jnp.stack(a), *(blocks[i] for i in range(len(blocks))))}


_call = jax.jit(
    lambda function, graph, params, *arrays: function(nnx.merge(graph, params), *arrays), static_argnums=(0, 1)
)


def run(make, params, function, *arrays):
    """`function(module, *arrays)` of the module that `make` describes, or whose structure it is, with these weights.

    Compiled; the same function, structure and shapes are compiled once.
    """
    return _call(function, make if isinstance(make, nnx.GraphDef) else structure(make), params, *arrays)


def recorded(network: torch.nn.Module, call) -> dict[str, list[tuple[tuple, dict, Any]]]:
    """Runs `call()` and gives (positional inputs, named inputs, output) of every call of every module, by its name.

    So a module of ours can be fed with what its counterpart saw. Names are in the order of their first calls.
    """
    calls: dict[str, list] = {name: [] for name, _ in network.named_modules()}
    order: list[str] = []

    def hook(name):
        def remember(module, args, kwargs, output):
            calls[name].append((args, kwargs, output))
            order.append(name)

        return remember

    handles = [m.register_forward_hook(hook(name), with_kwargs=True) for name, m in network.named_modules()]
    with torch.no_grad():
        call()
    for handle in handles:
        handle.remove()
    return {name: calls[name] for name in dict.fromkeys(order)}


def ours(tensor: torch.Tensor) -> jax.Array:
    """A torch tensor as a JAX array; a video or its latents `[B, C, T, h, w]` as `[B, T, h, w, C]`."""
    array = tensor.detach().numpy()
    return jnp.asarray(rearrange(array, "b c t h w -> b t h w c") if array.ndim == 5 else array)


def error(got, expected) -> float:
    """The largest absolute error over the root mean square of what is expected (a torch tensor, or from `ours`)."""
    expected = np.asarray(ours(expected) if isinstance(expected, torch.Tensor) else expected, np.float64)
    got = np.asarray(got, np.float64)
    assert got.shape == expected.shape
    return float(np.max(np.abs(got - expected)) / np.sqrt(np.mean(np.square(expected))))
