"""LoRA files, and merging them into the transformer's weights while these are converted.

W += (alpha / rank) scale B A, in float32. peft does not write alpha into its file; it is the rank unless told.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from longlive_jax.conversion.readers import Reader, open_weights
from longlive_jax.errors import UserError

LORA_KEYS = ("generator_lora",)
"""Entries of a LongLive file that hold a LoRA for the generator."""

PEFT = re.compile(r"^(?:base_model\.)?(?:model\.)*(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight$")


@dataclasses.dataclass(frozen=True)
class Lora:
    """A low-rank change of some of the transformer's weights.

    Attributes:
      reader: where its tensors are.
      sides: (name of A, name of B) for each weight, by the weight's original name.
      scale: how strongly it is applied.
      alpha: peft's alpha; None for the rank.
    """

    reader: Reader
    sides: dict[str, tuple[str, str]]
    scale: float
    alpha: float | None

    @property
    def rank(self) -> int:
        return self.reader.shapes[next(iter(self.sides.values()))[0]][0]

    def delta(self, weight: str) -> np.ndarray | None:
        """What is added to a weight, float32 [out, in]; None for weights it leaves alone."""
        if weight not in self.sides:
            return None
        a, b = (self.reader.read(name).astype(np.float32) for name in self.sides[weight])
        alpha = a.shape[0] if self.alpha is None else self.alpha
        return np.float32(alpha / a.shape[0] * self.scale) * (b @ a)


def open_lora(path: str | Path, scale: float = 1.0, alpha: float | None = None) -> Lora:
    """Opens a LoRA with peft's names: a `lora.pt` with `generator_lora`, or a file that is the bare dict.

    Raises:
      UserError: the file cannot be read, has tensors that are no LoRA's, or lacks one half of a pair.
    """
    reader = open_weights(path, keys=LORA_KEYS)
    halves: dict[str, dict[str, str]] = {}
    odd = []
    for name in reader.shapes:
        match = PEFT.match(name)
        if match and len(reader.shapes[name]) == 2:
            halves.setdefault(f"{match['module']}.weight", {})[match["side"]] = name
        else:
            odd.append(name)
    if odd:
        raise UserError(f"{reader.where} has {', '.join(odd)}, which are no LoRA matrices by peft's names")
    if not halves:
        raise UserError(f"{reader.where} is an empty LoRA; choose another file")
    single = [f"{weight} (only lora_{next(iter(sides))})" for weight, sides in halves.items() if len(sides) == 1]
    if single:
        raise UserError(f"{reader.where} has half a pair for {', '.join(single)}; copy or download it again")
    return Lora(reader, {weight: (sides["A"], sides["B"]) for weight, sides in halves.items()}, scale, alpha)


def lora_faults(lora: Lora, weights: dict[str, tuple[int, ...]]) -> list[str]:
    """What keeps a LoRA from being merged into the weights of these names and torch shapes."""
    where, shapes = lora.reader.where, lora.reader.shapes
    unknown = [weight for weight in lora.sides if weight not in weights]
    if len(unknown) == len(lora.sides):
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
    deltas = [delta for lora in loras if (delta := lora.delta(weight)) is not None]
    return values.astype(np.float32) + sum(deltas) if deltas else values
