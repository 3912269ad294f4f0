"""LoRA files, and merging them into the transformer's weights while these are converted.

W += (alpha / rank) scale B A, in float32. alpha is the file's: a tensor beside each pair (kohya, ComfyUI), or the
lora_alpha that peft and diffusers write into adapter_config.json or the header. A file without it gets the alpha it is
opened with, else its rank.

Three namings are known, each with the DiT's original module names or diffusers':

    base_model.model.blocks.0.self_attn.q.lora_A.weight     peft, LongLive's `generator_lora`
    transformer.blocks.0.attn1.to_q.lora_A.weight           diffusers; diffusion_model.blocks.0.... is ComfyUI's
    lora_unet_blocks_0_self_attn_q.lora_down.weight         kohya
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from longlive_jax.conversion.readers import Reader, open_weights
from longlive_jax.conversion.tables_diffusers import TRANSFORMER_MODULES
from longlive_jax.errors import UserError
from longlive_jax.json_files import parse_json, read_json

LORA_KEYS = ("generator_lora",)
"""Entries of a LongLive file that hold a LoRA for the generator."""

SIDES = {"lora_A": "A", "lora_down": "A", "lora.down": "A", "lora_B": "B", "lora_up": "B", "lora.up": "B"}
"""What people call the two matrices: A is [rank, in], B is [out, rank]."""

TENSOR = re.compile(
    rf"^(?P<module>.+)\.(?:(?P<side>{'|'.join(map(re.escape, SIDES))})(?:\.\w+)?\.weight|(?P<alpha>alpha))$"
)
PREFIXES = re.compile(r"^(?:base_model\.|model\.|diffusion_model\.|transformer\.|unet\.|lora_unet_|lora_transformer_)+")
LAYER = re.compile(r"^blocks([._])(\d+)\1")

MODULES = {
    spelled: original
    for diffusers, original in TRANSFORMER_MODULES.items()
    for name in (diffusers, original)
    for spelled in (name, name.replace(".", "_"))
}
"""Original name of a module, `{i}` for the layer, by every way to write it; kohya's has `_` for every dot."""


@dataclasses.dataclass(frozen=True)
class Lora:
    """A low-rank change of some of the transformer's weights.

    Attributes:
      reader: where its tensors are.
      sides: (name of A, name of B) for each weight, by the weight's original name.
      alphas: of each weight whose alpha is not its rank.
      says_alpha: whether the file, or what stands beside it, says alpha for every weight.
      scale: how strongly it is applied.
      faults: what keeps it from being used, whatever the transformer.
    """

    reader: Reader
    sides: dict[str, tuple[str, str]]
    alphas: dict[str, float]
    says_alpha: bool
    scale: float
    faults: list[str]

    @property
    def ranks(self) -> list[int]:
        return sorted({self._rank(weight) for weight in self.sides})

    @property
    def alpha_values(self) -> list[float]:
        """The alphas in use, the file's or the ranks."""
        return sorted({self.alphas.get(weight, self._rank(weight)) for weight in self.sides})

    def _rank(self, weight: str) -> int:
        return self.reader.shapes[self.sides[weight][0]][0]

    def factors(self, weight: str) -> tuple[np.float32, np.ndarray, np.ndarray] | None:
        """(alpha / rank) scale, B [out, rank] and A [rank, in], float32; None for weights it leaves alone."""
        if weight not in self.sides:
            return None
        a, b = (self.reader.read(name).astype(np.float32) for name in self.sides[weight])
        return np.float32(self.alphas.get(weight, a.shape[0]) / a.shape[0] * self.scale), b, a


def open_lora(path: str | Path, scale: float = 1.0, alpha: float | None = None) -> Lora:
    """Opens a LoRA: a LongLive `lora.pt` with `generator_lora`, or a file that is the bare dict.

    Args:
      path: the file.
      scale: how strongly it is applied.
      alpha: of the weights for which the file says none; their rank by default.

    Raises:
      UserError: the file cannot be read or is empty. All else that is wrong with it is in `faults`.
    """
    reader = open_weights(path, keys=LORA_KEYS)
    if not reader.shapes:
        raise UserError(f"{reader.where} is an empty LoRA; choose another file")
    halves: dict[str, dict[str, str]] = {}
    odd, faults = [], []
    for name, shape in reader.shapes.items():
        match = TENSOR.match(name)
        side = match and ("alpha" if match["alpha"] else SIDES[match["side"]])
        if not match or (math.prod(shape) != 1 if side == "alpha" else len(shape) != 2):
            odd.append(name)
            continue
        pair = halves.setdefault(f"{original_module(match['module'])}.weight", {})
        if side in pair:
            faults.append(f"{reader.where} has both {pair[side]} and {name}, which are the same tensor; remove one")
        pair[side] = name
    if odd:
        faults.append(f"{reader.where} has {', '.join(odd)}, which are no LoRA matrices by any known naming")
    single = [
        f"{weight} (only {', '.join(names.values())})" for weight, names in halves.items() if not {"A", "B"} <= {*names}
    ]
    if single:
        faults.append(f"{reader.where} has half a pair for {', '.join(single)}; copy or download it again")
    sides = {weight: (names["A"], names["B"]) for weight, names in halves.items() if {"A", "B"} <= {*names}}
    alphas, settings = {}, _settings(reader)
    for weight in sides:
        if "alpha" in halves[weight]:
            alphas[weight] = float(reader.read(halves[weight]["alpha"]).astype(np.float64).reshape(()))
        elif "lora_alpha" in settings or alpha is not None:
            alphas[weight] = float(settings.get("lora_alpha", alpha))
    says_alpha = "lora_alpha" in settings or all("alpha" in halves[weight] for weight in sides)
    if reader.paths[0].stem == "adapter_model" and not says_alpha and alpha is None:
        faults.append(f"{reader.where} has no adapter_config.json beside it; copy it there, or give --lora-alpha")
    unsupported = [key for key in ("alpha_pattern", "use_rslora", "use_dora") if settings.get(key)]
    if unsupported:
        faults.append(f"{reader.where} is made with {', '.join(unsupported)}, which is not supported")
    if not all(math.isfinite(value) for value in (scale, *alphas.values())):
        faults.append(f"{reader.where}: scale {scale} or an alpha is not a finite number")
    return Lora(reader, sides, alphas, says_alpha, scale, faults)


def original_module(name: str) -> str:
    """The original name of a module, from any of the namings; a name not of the DiT without its prefix."""
    name = PREFIXES.sub("", name)
    layer = LAYER.match(name)
    pattern = name if layer is None else f"blocks{layer[1]}{{i}}{layer[1]}{name[layer.end() :]}"
    return MODULES[pattern].format(i=layer and layer[2]) if pattern in MODULES else name


def _settings(reader: Reader) -> dict[str, Any]:
    """What peft or diffusers note about a LoRA besides its tensors: adapter_config.json, or a part of the header."""
    path, where = reader.paths[0], f"the header of {reader.paths[0]}"
    text = reader.metadata.get("lora_adapter_metadata", "{}")
    config = path.with_name("adapter_config.json")
    if path.name.startswith("adapter_model.") and config.is_file():
        where, found = str(config), read_json(config)
    else:
        found = parse_json(text, where)
    settings = {name.removeprefix("transformer."): value for name, value in found.items()}
    try:
        float(settings.get("lora_alpha", 1))
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{where} does not say how the LoRA was made ({error}); copy or download it again") from error
    return settings


def lora_faults(lora: Lora, weights: dict[str, tuple[int, ...]]) -> list[str]:
    """What keeps a LoRA from being merged into the weights of these names and torch shapes."""
    where, shapes = lora.reader.where, lora.reader.shapes
    unknown = [weight for weight in lora.sides if weight not in weights]
    if lora.sides and len(unknown) == len(lora.sides):
        return [f"{where} matches nothing in the transformer (it changes {', '.join(unknown)}); use one made for it"]
    faults = [f"{where} changes {', '.join(unknown)}, which the transformer does not have"] if unknown else []
    for weight, (a, b) in lora.sides.items():
        (rank, inner), (outer, rank_b) = shapes[a], shapes[b]
        if weight in weights and (rank != rank_b or weights[weight] != (outer, inner) or rank < 1):
            faults.append(
                f"{where}: B {[outer, rank_b]} times A {[rank, inner]} does not fit {weight} {list(weights[weight])}"
            )
    return faults


def merge(weight: str, values: np.ndarray, loras: Sequence[Lora]) -> np.ndarray:
    """A weight with all LoRAs added, float32; untouched if none changes it."""
    changes = [factors for lora in loras if (factors := lora.factors(weight)) is not None]
    return values.astype(np.float32) + sum(scale * (b @ a) for scale, b, a in changes) if changes else values
