"""Low-rank adapters: W + (alpha / rank) A B with W frozen, on every linear layer inside the blocks.

`adapt` puts them into a transformer, so that the adapter is computed beside the layer, without the merged weights ever
existing. `split` tells what is trained from what is not, `merge` gives plain weights for decoding.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jaxtyping import Array, Num

from longlive_jax import checkpoint
from longlive_jax.models import products
from longlive_jax.models.layers import Linear, map_linears
from longlive_jax.models.transformer import WanTransformer
from longlive_jax.tensor_files import write_safetensors

LORA = ("lora_a", "lora_b")
"""Names of the adapter's two parameters; whatever has another name is frozen."""


class LoraLinear(Linear):
    """A linear layer with an adapter; begins as the layer it replaces, for B is zero.

    Args:
      base: the layer; its parameters may have a leading layer axis, and the adapter's then have it too.
      rank: of the adapter.
      alpha: scale times rank.
    """

    def __init__(self, base: Linear, rank: int, alpha: float, *, rngs: nnx.Rngs):
        self.kernel, self.bias = base.kernel, base.bias
        *layers, inputs, outputs = base.kernel.shape
        # As peft's default, so that learning rates carry over: Kaiming uniform with a = sqrt(5).
        bound = 1 / math.sqrt(inputs)
        draw = jax.random.uniform(rngs.params(), (*layers, inputs, rank), minval=-bound, maxval=bound)
        self.lora_a = nnx.Param(draw)
        self.lora_b = nnx.Param(jnp.zeros((*layers, rank, outputs)))
        self.scale = alpha / rank

    def __call__(self, x: Num[Array, "... i"]) -> Num[Array, "... o"]:
        low = products.linear(x, self.lora_a.get_value(), None)
        return super().__call__(x) + self.scale * products.linear(low, self.lora_b.get_value(), None)


def adapt(model: WanTransformer, *, rank: int, alpha: float, rngs: nnx.Rngs) -> WanTransformer:
    """Gives every linear layer inside the blocks an adapter, in place; nothing else gets one.

    LongLive's own: rank 256, alpha 256, student and critic.
    """
    map_linears(model.blocks, lambda linear: LoraLinear(linear, rank, alpha, rngs=rngs))
    return model


@struct.dataclass
class Adapted:
    """Parameters in two parts; only the first is trained."""

    trained: Any
    frozen: Any


def split(params: dict[str, Any]) -> Adapted:
    """The parameters of an adapted network in two parts."""
    return Adapted(_select(params, lambda name: name in LORA), _select(params, lambda name: name not in LORA))


def parts(params: Any) -> tuple[Any, Any]:
    """(trained, frozen); of a plain dict all is trained."""
    return (params.trained, params.frozen) if isinstance(params, Adapted) else (params, {})


def join(trained: dict[str, Any], frozen: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `split`."""
    joined = dict(frozen)
    for name, value in trained.items():
        joined[name] = join(value, frozen.get(name, {})) if isinstance(value, dict) else value
    return joined


def merge(params: Any, scale: float) -> dict[str, Any]:
    """Plain parameters with the adapters added into the weights, in float32.

    Args:
      params: of an adapted network, whole or `Adapted`.
      scale: alpha / rank.
    """
    whole = join(*parts(params))
    merged = {
        name: merge(value, scale) if isinstance(value, dict) else value
        for name, value in whole.items()
        if name not in LORA
    }
    if LORA[0] in whole:
        kernel = whole["kernel"]
        a, b = (whole[name].astype(jnp.float32) for name in LORA)
        merged["kernel"] = (kernel.astype(jnp.float32) + scale * (a @ b)).astype(kernel.dtype)
    return merged


def keep(trained: dict[str, Any], scale: float, folder: Path, *_) -> None:
    """Writes adapters into the checkpoint folder that has them merged, as `checkpoint.LORA` says.

    Args:
      trained: the adapters, as `split` gives them.
      scale: alpha / rank; it goes into B.
      folder: the checkpoint's.
    """
    scaled = lambda path, leaf: leaf * scale if path[-1].key == LORA[1] else leaf
    tensors = checkpoint.lazy_tensors(jax.tree_util.tree_map_with_path(scaled, trained), np.float32)
    write_safetensors(folder / checkpoint.LORA, tensors)


def _select(params: dict[str, Any], wanted) -> dict[str, Any]:
    chosen = {}
    for name, value in params.items():
        if isinstance(value, dict):
            if inner := _select(value, wanted):
                chosen[name] = inner
        elif wanted(name):
            chosen[name] = value
    return chosen
