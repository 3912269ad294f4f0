"""How far a conversion is, for whoever wants to show it."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from longlive_jax.tensor_files import LazyTensor

CHUNK = 16 * 2**20
"""Bytes of a file that are hashed at a time."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of the work.

    Attributes:
      name: what is done, such as "writing vae".
      items: how many tensors or files it has.
      nbytes: their size, by which its time is judged.
      unit: what the items are.
    """

    name: str
    items: int
    nbytes: int
    unit: str = "tensors"


class Progress:
    """Is told what will be done and what has been. This one keeps it to itself."""

    def plan(self, stages: Sequence[Stage]) -> None:
        """All stages in their order, before the first begins."""

    def advance(self, stage: str, nbytes: int, items: int = 1) -> None:
        """So many bytes and items of a stage are done."""


def written(part: str, tensors: Sequence[LazyTensor]) -> Stage:
    """The stage of writing a part."""
    return Stage(f"writing {part.replace('_', ' ')}", len(tensors), sum(tensor.nbytes for tensor in tensors))


def watched(part: str, tensors: Sequence[LazyTensor], progress: Progress) -> list[LazyTensor]:
    """The tensors of a part; `progress` is told when each one's values are made, on the way to the file."""
    stage = written(part, tensors).name

    def watch(tensor: LazyTensor) -> LazyTensor:
        def make():
            values = tensor.make()
            progress.advance(stage, tensor.nbytes)
            return values

        return dataclasses.replace(tensor, make=make)

    return [watch(tensor) for tensor in tensors]


def hashed(path: Path, stage: str, progress: Progress) -> str:
    """The sha256 of a file; `progress` is told chunk by chunk."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            progress.advance(stage, len(chunk), items=0)
    progress.advance(stage, 0)
    return digest.hexdigest()
