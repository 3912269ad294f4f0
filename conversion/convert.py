"""PyTorch checkpoints to a checkpoint folder of ours: `convert_wan`.

Every file is opened and compared with the tables first, by headers alone. Only if all of it fits, tensors are read,
rearranged, cast and written one at a time. All faults are told together, and nothing is written then.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from longlive_jax import checkpoint, hub
from longlive_jax.checkpoint import compare_shapes
from longlive_jax.config import ModelConfig, SamplerConfig
from longlive_jax.conversion import diffusers, extras, layers, sizes, tables
from longlive_jax.conversion.lora import Lora, lora_faults, merge, open_lora
from longlive_jax.conversion.progress import Progress, Stage, hashed, watched, written
from longlive_jax.conversion.readers import GENERATOR_KEYS, Reader, open_weights
from longlive_jax.conversion.tables_diffusers import DIFFUSERS
from longlive_jax.errors import UserError, collect, listed, raise_all
from longlive_jax.models.quantization import INT8, SCALE
from longlive_jax.tensor_files import LazyTensor, SafetensorsPart
from longlive_jax.tokenizer import PromptTokenizer

OUTPUT_DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32}

DIT_NAME = "diffusion_pytorch_model.safetensors"
VAE_NAMES = ("Wan2.1_VAE.pth", "Wan2.1_VAE.safetensors")
TEXT_NAMES = ("models_t5_umt5-xxl-enc-bf16.pth", "models_t5_umt5-xxl-enc-bf16.safetensors")
TOKENIZER_FOLDER = "google/umt5-xxl"
TOKENIZER_NAMES = ("tokenizer.json", "spiece.model")

REPORT = "conversion.json"
"""The report of a conversion, in the checkpoint folder."""


@dataclasses.dataclass
class Source:
    """All that was opened for a conversion, and what was found wrong or missing.

    Attributes:
      readers: of each part.
      configs: sizes of each part.
      tables: which table each part's file follows; the original one unless it says otherwise.
      sampler: the sampler's defaults.
      loras: to be merged into the transformer.
      planned: the table of each part, by `plan`.
      tokenizer: of the prompts, or None, and its file.
      faults, warnings: one line each.
    """

    readers: dict[str, Reader] = dataclasses.field(default_factory=dict)
    configs: dict[str, Any] = dataclasses.field(default_factory=dict)
    tables: dict[str, Any] = dataclasses.field(default_factory=lambda: dict(tables.WAN))
    sampler: SamplerConfig = SamplerConfig()
    loras: list[Lora] = dataclasses.field(default_factory=list)
    planned: dict[str, tables.Table] = dataclasses.field(default_factory=dict)
    tokenizer: PromptTokenizer | None = None
    tokenizer_file: Path | None = None
    faults: list[str] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)

    @property
    def paths(self) -> list[Path]:
        readers = [*self.readers.values(), *(lora.reader for lora in self.loras)]
        files = [path for reader in readers for path in reader.paths]
        return files + ([self.tokenizer_file] if self.tokenizer_file else [])


def convert_wan(
    folder: str | Path,
    output: str | Path,
    *,
    generator: str | Path | None = None,
    generator_key: str | None = None,
    loras: Sequence[tuple[str | Path, float]] = (),
    lora_alpha: float | None = None,
    dtype: str = "bfloat16",
    quantize: Sequence[str] = (),
    verify: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Converts a folder of Wan 2.1's files, with LongLive's generator and LoRA in place of Wan's DiT if given.

    Args:
      folder: the original files (config.json, DiT, VAE, and if they are there text encoder and tokeniser), or a folder
        of diffusers' `WanPipeline`; or a hub id "owner/name" of either.
      output: the checkpoint folder to write.
      generator: a LongLive or Self-Forcing `.pt`, or any file with a DiT of the same architecture, by its original
        names or diffusers'; or "owner/name/path/to/file" on the hub, as for the LoRAs.
      generator_key: entry of that file; by default the first there of `generator`, `generator_ema`, `model`.
      loras: (file, scale) pairs, merged in float32.
      lora_alpha: alpha of the LoRAs that do not say it; their rank by default.
      dtype: "bfloat16" or "float32", of everything written.
      quantize: parts whose linear layers inside the blocks are written in int8: "transformer", "text_encoder". From
        the numbers of the source, so without the rounding to `dtype`.
      verify: read back what was written, compare checksums and, if PyTorch is installed, each layer's numbers.
      overwrite: replace a checkpoint that is there.
      progress: is told how far it is.

    Returns:
      A report: `summary` (a line to print), `output`, `parts` (tensors, parameters, bytes and checksums of each),
      `sources`, `loras`, `warnings`, `verified`, `layers` (worst error of each kind; None if not compared),
      `hash`. All but `output` and `warnings` is written to conversion.json in the folder too.

    Raises:
      UserError: with all that is wrong; nothing has been written.
    """
    if dtype not in OUTPUT_DTYPES:
        raise UserError(f"dtype is '{dtype}'; choose {' or '.join(OUTPUT_DTYPES)}")
    checkpoint.refuse_existing(Path(output), overwrite)
    source = open_wan(folder, generator, generator_key, loras, lora_alpha)
    parts = {}
    with collect(source.faults):
        if missing := [part for part in quantize if part not in source.configs]:
            raise UserError(f"there is no {missing[0].replace('_', ' ')} to quantise; leave that out")
    for part, cfg in source.configs.items():
        parts[part] = plan(source, part, cfg, OUTPUT_DTYPES[dtype])
        if part in quantize:
            parts[part] = checkpoint.quantized(parts[part], part, cfg)
    config = None
    with collect(source.faults):
        if not source.faults:
            configs = source.configs
            config = ModelConfig(configs["transformer"], configs["vae"], configs.get("text_encoder"), source.sampler)
    raise_all(source.faults, f"cannot convert {folder}, nothing was written: ")
    progress = progress or Progress()
    progress.plan(stages(source, parts, verify))
    quantization = {part: INT8 for part in quantize if part in parts}
    provenance = describe(source, dtype, progress) | ({"quantization": quantization} if quantization else {})
    report: dict[str, Any] = {}

    def finish(new: Path, hashes: dict[str, dict[str, str]]) -> None:
        compared = None
        if verify:
            checkpoint.verify(new, hashes, lambda size: progress.advance(READING, size))
            compared = compare_layers(source, new, lambda tensors, size: progress.advance(COMPARING, size, tensors))
        report.update(
            parts={part: part_report(tensors, hashes[part]) for part, tensors in parts.items()},
            verified=verify,
            layers=compared,
            hash=checkpoint.checkpoint_hash(new),
            **provenance,
        )
        report["summary"] = summary(report)
        (new / REPORT).write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", "utf-8")

    checkpoint.save(
        output,
        config,
        {part: watched(part, tensors, progress) for part, tensors in parts.items()},
        source.tokenizer,
        provenance,
        quantization=quantization,
        overwrite=overwrite,
        finish=finish,
    )
    return {"output": str(output), "warnings": source.warnings, **report}


HASHING, READING, COMPARING = "hashing sources", "reading back", "comparing layers"


def stages(source: Source, parts: dict[str, list[LazyTensor]], verify: bool) -> list[Stage]:
    """What a conversion does, in order."""
    writing = [written(part, tensors) for part, tensors in parts.items()]
    order = [Stage(HASHING, len(source.paths), sum(path.stat().st_size for path in source.paths), "files"), *writing]
    if verify:
        order.append(Stage(READING, sum(stage.items for stage in writing), sum(stage.nbytes for stage in writing)))
        sizes = [layers.size(source.readers[p], table.rows) for p, table in source.planned.items()]
        order.append(Stage(COMPARING, sum(count for count, _ in sizes), sum(nbytes for _, nbytes in sizes)))
    return order


# MARK: opening


def open_wan(
    folder: str | Path,
    generator: str | Path | None,
    generator_key: str | None,
    loras: Sequence[tuple[str | Path, float]],
    lora_alpha: float | None,
) -> Source:
    """Opens all files and reads the sizes. Faults are noted, not raised, but for a folder that is not there."""
    folder = find_wan(folder, generator is None)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give the folder with Wan's config.json and weights")
    if generator_key is not None and generator is None:
        raise UserError("--generator-key chooses an entry of the --generator file; give that too")
    source, settings = Source(), None
    is_diffusers = diffusers.is_folder(folder)
    if is_diffusers:
        settings = open_diffusers(source, folder, transformer=generator is None)
    else:
        with collect(source.faults):
            settings = sizes.read_settings(folder / "config.json")
    if generator or not is_diffusers:
        with collect(source.faults):
            path = hub.file(generator) if generator else folder / DIT_NAME
            reader = diffusers.by_original_names(open_weights(path, generator_key, keys=GENERATOR_KEYS))
            source.readers["transformer"] = reader
            if settings is not None:
                cfg = sizes.transformer_sizes(reader.shapes, settings, reader.where)
                source.configs["transformer"] = cfg
    if not is_diffusers:
        open_vae_and_text_encoder(source, folder)
    with collect(source.faults):
        source.sampler = extras.restore(folder, source.configs)
    open_tokenizer(source, folder / ("tokenizer" if is_diffusers else TOKENIZER_FOLDER))
    for path, scale in loras:
        with collect(source.faults):
            source.loras.append(open_lora(hub.file(path), scale, lora_alpha))
    source.faults += [fault for lora in source.loras for fault in lora.faults]
    if lora_alpha is not None and len(source.loras) == len(loras) and all(lora.says_alpha for lora in source.loras):
        source.faults.append("--lora-alpha is for LoRAs that do not say their alpha, and there is none; leave it out")
    return source


def open_vae_and_text_encoder(source: Source, folder: Path) -> None:
    """The other two parts of a folder of original files; the text encoder may be missing."""
    with collect(source.faults):
        reader = source.readers["vae"] = open_weights(first_of(folder, VAE_NAMES))
        source.configs["vae"] = sizes.vae_sizes(reader.shapes, reader.where)
    with collect(source.faults):
        text = first_of(folder, TEXT_NAMES)
        if text.is_file():
            reader = source.readers["text_encoder"] = open_weights(text)
            source.configs["text_encoder"] = sizes.text_encoder_sizes(reader.shapes, reader.where)
        else:
            source.warnings.append(f"no text encoder: {text} is missing, so prompts cannot be read")


def open_diffusers(source: Source, folder: Path, *, transformer: bool) -> dict[str, Any] | None:
    """The parts of a diffusers folder; the text encoder may be missing, the transformer left out.

    Returns:
      What Wan's config.json would say of the transformer, or None if that cannot be read.
    """
    settings = None
    with collect(source.faults):
        diffusers.check_index(folder)
    for part in checkpoint.MODULES:
        if part == "text_encoder" and not (folder / part).is_dir():
            source.warnings.append(f"no text encoder: {folder / part} is missing, so prompts cannot be read")
            continue
        with collect(source.faults):
            if part == "transformer" and not transformer:
                settings = sizes.wan_settings(diffusers.read_sizes(folder, part))
            else:
                source.readers[part], source.configs[part] = diffusers.open_part(folder, part)
                source.tables[part] = DIFFUSERS[part]
    return settings


def find_wan(folder: str | Path, with_dit: bool) -> Path:
    """The Wan or diffusers folder: a path, or a hub id of which only the files that are converted are downloaded."""
    dit = [DIT_NAME, DIT_NAME + ".index.json", DIT_NAME.replace(".", "-*-of-*.")] if with_dit else []
    tokenizer = [f"{TOKENIZER_FOLDER}/{name}" for name in TOKENIZER_NAMES]

    def complete(snapshot: Path) -> bool:
        if diffusers.is_folder(snapshot):
            return diffusers.is_complete(snapshot, with_dit)
        if with_dit:
            try:
                open_weights(snapshot / DIT_NAME)
            except UserError:
                return False
        needed = (["config.json"], VAE_NAMES, TEXT_NAMES, tokenizer)
        return all(any((snapshot / name).is_file() for name in names) for names in needed)

    original = ["config.json", *dit, *VAE_NAMES, *TEXT_NAMES, *tokenizer]
    return hub.folder(folder, [*original, *diffusers.patterns(with_dit)], complete)


def first_of(folder: Path, names: Sequence[str]) -> Path:
    """The first of the names that is there; if none is, the first name, which the message will then tell."""
    return next((folder / name for name in names if (folder / name).is_file()), folder / names[0])


def open_tokenizer(source: Source, folder: Path) -> None:
    """The tokeniser of the Wan folder, if there is one; its ids must be rows of the text encoder."""
    files = [folder / name for name in TOKENIZER_NAMES if (folder / name).is_file()]
    if not files:
        source.warnings.append(f"no tokeniser: {folder}/tokenizer.json is missing, so prompts cannot be read")
        return
    transformer, text_encoder = source.configs.get("transformer"), source.configs.get("text_encoder")
    with collect(source.faults):
        tokenizer = PromptTokenizer.from_folder(folder, transformer.text_length if transformer else 512)
        if text_encoder and tokenizer.vocab_size > text_encoder.vocab_size:
            raise UserError(
                f"{files[0]} has {tokenizer.vocab_size} tokens, the text encoder {text_encoder.vocab_size}; "
                "use the tokeniser that belongs to it"
            )
        source.tokenizer, source.tokenizer_file = tokenizer, files[0]


# MARK: planning


def plan(source: Source, part: str, cfg: Any, dtype: Any) -> list[LazyTensor]:
    """What to write for a part; differences between its file and the table are noted as faults."""
    reader, loras = source.readers[part], source.loras if part == "transformer" else []
    ours = checkpoint.tensor_shapes(part, cfg)
    table = source.planned[part] = source.tables[part](cfg)
    original = {row.ours: row.torch for row in tables.WAN[part](cfg).rows}  # LoRAs go by the original names
    torch_shapes = table.torch_shapes(ours)
    source.faults += compare_shapes(reader.where, torch_shapes, reader.shapes)
    kinds = [n for n, kind in reader.dtypes.items() if not jax.dtypes.issubdtype(kind, np.floating)]
    source.faults += [f"{reader.where}: {listed(kinds)} hold no floating-point numbers"] if kinds else []
    parameters = {original[row.ours]: torch_shapes[row.torch] for row in table.rows}
    for lora in loras:
        source.faults += lora_faults(lora, parameters)

    def make(row: tables.Row) -> LazyTensor:
        def values():
            return row.transform.to_ours(merge(original[row.ours], reader.read(row.torch), loras), **table.sizes)

        return LazyTensor(row.ours, ours[row.ours], dtype, values)

    return [make(row) for row in table.rows]


# MARK: reporting


def compare_layers(source: Source, folder: Path, compared: Callable[[int, int], None]) -> dict[str, Any] | None:
    """The report of `layers` on all parts; None, and a warning, without PyTorch.

    Args:
      source: what was converted.
      folder: what was written.
      compared: is told the number of tensors of each layer that was compared, and their bytes in the source.
    """
    try:
        import torch  # noqa: F401
    except ImportError:
        source.warnings.append('only checksums were compared; for layers too: pip install "longlive-jax[convert]"')
        return None
    differences = []
    for part, table in source.planned.items():
        files = SafetensorsPart.open(folder / f"{part}.safetensors")
        eps = getattr(source.configs[part], "eps", 0.0)  # the VAE's norms have none
        loras = source.loras if part == "transformer" else []
        original = {row.ours: row.torch for row in tables.WAN[part](source.configs[part]).rows}
        differences += layers.compare(table, source.readers[part], files, eps, loras, original, compared)
    return layers.report(differences)


def describe(source: Source, dtype: str, progress: Progress) -> dict[str, Any]:
    """What config.json says about where the weights come from."""
    return {
        "sources": [source_report(path, progress) for path in source.paths],
        "transformer": Path(source.readers["transformer"].where).name,
        "loras": [
            {
                "file": lora.reader.paths[0].name,
                "scale": lora.scale,
                "rank": one_or_all(lora.ranks),
                "alpha": one_or_all(lora.alpha_values),
                "weights": len({*lora.sides, *lora.diffs}),
            }
            for lora in source.loras
        ],
        "dtype": dtype,
    }


def one_or_all(values: list) -> Any:
    return values[0] if len(values) == 1 else values


def source_report(path: Path, progress: Progress) -> dict[str, Any]:
    """A file's name, size, sha256 and, if it is from the hub, its repository and revision."""
    digest = hashed(path, HASHING, progress)
    hub_id = {"hub": origin} if (origin := hub.origin(path)) else {}
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": digest, **hub_id}


def part_report(tensors: Sequence[LazyTensor], hashes: dict[str, str]) -> dict[str, Any]:
    """Numbers of a part for the report."""
    total = sum(tensor.nbytes for tensor in tensors)
    parameters = sum(math.prod(tensor.shape) for tensor in tensors if not tensor.name.endswith(f".{SCALE}"))
    return {"tensors": len(tensors), "parameters": parameters, "bytes": total, "sha256": hashes}


def summary(report: dict[str, Any]) -> str:
    """The report in a line."""
    parts = report["parts"].items()
    sizes = ", ".join(f"{part.replace('_', ' ')} {values['parameters'] / 1e6:,.1f} M" for part, values in parts)
    loras = f", {len(report['loras'])} LoRA merged" if report["loras"] else ""
    verified = ", verified" if report["verified"] else ""
    if report["layers"]:
        verified += f" with {sum(kind['modules'] for kind in report['layers'].values())} layers in PyTorch"
    int8 = "".join(f", blocks of the {part.replace('_', ' ')} in int8" for part in report.get("quantization", {}))
    return f"{sizes} parameters in {report['dtype']}{int8}{loras}{verified}"
