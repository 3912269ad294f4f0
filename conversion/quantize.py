"""A checkpoint folder of ours to one in int8; tensors are read, rounded and written one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longlive_jax import checkpoint
from longlive_jax.conversion.convert import part_report, summary
from longlive_jax.conversion.progress import Progress, watched, written
from longlive_jax.errors import UserError
from longlive_jax.models.quantization import INT8, SCALE
from longlive_jax.tokenizer import PromptTokenizer


def quantize_folder(
    folder: str | Path,
    output: str | Path,
    parts: Sequence[str] = ("transformer",),
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Writes a checkpoint with the linear layers inside the blocks in int8 and everything else as it is.

    Loading `folder` with `quantize` gives the same bits.

    Args:
      folder: the checkpoint.
      output: the folder to write.
      parts: what to quantise: "transformer", "text_encoder".
      overwrite: replace a checkpoint that is there.
      progress: is told how far it is.

    Returns:
      A report: `summary` (a line to print), `output`, `parts` (tensors, parameters, bytes and checksums of each).

    Raises:
      UserError: the checkpoint is damaged, lacks a part or is in int8 already, or the output exists. Nothing has
        been written.
    """
    folder, output = Path(folder), Path(output)
    checkpoint.refuse_existing(output, overwrite)
    config, stored = checkpoint.check(folder), checkpoint.load_quantization(folder)
    there = [part for part in checkpoint.MODULES if getattr(config, part) is not None]
    if missing := [part for part in parts if part not in there]:
        raise UserError(f"{folder} has no {missing[0].replace('_', ' ')}; leave that out")
    parts = [part for part in parts if part not in stored]
    if not parts:
        raise UserError(f"{folder} is in int8 already; use it as it is")
    tensors = {}
    for part in there:
        cfg = getattr(config, part)
        tensors[part] = checkpoint.stored_tensors(checkpoint.open_part(folder, part, cfg))
        if part in parts:
            tensors[part] = checkpoint.quantized(tensors[part], part, cfg)
    quantization = stored | {part: INT8 for part in parts}
    has_tokenizer = (folder / "tokenizer.json").is_file()
    tokenizer = PromptTokenizer.from_folder(folder, config.transformer.text_length) if has_tokenizer else None
    provenance = checkpoint.load_provenance(folder) | {"checkpoint": checkpoint.checkpoint_hash(folder)}
    progress = progress or Progress()
    progress.plan([written(part, tensors[part]) for part in there])
    watching = {part: watched(part, tensors[part], progress) for part in there}
    hashes = checkpoint.save(
        output, config, watching, tokenizer, provenance, quantization=quantization, overwrite=overwrite
    )
    report = {part: part_report(tensors[part], hashes[part]) for part in there}
    dtypes = sorted({str(t.dtype) for part in tensors.values() for t in part if not t.name.endswith(f".{SCALE}")})
    line = {"parts": report, "dtype": " and ".join(d for d in dtypes if d != INT8), "loras": [], "verified": False}
    line |= {"layers": None, "quantization": quantization}
    return {"summary": summary(line), "output": str(output), "parts": report}
