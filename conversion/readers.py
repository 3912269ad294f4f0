"""Tensors by name out of `.safetensors` files, sharded folders and PyTorch pickles, one at a time.

Pickles can run code when they are opened: `.pt` and `.pth` files are read by torch's weights-only loader and never
otherwise. torch is imported only when such a file is opened.
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from longlive_jax.errors import UserError, listed
from longlive_jax.tensor_files import SafetensorsPart

GENERATOR_KEYS = ("generator", "generator_ema", "model")
"""Entries of a LongLive or Self-Forcing file that hold a DiT, in the order they are tried."""

WRAPPERS = re.compile(r"_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.|_orig_mod\.")
UNSAFE = ("GLOBAL", "unrecognized function", "TorchScript")
"""In the messages of torch's weights-only loader: the file asks for something other than tensors and containers."""

PREFIXES = re.compile(r"^(?:model\.|module\.|diffusion_model\.)+")

MAPPED_BYTES = 64 * 2**20
"""So much of a mapped file may be read before it is mapped anew, which costs a tenth of a second."""


class Reader(Protocol):
    """Tensors of one model part.

    Attributes:
      where: the file, for messages.
      paths: every file read from.
      shapes, dtypes: of each tensor, by its plain name.
      metadata: free text by name, if the format has any.
    """

    where: str
    paths: list[Path]
    metadata: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, np.dtype]

    def read(self, name: str) -> np.ndarray:
        """The values of a tensor."""
        ...


class SafetensorsReader:
    """A `.safetensors` file, or the shards that `<file>.index.json` names."""

    def __init__(self, path: Path):
        part = SafetensorsPart.open(path)
        self.where = str(path)
        self.paths = part.paths
        self._names = plain_names(part.shapes, self.where)
        self.shapes = {name: part.shapes[stored] for name, stored in self._names.items()}
        self.dtypes = {name: part.dtypes[stored] for name, stored in self._names.items()}
        self.metadata = part.files[0].metadata if part.files else {}
        self._part = part

    def read(self, name: str) -> np.ndarray:
        return self._part.read(self._names[name])


class TorchReader:
    """A dict of tensors out of a `.pt` or `.pth` file; mapped from disk, unless the file has the old layout.

    Pages of a mapped file count as memory in use for as long as the mapping lives, so a file is mapped anew every
    `MAPPED_BYTES`: what has been read stays no longer than the arrays the caller holds.

    Args:
      path: the file.
      tensors: its dict.
      where: for messages.
      reopen: maps the file again and gives the same dict; None if the tensors are in memory anyway.
    """

    def __init__(self, path: Path, tensors: dict[str, Any], where: str, reopen: Callable[[], dict[str, Any]] | None):
        import torch

        wrong = [str(name) for name, value in tensors.items() if not isinstance(value, torch.Tensor)]
        wrong += [name for name, value in tensors.items() if isinstance(value, torch.Tensor) and not is_plain(value)]
        if wrong:
            raise UserError(f"{where} holds more than plain tensors: {listed(wrong)}; save the state dict alone")
        self.where = where
        self.paths = [path]
        self.metadata: dict[str, str] = {}
        self._names = plain_names(tensors, where)
        self._tensors = tensors
        self._reopen, self._read = reopen, 0
        self.shapes = {name: tuple(tensors[stored].shape) for name, stored in self._names.items()}
        self.dtypes = {name: _numpy_dtype(tensors[stored].dtype) for name, stored in self._names.items()}

    def read(self, name: str) -> np.ndarray:
        if self._reopen is not None and self._read > MAPPED_BYTES:
            self._tensors, self._read = self._reopen(), 0
        tensor = self._tensors[self._names[name]].detach().contiguous()  # is_plain: not more than the file has
        self._read += tensor.nbytes
        dtype = self.dtypes[name]
        if dtype == ml_dtypes.bfloat16:  # torch cannot hand this type to numpy; the bits go over as integers
            import torch

            return tensor.view(torch.int16).numpy().view(dtype)
        return tensor.numpy()


class Renamed:
    """The tensors of a reader by other names; those left out are not there.

    Args:
      reader: where they are.
      names: its name of each, by the new one.
    """

    def __init__(self, reader: Reader, names: dict[str, str]):
        self.where, self.paths, self.metadata = reader.where, reader.paths, reader.metadata
        self.shapes = {name: reader.shapes[stored] for name, stored in names.items()}
        self.dtypes = {name: reader.dtypes[stored] for name, stored in names.items()}
        self._reader, self._names = reader, names

    def read(self, name: str) -> np.ndarray:
        return self._reader.read(self._names[name])


def is_plain(tensor: Any) -> bool:
    """Whether all numbers of a tensor are in the file: not sparse, no shape alone, not a few that stand for many."""
    import torch

    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _numpy_dtype(dtype) -> np.dtype:
    name = str(dtype).removeprefix("torch.")
    try:
        return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else getattr(np, name))
    except (AttributeError, TypeError) as error:
        raise UserError(f"tensors of type {dtype} cannot be converted; save them as float32 or bfloat16") from error


def plain_names(stored: Iterable[str], where: str) -> dict[str, str]:
    """Plain name -> stored name, without the prefixes that wrappers and pipelines put in front.

    Raises:
      UserError: two tensors have the same plain name.
    """
    names: dict[str, str] = {}
    for name in stored:
        plain = PREFIXES.sub("", WRAPPERS.sub("", name))
        if plain in names:
            raise UserError(f"{where} has both {names[plain]} and {name}, which are the same tensor; remove one")
        names[plain] = name
    return names


def open_weights(path: str | Path, key: str | None = None, *, keys: tuple[str, ...] = ()) -> Reader:
    """Opens a file of weights.

    Args:
      path: `.safetensors` (or where it would be, with an index beside it; or that index), `.pt` or `.pth`.
      key: the entry of a `.pt` dict that holds the tensors; must be there if given.
      keys: entries tried in this order when no key is given; else the file itself must be the dict of tensors.

    Raises:
      UserError: the file is missing, damaged, unsafe, or has no such entry.
    """
    path = Path(path)
    if path.name.endswith(".safetensors.index.json"):
        path = path.with_name(path.name.removesuffix(".index.json"))
    if path.suffix == ".safetensors":
        if key is not None:
            raise UserError(f"{path} has no entries to choose from, only tensors; leave out the key '{key}'")
        return SafetensorsReader(path)
    loaded = load_pickle(path)
    found, tensors = choose(loaded, key, keys, str(path))
    reopen = (lambda: load_pickle(path)[found] if found else load_pickle(path)) if is_zip(path) else None
    return TorchReader(path, tensors, f"{path} [{found}]" if found else str(path), reopen)


def choose(loaded: Any, key: str | None, keys: tuple[str, ...], where: str) -> tuple[str | None, dict[str, Any]]:
    """The entry of a loaded file that holds the tensors, and its name (None for the file itself)."""
    if not isinstance(loaded, dict) or not all(isinstance(name, str) for name in loaded):
        raise UserError(f"{where} holds no named tensors; save a state dict")
    entries = [name for name, value in loaded.items() if isinstance(value, dict)]
    if key is not None:
        if key not in entries:
            there = f"it has {', '.join(entries)}" if entries else "it is a bare dict of tensors, leave out the key"
            raise UserError(f"{where} has no entry '{key}'; {there}")
        return key, loaded[key]
    for name in keys:
        if name in entries:
            return name, loaded[name]
    if entries:
        known = f"expected one of {', '.join(keys)}" if keys else "expected tensors"
        raise UserError(f"{where} has {', '.join(entries)}; {known}")
    return None, loaded


def is_zip(path: Path) -> bool:
    """Whether a PyTorch file can be mapped: files of torch before 1.6 are no zip archives and cannot."""
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def load_pickle(path: Path) -> Any:
    """A PyTorch file by the weights-only loader; every way it can fail is one line."""
    if path.suffix not in (".pt", ".pth", ".bin"):
        raise UserError(f"{path}: only .safetensors, .pt, .pth and .bin files hold weights")
    try:
        mapped = is_zip(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        import torch
    except ImportError as error:
        raise UserError(f'reading {path.name} needs PyTorch: pip install "longlive-jax[convert]"') from error
    try:
        if mapped:
            refuse_compressed(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice to its own users
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except UserError:
        raise
    except Exception as error:  # torch raises whatever a damaged archive leads to
        if any(sign in str(error) for sign in UNSAFE):
            raise UserError(
                f"{path} is refused: it holds more than weights and could run code; get a .safetensors file, or save "
                "the state dict alone"
            ) from error
        if isinstance(error, pickle.UnpicklingError):
            raise UserError(f"{path} is damaged or no PyTorch file of weights; copy or download it again") from error
        raise UserError(f"{path} is cut off or damaged; copy or download it again") from error


def refuse_compressed(path: Path) -> None:
    """Raises UserError for a zip archive of which anything is compressed.

    PyTorch compresses nothing. A few bytes could be inflated to fill the memory, and tensors are read where they lie.
    """
    with zipfile.ZipFile(path) as file:
        compressed = [info.filename for info in file.infolist() if info.compress_type != zipfile.ZIP_STORED]
    if compressed:
        raise UserError(f"{path} holds {listed(compressed)} compressed, as PyTorch writes no file; save it again")
