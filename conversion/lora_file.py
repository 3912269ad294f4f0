"""LoRAs of ours as LongLive's `lora.pt`: what `lora` reads, written."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from longlive_jax import checkpoint
from longlive_jax.config import TransformerConfig
from longlive_jax.conversion import tables
from longlive_jax.conversion.convert import OUTPUT_DTYPES
from longlive_jax.conversion.torch_files import require_torch, stream_to_pickle
from longlive_jax.errors import UserError, listed, raise_all
from longlive_jax.files import whole_file
from longlive_jax.tensor_files import LazyTensor, SafetensorsFile

Factors = tuple[np.ndarray, np.ndarray]
"""A of shape [in, rank] and B of shape [rank, out]: a kernel [in, out] changes by (alpha / rank) A B."""


def write_lora(
    path: str | Path,
    loras: Mapping[str, Mapping[str, Factors]],
    cfg: TransformerConfig,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
) -> None:
    """Writes LoRAs of the transformer as LongLive's `lora.pt`, by the names peft gives them.

    Alpha is not in the file: LongLive has it in its YAML file (`adapter.alpha`), and others take the rank.

    Args:
      path: the file, ending in `.pt`.
      loras: `{"generator_lora": factors, "critic_lora": factors}` or one of them. Factors go by the kernel they change:
        of one layer ("blocks.3.ffn.up.kernel"), or of all ("blocks.ffn.up.kernel") with a leading layer axis on both.
      cfg: sizes of the transformer.
      dtype: "bfloat16" or "float32"; as given by default.
      overwrite: replace a file that is there.

    Raises:
      UserError: a name is no kernel of the transformer, shapes do not fit it (all faults at once), the file exists, or
        PyTorch is missing.
    """
    path = Path(path)
    if os.path.lexists(path) and (path.is_dir() or not overwrite):
        raise UserError(f"{path} exists and is kept; choose another output or overwrite it")
    require_torch()
    faults, tensors = [], []
    for entry, factors in loras.items():
        tensors += _peft_tensors(entry, factors, cfg, OUTPUT_DTYPES[dtype] if dtype else None, faults)
    raise_all(faults, "cannot write the LoRA: ")

    def split(tensors: dict[str, Any]) -> dict[str, dict[str, Any]]:
        return {e: {n.removeprefix(f"{e}/"): t for n, t in tensors.items() if n.startswith(f"{e}/")} for e in loras}

    try:
        with whole_file(path) as partial:
            stream_to_pickle(tensors, partial, split)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def read_factors(folder: Path) -> dict[str, Factors]:
    """The LoRA beside a checkpoint's merged weights, by the kernel it changes; empty without one.

    Raises:
      UserError: the file is damaged, or a matrix is there without the other.
    """
    path = folder / checkpoint.LORA
    if not path.is_file():
        return {}
    file = SafetensorsFile(path)
    sides = {side: {n.removesuffix(side) for n in file.shapes if n.endswith(side)} for side in (".lora_a", ".lora_b")}
    modules = sides[".lora_a"] & sides[".lora_b"]
    odd = [name for name in file.shapes if name.rpartition(".")[0] not in modules]
    if odd:
        raise UserError(f"{path} has {listed(odd)}, which are no pairs of lora_a and lora_b; copy the checkpoint again")
    return {f"{m}.kernel": (file.read(f"{m}.lora_a"), file.read(f"{m}.lora_b")) for m in sorted(modules)}


def _peft_tensors(
    entry: str, factors: Mapping[str, Factors], cfg: TransformerConfig, dtype: Any, faults: list[str]
) -> list[LazyTensor]:
    """The LoRA matrices of one entry in torch's layout, named "entry/peft's name"; faults are noted."""
    kernels = {row.ours: row.torch for row in tables.wan_transformer(cfg).rows if row.transform is tables.LINEAR}
    shapes = checkpoint.tensor_shapes("transformer", cfg)
    found: list[LazyTensor] = []
    for name, (a, b) in by_layer(factors, cfg.num_layers, faults).items():
        if name not in kernels:
            faults.append(f"{entry}: {name} is no kernel of the transformer")
        elif a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0] or (a.shape[0], b.shape[1]) != shapes[name]:
            faults.append(
                f"{entry}: A {list(a.shape)} times B {list(b.shape)} does not fit {name} {list(shapes[name])}"
            )
        else:
            module = f"{entry}/base_model.model.{kernels[name].removesuffix('.weight')}"
            for side, matrix in (("A", a), ("B", b)):
                make = lambda matrix=matrix: np.asarray(matrix).T
                kind = np.dtype(dtype or matrix.dtype)
                found.append(LazyTensor(f"{module}.lora_{side}.weight", matrix.shape[::-1], kind, make))
    return found


def by_layer(factors: Mapping[str, Factors], num_layers: int, faults: list[str]) -> dict[str, Factors]:
    """Factors of all layers together cut into those of each."""
    single: dict[str, Factors] = {}
    for name, (a, b) in factors.items():
        head, _, rest = name.partition(".")
        if head != checkpoint.STACKED or rest.split(".")[0].isdigit():
            single[name] = (a, b)
        elif {a.shape[:1], b.shape[:1]} != {(num_layers,)}:
            faults.append(f"{name}: A {list(a.shape)} and B {list(b.shape)} need a leading axis of {num_layers} layers")
        else:
            single |= {f"{head}.{i}.{rest}": (a[i], b[i]) for i in range(num_layers)}
    return single
