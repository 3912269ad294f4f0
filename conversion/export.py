"""A checkpoint folder of ours back to PyTorch: the files of LongLive's and Wan's own code, or a diffusers folder.

Numbers stay as they are stored, so that what came from such files goes back bit for bit. Tensors are read, rearranged
and written one at a time, in a folder with a temporary name that is renamed at the end.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from longlive_jax import checkpoint
from longlive_jax.config import ModelConfig
from longlive_jax.conversion import diffusers, extras, sizes, tables
from longlive_jax.conversion.convert import (
    DIT_NAME,
    OUTPUT_DTYPES,
    TEXT_NAMES,
    TOKENIZER_FOLDER,
    VAE_NAMES,
    part_report,
    summary,
)
from longlive_jax.conversion.lora_file import read_factors, write_lora
from longlive_jax.conversion.progress import Progress, Stage, watched, written
from longlive_jax.conversion.tables_diffusers import DIFFUSERS
from longlive_jax.conversion.torch_files import require_torch, stream_to_pickle, torch_save
from longlive_jax.errors import UserError
from longlive_jax.tensor_files import LazyTensor, SafetensorsPart

GENERATOR_NAME, LORA_NAME = "longlive_base.pt", "lora.pt"
PICKLES = {"transformer": GENERATOR_NAME, "vae": VAE_NAMES[0], "text_encoder": TEXT_NAMES[0]}
"""The `.pt` or `.pth` file of each part, which is written when its tensors are on the disk."""

MERGED = (
    f"{GENERATOR_NAME} has the LoRA merged; {LORA_NAME} goes over the generator that its training began with: load one "
    "of the two"
)

METADATA = {"format": "pt"}
"""transformers refuses a safetensors file whose header does not say that it is of PyTorch."""

Plan = dict[str, list[LazyTensor]]
"""What to write of each part, by the names and in the layouts of the other side."""


def export(
    folder: str | Path,
    output: str | Path,
    to: str,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Converts a checkpoint folder to PyTorch files.

    Args:
      folder: the checkpoint.
      output: the folder to write.
      to: "torch": a Wan folder (config.json, DiT, VAE, text encoder, tokeniser) with `longlive_base.pt` in it, and
        `lora.pt` if the checkpoint has a LoRA beside its weights; or "diffusers": a folder of diffusers' `WanPipeline`.
      dtype: "bfloat16" or "float32", of everything written; as stored by default.
      overwrite: replace such a folder that is there.
      progress: is told how far it is.

    Returns:
      A report: `summary` (a line to print), `output`, `parts` (tensors, parameters, bytes and checksums of each),
      `warnings`.

    Raises:
      UserError: the checkpoint is damaged, the output exists, or PyTorch is missing where `.pt` and `.pth` files are
        to be written. Nothing has been written.
    """
    folder, output = Path(folder), Path(output)
    if to not in WRITERS:
        raise UserError(f"cannot convert to '{to}'; choose {' or '.join(WRITERS)}")
    if dtype is not None and dtype not in OUTPUT_DTYPES:
        raise UserError(f"dtype is '{dtype}'; choose {' or '.join(OUTPUT_DTYPES)}")
    checkpoint.refuse_existing(output, overwrite, extras.read, "a folder that `longlive convert --to` made")
    if checkpoint.load_quantization(folder):
        raise UserError(
            f"{folder} is in int8, and what rounding took away does not come back; convert the folder that it was made "
            "from, or the original files"
        )
    if to == "torch":
        require_torch()
    config = checkpoint.check(folder)
    plan = {
        part: rearranged(folder, part, getattr(config, part), to, OUTPUT_DTYPES[dtype] if dtype else None)
        for part in checkpoint.MODULES
        if getattr(config, part) is not None
    }
    tokenizer = folder / "tokenizer.json"
    tokenizer = tokenizer if tokenizer.is_file() else None
    factors = read_factors(folder) if to == "torch" else {}
    progress = progress or Progress()
    progress.plan(stages(plan, to))
    origin = checkpoint.load_provenance(folder) | {"checkpoint": checkpoint.checkpoint_hash(folder)}
    with checkpoint.new_folder(output) as new:
        watching = {part: watched(part, tensors, progress) for part, tensors in plan.items()}
        hashes = WRITERS[to](new, config, watching, tokenizer, progress)
        if factors:
            write_lora(new / LORA_NAME, {"generator_lora": factors}, config.transformer, dtype=dtype)
        extras.write(new, config, to, origin)
    report = {part: part_report(tensors, hashes[part]) for part, tensors in plan.items()}
    dtypes = " and ".join(sorted({str(np.dtype(tensor.dtype)) for tensors in plan.values() for tensor in tensors}))
    return {
        "summary": summary({"parts": report, "dtype": dtypes, "loras": [], "verified": False, "layers": None}),
        "output": str(output),
        "parts": report,
        "warnings": missing(config, tokenizer) + extras.warnings(config, to) + ([MERGED] if factors else []),
    }


def stages(plan: Plan, to: str) -> list[Stage]:
    """What an export does, in order."""
    order = []
    for part, tensors in plan.items():
        order.append(written(part, tensors))
        if to == "torch":
            order.append(pickling(part, tensors))
    return order


def pickling(part: str, tensors: list[LazyTensor]) -> Stage:
    """The stage of a part's `.pt` or `.pth` file."""
    return Stage(f"writing {PICKLES[part]}", 1, sum(tensor.nbytes for tensor in tensors), "file")


TABLES = {"torch": tables.WAN, "diffusers": DIFFUSERS}


def rearranged(folder: Path, part: str, cfg: Any, to: str, dtype: Any) -> list[LazyTensor]:
    """The tensors of a part for the other side; nothing is read yet."""
    table, shapes = TABLES[to][part](cfg), checkpoint.tensor_shapes(part, cfg)
    files = checkpoint.open_part(folder, part, cfg)

    def make(row: tables.Row) -> LazyTensor:
        values = lambda: row.transform.to_torch(files.read(row.ours), **table.sizes)
        shape = row.torch_shape(shapes[row.ours], table.sizes)
        return LazyTensor(row.torch, shape, np.dtype(dtype or files.dtypes[row.ours]), values)

    return [make(row) for row in table.rows]


def missing(config: ModelConfig, tokenizer: Path | None) -> list[str]:
    """Warnings of what the checkpoint does not have."""
    without = [] if config.text_encoder else ["text encoder"]
    without += [] if tokenizer else ["tokeniser"]
    return [f"no {name}: the checkpoint has none, so the other side needs one from elsewhere" for name in without]


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", "utf-8")


def write_tokenizer(folder: Path, tokenizer: Path, config: ModelConfig) -> None:
    """tokenizer.json as it is, and what transformers' AutoTokenizer wants to know besides."""
    folder.mkdir(parents=True)
    shutil.copyfile(tokenizer, folder / "tokenizer.json")
    tokens = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    kind, length = diffusers.CLASSES["tokenizer"][1], config.transformer.text_length
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": kind, "model_max_length": length, **tokens})


# MARK: diffusers


def write_diffusers(
    folder: Path, config: ModelConfig, plan: Plan, tokenizer: Path | None, progress: Progress
) -> dict[str, dict[str, str]]:
    """A `WanPipeline` folder. Returns the sha256 of every tensor, by part and name."""
    hashes = {}
    for part, tensors in plan.items():
        settings = diffusers.part_config(part, getattr(config, part), np.dtype(tensors[0].dtype))
        write_json(folder / part / "config.json", settings)
        name, size = diffusers.WEIGHTS[part], checkpoint.SHARD_BYTES
        hashes[part] = checkpoint.write_part(folder / part, name, tensors, size, METADATA)
    write_json(folder / "scheduler" / "scheduler_config.json", diffusers.scheduler(config))
    write_json(folder / diffusers.INDEX, diffusers.index(config, tokenizer is not None))
    if tokenizer:
        write_tokenizer(folder / "tokenizer", tokenizer, config)
    return hashes


# MARK: LongLive and Wan


def write_torch(
    folder: Path, config: ModelConfig, plan: Plan, tokenizer: Path | None, progress: Progress
) -> dict[str, dict[str, str]]:
    """A Wan folder and LongLive's generator. Returns the sha256 of every tensor, by part and original name."""
    write_json(folder / "config.json", sizes.wan_settings(config.transformer))
    stem = DIT_NAME.removesuffix(".safetensors")
    hashes = {"transformer": checkpoint.write_part(folder, stem, plan["transformer"], checkpoint.SHARD_BYTES, METADATA)}
    shards = SafetensorsPart.open(folder / DIT_NAME).paths
    # LongLive loads into a wrapper whose attribute `model` is the DiT.
    torch_save(shards, folder / GENERATOR_NAME, lambda dit: {"generator": {f"model.{n}": v for n, v in dit.items()}})
    done = lambda stage: progress.advance(stage.name, stage.nbytes)
    done(pickling("transformer", plan["transformer"]))
    for part in ("vae", "text_encoder"):
        if part in plan:
            hashes[part] = stream_to_pickle(plan[part], folder / PICKLES[part])
            done(pickling(part, plan[part]))
    if tokenizer:
        write_tokenizer(folder / TOKENIZER_FOLDER, tokenizer, config)
    return hashes


WRITERS: dict[str, Callable[..., dict[str, dict[str, str]]]] = {"torch": write_torch, "diffusers": write_diffusers}
