"""PyTorch's `.pt` and `.pth` files, written without having all tensors in memory.

`torch.save` wants all tensors at once. They go to a safetensors file first, one at a time, and are handed over as views
of that file mapped into memory: what a file of any size needs is disk for a second copy while it is written. torch is
imported only here, and only when such a file is written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from longlive_jax.errors import UserError
from longlive_jax.tensor_files import DTYPES, LazyTensor, write_safetensors


def require_torch() -> None:
    """Raises UserError without PyTorch, which alone writes `.pt` and `.pth` files."""
    try:
        import torch  # noqa: F401 - only whether it is there
    except ImportError as error:
        raise UserError('writing .pt and .pth files needs PyTorch: pip install "longlive-jax[convert]"') from error


def stream_to_pickle(tensors: Sequence[LazyTensor], path: Path, wrap: Callable[[dict], dict] = dict) -> dict[str, str]:
    """Writes a `.pt` or `.pth` file of `wrap(name -> tensor)`; returns the sha256 of every tensor."""
    scratch = path.with_name(f".{path.name}.safetensors")
    try:
        hashes = write_safetensors(scratch, tensors)
        torch_save([scratch], path, wrap)
    finally:
        scratch.unlink(missing_ok=True)
    return hashes


def torch_save(files: Iterable[Path], path: Path, wrap: Callable[[dict], dict]) -> None:
    """Writes `wrap(name -> tensor)` of safetensors files as a PyTorch pickle, mapping the files instead of reading."""
    import torch

    tensors = {name: as_torch(values) for file in files for name, values in mapped(file).items()}
    with open(path, "wb") as file:
        torch.save(wrap(tensors), file)
        file.flush()
        os.fsync(file.fileno())


def mapped(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file as views of its pages; nothing is read before it is used."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    data = np.memmap(path, np.uint8, mode="c", offset=8 + length)  # copy on write: torch warns of read-only arrays
    header.pop("__metadata__", None)
    return {
        name: data[slice(*entry["data_offsets"])].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in header.items()
    }


def as_torch(values: np.ndarray) -> Any:
    """A tensor that shares an array's memory. torch cannot take bfloat16 from numpy; the bits go as integers."""
    import torch

    if values.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)
