"""Safetensors files, one or several a part: written tensor by tensor, read lazily, faults collected.

Each file's header holds the sha256 of every tensor it has.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from longlive_jax.errors import UserError, collect, listed, raise_all
from longlive_jax.json_files import read_json

DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
"""The dtype names of the safetensors format that we read and write."""


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor whose shape is known and whose values are made when they are written.

    Attributes:
      name: path in the file, parts joined by dots.
      shape: its shape.
      dtype: numpy dtype it is written in; what `make` gives is cast to it.
      make: gives the values.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def write_safetensors(
    path: Path, tensors: Sequence[LazyTensor], metadata: dict[str, str] | None = None
) -> dict[str, str]:
    """Writes one file, holding one tensor at a time. Returns the sha256 of each tensor, which the header has too.

    The header goes first, with zeros for the hashes; they have a fixed length and are filled in at the end. `metadata`
    is what else the header's free part shall have.
    """
    codes = {np.dtype(kind): code for code, kind in DTYPES.items()}
    entries, offset = {}, 0
    for tensor in tensors:
        ends = [offset, offset + tensor.nbytes]
        entries[tensor.name] = {"dtype": codes[np.dtype(tensor.dtype)], "shape": tensor.shape, "data_offsets": ends}
        offset = ends[1]
    hashes = {tensor.name: "0" * 64 for tensor in tensors}
    with open(path, "wb") as file:
        file.write(_header({**(metadata or {}), **hashes}, entries))
        for tensor in tensors:
            values = np.asarray(tensor.make())
            if values.shape != tuple(tensor.shape):
                raise ValueError(f"{tensor.name} was announced as {tensor.shape} and made as {values.shape}")
            data = np.ascontiguousarray(values.astype(tensor.dtype, copy=False)).reshape(-1).view(np.uint8).data
            hashes[tensor.name] = hashlib.sha256(data).hexdigest()
            file.write(data)
        file.seek(0)
        file.write(_header({**(metadata or {}), **hashes}, entries))
        file.flush()
        os.fsync(file.fileno())
    return hashes


def _header(metadata: dict[str, str], entries: dict[str, dict]) -> bytes:
    text = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the values start at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text


class SafetensorsFile:
    """Reads tensors of one file by name.

    Attributes:
      path: the file.
      metadata: the header's free part, text by name.
      shapes, dtypes: of each tensor.
    """

    def __init__(self, path: str | os.PathLike):
        """Raises UserError for a file that is missing, cut off, or no safetensors file."""
        self.path = Path(path)
        try:
            with safe_open(self.path, "np") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}
                self.metadata = file.metadata() or {}
                self.shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
                codes = {name: part.get_dtype() for name, part in slices.items()}
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from error
        except SafetensorError as error:
            raise UserError(f"{path} is cut off or damaged ({error}); copy or download it again") from error
        unknown = sorted({code for code in codes.values() if code not in DTYPES})
        if unknown:
            raise UserError(f"{path} has tensors of type {', '.join(unknown)}; save them as one of {', '.join(DTYPES)}")
        self.dtypes = {name: np.dtype(DTYPES[code]) for name, code in codes.items()}

    def read(self, name: str) -> np.ndarray:
        """The values of one tensor, in memory of their own."""
        try:
            with safe_open(self.path, "np") as file:  # opened each time: pages of a mapped file count as memory in use
                return file.get_tensor(name)
        except (OSError, SafetensorError) as error:  # as when it was opened, unless it has changed since
            raise UserError(f"{self.path}: {name} cannot be read ({error}); copy or download it again") from error


def read_index(path: Path) -> tuple[dict[str, str], list[str]]:
    """An index of shards: tensor -> file, and the names of all files, which stand beside the index.

    Raises:
      UserError: it cannot be read, is no index, or names files elsewhere.
    """
    weight_map = read_json(path, "it is no index of shards; copy or download it again").get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{path} is no index of shards; copy or download it again")
    names = sorted(set(weight_map.values()))
    outside = [name for name in names if not is_plain(name)]
    if outside:
        raise UserError(f"{path} names {listed(outside)}; shards stand beside their index, by plain names")
    return weight_map, names


def is_plain(name: str) -> bool:
    """Whether a name out of a file is that of something in the same folder: no path, no link to the folder above."""
    return (
        name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"} and len(name.encode("utf-8", "replace")) < 256
    )


class SafetensorsPart:
    """The tensors of a model part: one file, or the shards that an index names."""

    def __init__(self, files: Sequence[SafetensorsFile]):
        self.files = list(files)
        self._owner = {name: file for file in files for name in file.shapes}

    @classmethod
    def open(cls, path: Path) -> SafetensorsPart:
        """Opens `path`, or the shards of `path`.index.json beside it. Raises UserError with all that is wrong."""
        index = path.with_name(path.name + ".index.json")
        if path.is_file() or not index.is_file():
            if not path.is_file():
                raise UserError(f"{path} is missing, and so is {index.name}; copy it there")
            return cls([SafetensorsFile(path)])
        weight_map, names = read_index(index)
        files, faults = [], []
        for name in names:
            with collect(faults):
                if not (path.parent / name).is_file():
                    raise UserError(f"{path.parent / name} is missing, but {index.name} names it; copy it there")
                files.append(SafetensorsFile(path.parent / name))
        part = cls(files)
        if not faults:
            for name in names:
                lost = [tensor for tensor, file in weight_map.items() if file == name and tensor not in part.shapes]
                faults += [f"{path.parent / name} lacks {listed(lost)}, which {index.name} names there"] if lost else []
        raise_all(faults)
        return part

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: file.shapes[name] for name, file in self._owner.items()}

    @property
    def dtypes(self) -> dict[str, np.dtype]:
        return {name: file.dtypes[name] for name, file in self._owner.items()}

    @property
    def paths(self) -> list[Path]:
        return [file.path for file in self.files]

    def read(self, name: str) -> np.ndarray:
        return self._owner[name].read(name)
