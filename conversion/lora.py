"""LoRA files, and merging them into the transformer's weights while these are converted.

W += (alpha / rank) scale B A, in float32. alpha is the file's: a tensor beside each pair (kohya, ComfyUI), or the
lora_alpha that peft and diffusers write into adapter_config.json or the header. A file without it gets the alpha it is
opened with, else its rank. Such files may also hold whole differences, of norms and biases mostly, which have no alpha:
W += scale diff, b += scale diff_b.

Three namings are known, each with the DiT's original module names or diffusers':

    base_model.model.blocks.0.self_attn.q.lora_A.weight     peft, LongLive's `generator_lora`
    transformer.blocks.0.attn1.to_q.lora_A.weight           diffusers; diffusion_model.blocks.0.... is ComfyUI's
    lora_unet_blocks_0_self_attn_q.lora_down.weight         kohya
    diffusion_model.blocks.0.self_attn.norm_q.diff          a whole difference; diff_b is the bias's
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
from longlive_jax.errors import UserError, listed
from longlive_jax.json_files import parse_json, read_json

LORA_KEYS = ("generator_lora",)
"""Entries of a LongLive file that hold a LoRA for the generator."""

SIDES = {"lora_A": "A", "lora_down": "A", "lora.down": "A", "lora_B": "B", "lora_up": "B", "lora.up": "B"}
"""What people call the two matrices: A is [rank, in], B is [out, rank]."""

TENSOR = re.compile(
    rf"^(?P<module>.+)\.(?:(?P<side>{'|'.join(map(re.escape, SIDES))})(?:\.\w+)?\.weight"
    r"|(?P<alpha>alpha)|(?P<diff>diff|diff_b))$"
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
      diffs: name of the whole difference of each parameter that has one, by the parameter's original name.
      alphas: of each weight whose alpha is not its rank.
      says_alpha: whether the file, or what stands beside it, says alpha for every weight.
      scale: how strongly it is applied.
      faults: what keeps it from being used, whatever the transformer.
    """

    reader: Reader
    sides: dict[str, tuple[str, str]]
    diffs: dict[str, str]
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

    def difference(self, parameter: str) -> np.ndarray | None:
        """What is added whole to a parameter, scaled, float32; None for those it leaves alone."""
        if parameter not in self.diffs:
            return None
        return np.float32(self.scale) * self.reader.read(self.diffs[parameter]).astype(np.float32)

    def changes(self, parameter: str) -> bool:
        """Whether it changes a parameter at all."""
        return parameter in self.sides or parameter in self.diffs


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
    diffs: dict[str, str] = {}
    odd, faults = [], []
    for name, shape in reader.shapes.items():
        match = TENSOR.match(name)
        if match and match["diff"]:
            parameter = whole(original_module(match["module"]), match["diff"])
            if parameter in diffs:
                faults.append(same_tensor(reader, diffs[parameter], name))
            diffs[parameter] = name
            continue
        side = match and ("alpha" if match["alpha"] else SIDES[match["side"]])
        if not match or (math.prod(shape) != 1 if side == "alpha" else len(shape) != 2):
            odd.append(name)
            continue
        pair = halves.setdefault(f"{original_module(match['module'])}.weight", {})
        if side in pair:
            faults.append(same_tensor(reader, pair[side], name))
        pair[side] = name
    if odd:
        faults.append(f"{reader.where} has {listed(odd)}, which are no LoRA matrices by any known naming")
    single = {weight: list(names.values()) for weight, names in halves.items() if not {"A", "B"} <= {*names}}
    if single:
        there = listed(name for names in single.values() for name in names)
        faults.append(f"{reader.where} has half a pair for {listed(single)} (only {there}); copy or download it again")
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
    return Lora(reader, sides, diffs, alphas, says_alpha, scale, faults)


def whole(module: str, kind: str) -> str:
    """Original name of the parameter that a `diff` or `diff_b` of a module changes; some parameters are no module's."""
    if module.rpartition(".")[2] == "modulation":
        return module
    return f"{module}.{'bias' if kind == 'diff_b' else 'weight'}"


def same_tensor(reader: Reader, one: str, two: str) -> str:
    return f"{reader.where} has both {one} and {two}, which are the same tensor; remove one"


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


def lora_faults(lora: Lora, parameters: dict[str, tuple[int, ...]]) -> list[str]:
    """What keeps a LoRA from being merged into the parameters of these names and torch shapes."""
    where, shapes = lora.reader.where, lora.reader.shapes
    changed = [*lora.sides, *(name for name in lora.diffs if name not in lora.sides)]
    unknown = [
        name for name in changed if name not in parameters or (name in lora.sides and len(parameters[name]) != 2)
    ]
    if changed and len(unknown) == len(changed):
        return [f"{where} matches nothing in the transformer (it changes {listed(unknown)}); use one made for it"]
    faults = [f"{where} changes {listed(unknown)}, which the transformer does not have"] if unknown else []
    wrong: dict[str, list[str]] = {}
    for name in changed:
        if name in unknown:
            continue
        right = list(parameters[name])
        if name in lora.sides:
            (rank, inner), (outer, rank_b) = (shapes[side] for side in lora.sides[name])
            if rank != rank_b or right != [outer, inner] or rank < 1:
                wrong.setdefault(f"B {[outer, rank_b]} times A {[rank, inner]} does not fit {{}} {right}", []).append(
                    name
                )
        if name in lora.diffs and list(shapes[lora.diffs[name]]) != right:
            given = list(shapes[lora.diffs[name]])
            wrong.setdefault(f"a difference {given} does not fit {{}} {right}", []).append(name)
    return faults + [f"{where}: {text.format(listed(names))}" for text, names in wrong.items()]


def merge(parameter: str, values: np.ndarray, loras: Sequence[Lora]) -> np.ndarray:
    """A parameter with all LoRAs added, float32; untouched if none changes it."""
    loras = [lora for lora in loras if lora.changes(parameter)]
    if not loras:
        return values
    pairs = [factors for lora in loras if (factors := lora.factors(parameter)) is not None]
    diffs = [diff for lora in loras if (diff := lora.difference(parameter)) is not None]
    return values.astype(np.float32) + sum(scale * (b @ a) for scale, b, a in pairs) + sum(diffs)
