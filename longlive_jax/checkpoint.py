"""The checkpoint folder: config.json, one safetensors file a part, tokenizer.json.

    config.json                 sizes, sampler defaults, provenance; `null` for a text encoder that is not there;
                                `quantization`, such as {"transformer": "int8"}, if there is any
    transformer.safetensors     one tensor a layer ("blocks.3.ffn.up.kernel"), stacked on load
    vae.safetensors
    text_encoder.safetensors    above 5 GB: text_encoder.safetensors.index.json and text_encoder-00001-of-00003...
    tokenizer.json
    lora.safetensors            beside weights that were trained as a LoRA and have it merged; only `longlive convert
                                --to torch` reads it

Files are written tensor by tensor, so a 28 GB checkpoint needs the memory of its largest tensor, in a folder with a
temporary name beside the target that is renamed at the end: a checkpoint is complete or not there. Each file's header
holds the sha256 of every tensor; `checkpoint_hash` and `verify` are built on those.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from longlive_jax.config import ModelConfig, from_dict, to_dict
from longlive_jax.errors import UserError, collect, listed, raise_all
from longlive_jax.json_files import read_json
from longlive_jax.models.quantization import INT8, SCALE, dequantize, quantize, with_int8
from longlive_jax.models.text_encoder import TextEncoder
from longlive_jax.models.transformer import WanTransformer
from longlive_jax.models.vae import VAE
from longlive_jax.tensor_files import LazyTensor, SafetensorsPart, write_safetensors

FORMAT = 1
"""Version of the layout; raised when an older program could not read what a newer one writes."""

SHARD_BYTES = 5_000_000_000
"""A part above this is split into files of at most this size (a single larger tensor gets a file of its own)."""

MODULES: dict[str, type[nnx.Module]] = {"transformer": WanTransformer, "vae": VAE, "text_encoder": TextEncoder}
"""The parts and what they are made of. Each has its sizes in the field of `ModelConfig` of the same name."""

LORA = "lora.safetensors"
"""The LoRA that was merged, a tensor a layer: `lora_a` [in, rank] and `lora_b` [rank, out] where the kernel has its
name, scaled so that alpha is the rank."""

QUANTIZABLE = ("transformer", "text_encoder")
"""Parts whose blocks can be stored in int8."""

STACKED = "blocks"
"""The parameters under this name have a leading layer axis in memory, and a tensor a layer in files."""

Params = dict[str, Any]
"""A pure nested dict of arrays, as `nnx.to_pure_dict` gives it."""


# MARK: parameters and their names in files


@functools.lru_cache(maxsize=16)
def _abstract_state(part: str, cfg: Any, quantization: str | None) -> nnx.State:
    make = lambda: MODULES[part](cfg, rngs=nnx.Rngs(0))
    return nnx.state(nnx.eval_shape((lambda: with_int8(make())) if quantization else make))


def abstract_params(part: str, cfg: Any, quantization: str | None = None) -> Params:
    """Shapes and dtypes of a part's parameters, layers stacked; nothing is allocated."""
    return nnx.to_pure_dict(_abstract_state(part, cfg, quantization))


def tensor_shapes(part: str, cfg: Any, quantization: str | None = None) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that the file of a part must hold."""
    return {tensor.name: tensor.shape for tensor in lazy_tensors(abstract_params(part, cfg, quantization))}


def lazy_tensors(params: Params, dtype: Any = None) -> list[LazyTensor]:
    """The parameters as tensors of a file: stacked layers cut apart; floating-point values in `dtype` if given."""
    tensors = []
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
        path = [str(key.key) for key in keys]
        casts = dtype is not None and jax.dtypes.issubdtype(leaf.dtype, np.floating) and path[-1] != SCALE
        kind = np.dtype(dtype) if casts else leaf.dtype
        if path[0] == STACKED and not path[1].isdigit():
            for i in range(leaf.shape[0]):
                name = ".".join([STACKED, str(i), *path[1:]])
                tensors.append(LazyTensor(name, leaf.shape[1:], kind, lambda leaf=leaf, i=i: np.asarray(leaf[i])))
        else:
            tensors.append(LazyTensor(".".join(path), leaf.shape, kind, lambda leaf=leaf: np.asarray(leaf)))
    return tensors


def compare_shapes(where: str, expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> list[str]:
    """One fault for all missing tensors, one for all unexpected ones, one for all that are wrong in the same way."""
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    faults = [f"{where} lacks {listed(missing)}"] if missing else []
    faults += [f"{where} has unexpected {listed(unexpected)}"] if unexpected else []
    wrong: dict[tuple, list[str]] = {}
    for name, shape in expected.items():
        if name in found and tuple(found[name]) != tuple(shape):
            wrong.setdefault((tuple(found[name]), tuple(shape)), []).append(name)
    return faults + [
        f"{where}: {listed(names)} {'is' if len(names) == 1 else 'are'} {list(shape)}, expected {list(right)}"
        for (shape, right), names in wrong.items()
    ]


def unstack(params: Params) -> Params:
    """Stacked layers as a dict of layers, for modules made with `stacked=False`. A dict of layers stays one."""
    blocks = params[STACKED]
    if 0 in blocks:
        return params
    count = jax.tree.leaves(blocks)[0].shape[0]
    return {**params, STACKED: {i: jax.tree.map(lambda leaf: leaf[i], blocks) for i in range(count)}}  # noqa: B023


# MARK: int8


def quantized(tensors: Iterable[LazyTensor], part: str, cfg: Any) -> list[LazyTensor]:
    """The tensors of a part's file as those of an int8 one; what is not quantised stays as it is."""
    kernels, result = int8_kernels(part, cfg), []
    scales: dict[str, np.ndarray] = {}  # found with the values and small: kept, so that no kernel is read twice

    def values(tensor: LazyTensor) -> np.ndarray:
        kernel = np.asarray(tensor.make())
        if not np.isfinite(kernel).all():
            raise UserError(f"{tensor.name} holds infinities or NaN and has no int8 form; mend the weights")
        rounded, scales[tensor.name] = quantize(kernel)
        return rounded

    def scale(tensor: LazyTensor) -> np.ndarray:
        if tensor.name not in scales:
            values(tensor)
        return scales[tensor.name]

    for tensor in tensors:
        if tensor.name not in kernels:
            result.append(tensor)
            continue
        name, (inputs, outputs) = kernels[tensor.name], tensor.shape
        int8, float32 = np.dtype(np.int8), np.dtype(np.float32)
        result.append(LazyTensor(f"{name}.{INT8}", (outputs, inputs), int8, lambda tensor=tensor: values(tensor)))
        result.append(LazyTensor(f"{name}.{SCALE}", (outputs,), float32, lambda tensor=tensor: scale(tensor)))
    return result


def dequantized(tensors: Iterable[LazyTensor], part: str, cfg: Any) -> list[LazyTensor]:
    """The tensors of an int8 file as those of a float one: kernels in float32, up to the rounding."""
    by_name, result = {tensor.name: tensor for tensor in tensors}, []
    for kernel, name in int8_kernels(part, cfg).items():
        values, scale = by_name.pop(f"{name}.{INT8}"), by_name.pop(f"{name}.{SCALE}")
        make = lambda values=values, scale=scale: dequantize(np.asarray(values.make()), np.asarray(scale.make()))
        result.append(LazyTensor(kernel, values.shape[::-1], np.dtype(np.float32), make))
    return result + list(by_name.values())


def int8_kernels(part: str, cfg: Any) -> dict[str, str]:
    """Name of each kernel that int8 is for, and of its layer."""
    layers = [name.removesuffix(f".{INT8}") for name in tensor_shapes(part, cfg, INT8) if name.endswith(f".{INT8}")]
    return {f"{layer}.kernel": layer for layer in layers}


# MARK: reading a folder


def load_config(folder: str | os.PathLike) -> ModelConfig:
    """The sizes and sampler defaults of a checkpoint folder."""
    values = _read_config(folder)
    fields = {field.name for field in dataclasses.fields(ModelConfig)}
    sizes = {name: value for name, value in values.items() if name in fields}
    return from_dict(ModelConfig, sizes, str(Path(folder) / "config.json"))


def load_provenance(folder: str | os.PathLike) -> dict[str, Any]:
    """Where the weights come from, as given to `save`."""
    provenance = _read_config(folder).get("provenance") or {}
    if not isinstance(provenance, dict):
        raise UserError(f"{Path(folder) / 'config.json'}: its provenance is no table; copy the checkpoint again")
    return provenance


def load_quantization(folder: str | os.PathLike) -> dict[str, str]:
    """The parts that are stored quantised, and how; empty for most folders.

    Raises:
      UserError: in a way or a part that this program does not know.
    """
    stored = _read_config(folder).get("quantization") or {}
    known = isinstance(stored, dict) and all(p in QUANTIZABLE and kind == INT8 for p, kind in stored.items())
    if not known:
        where = Path(folder) / "config.json"
        raise UserError(f"{where}: quantization {stored!r} is not known; update longlive-jax, or copy the folder again")
    return stored


def _read_config(folder: str | os.PathLike) -> dict[str, Any]:
    path = Path(folder) / "config.json"
    if not Path(folder).is_dir():
        raise UserError(f"there is no checkpoint folder {folder}; make one with `longlive convert`")
    if not path.is_file():
        raise UserError(f"{path} is missing; {folder} is no checkpoint folder, `longlive convert` makes one")
    values = read_json(path, "copy the checkpoint again")
    if "format" not in values:
        raise UserError(f"{path} is not one of ours; convert original weights first: longlive convert --wan {folder}")
    if values["format"] != FORMAT:
        raise UserError(f"{path} has format {values['format']}, this program reads {FORMAT}; update longlive-jax")
    return values


def open_part(folder: str | os.PathLike, part: str, cfg: Any) -> SafetensorsPart:
    """The files of one part, checked against its sizes `cfg`; one UserError tells all that is wrong."""
    path, quantization = Path(folder) / f"{part}.safetensors", load_quantization(folder).get(part)
    files = SafetensorsPart.open(path)
    faults = compare_shapes(str(path), tensor_shapes(part, cfg, quantization), files.shapes)
    floats = [name for name, dtype in files.dtypes.items() if name.endswith(f".{INT8}") and dtype != np.int8]
    faults += [f"{path}: {', '.join(floats)} should be of type I8; convert the checkpoint again"] if floats else []
    raise_all(faults)
    return files


def stored_tensors(files: SafetensorsPart) -> list[LazyTensor]:
    """What is in the files of a part, read when it is made."""
    return [LazyTensor(n, shape, files.dtypes[n], lambda n=n: files.read(n)) for n, shape in files.shapes.items()]


def check(folder: str | os.PathLike) -> ModelConfig:
    """Reads config.json and the headers of all files; one UserError tells all that is wrong with the folder."""
    config, faults = load_config(folder), []
    for part in MODULES:
        if getattr(config, part) is not None:
            with collect(faults):
                open_part(folder, part, getattr(config, part))
    raise_all(faults)
    return config


def load(
    folder: str | os.PathLike,
    part: str,
    dtype: Any = None,
    *,
    stacked: bool = True,
    quantization: str | None = None,
) -> Params:
    """The parameters of one part as numpy arrays, ready for `nnx.merge`.

    Args:
      folder: the checkpoint.
      part: "transformer", "vae" or "text_encoder".
      dtype: of the arrays; None for what is stored. int8 values and their scales keep theirs.
      stacked: layers stacked on a leading axis, or apart, as for a module made with `stacked=False`.
      quantization: "int8" for the parameters of a module made by `with_int8`, whether stored so or as floats; None for
        floats, which an int8 folder gives dequantised.

    Raises:
      UserError: the part is not there, or its files are cut off or do not fit config.json (all faults at once).
    """
    cfg = getattr(load_config(folder), part)
    if cfg is None:
        raise UserError(f"{folder} has no {part.replace('_', ' ')}; convert it again from a folder that has one")
    tensors, stored = stored_tensors(open_part(folder, part, cfg)), load_quantization(folder).get(part)
    if stored != quantization:
        tensors = (quantized if quantization else dequantized)(tensors, part, cfg)
    by_name = {tensor.name: tensor for tensor in tensors}
    params: Params = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(part, cfg, quantization)):
        path = [key.key for key in keys]
        kept = path[-1] in (INT8, SCALE)
        if path[0] == STACKED:
            names = [".".join(map(str, [STACKED, i, *path[1:]])) for i in range(leaf.shape[0])]
            values = np.empty(leaf.shape, leaf.dtype if kept else dtype or by_name[names[0]].dtype)
            for i, name in enumerate(names):
                values[i] = by_name[name].make()
        else:
            values = by_name[".".join(map(str, path))].make()
            values = values.astype(values.dtype if kept else dtype or values.dtype, copy=False)
        node = params
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = values
    return params if stacked or STACKED not in params else unstack(params)


def checkpoint_hash(folder: str | os.PathLike) -> str:
    """sha256 over sizes, tensors and tokeniser: the same for equal contents, however they are sharded.

    Quick: it reads the tensors' own hashes from the headers, and the values only of files that have none (not ours).
    Parts that are not there do not count: the folder that training a VAE leaves has no other.
    """
    config = load_config(folder)
    digest = hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode())
    for part in MODULES:
        path = Path(folder) / f"{part}.safetensors"
        if getattr(config, part) is None or not list(Path(folder).glob(f"{path.name}*")):
            continue
        files = SafetensorsPart.open(path)
        hashes = {name: value for file in files.files for name, value in file.metadata.items()}
        for name in sorted(files.shapes):
            value = hashes.get(name) or hashlib.sha256(files.read(name).tobytes()).hexdigest()
            digest.update(f"{part}.{name} {files.dtypes[name]} {files.shapes[name]} {value}\n".encode())
    tokenizer = Path(folder) / "tokenizer.json"
    digest.update(tokenizer.read_bytes() if tokenizer.is_file() else b"")
    return digest.hexdigest()


def has_part(folder: str | os.PathLike, part: str) -> bool:
    """Whether a folder holds a part: one may be left out, and the folder that training a VAE leaves has no other."""
    return getattr(load_config(folder), part) is not None and any(Path(folder).glob(f"{part}.safetensors*"))


COMPARED = 2**22
"""Elements of the largest tensor whose values `same_part` reads: all of a small model, the norms of a large one."""


def same_part(one: str | os.PathLike, two: str | os.PathLike, part: str) -> bool:
    """Whether two folders hold the same weights of a part, each in its own dtype.

    Quick: it reads the tensors' hashes from the headers; values only of small tensors that have none, or another dtype
    in the other folder. Of an int8 and a float folder only what is not quantised is compared.
    """
    if to_dict(getattr(load_config(one), part)) != to_dict(getattr(load_config(two), part)):
        return False
    files = [SafetensorsPart.open(Path(folder) / f"{part}.safetensors") for folder in (one, two)]
    hashes = [{n: h for file in f.files for n, h in file.metadata.items() if n in f.shapes} for f in files]
    for name, shape in files[0].shapes.items():
        if name not in files[1].shapes:
            continue
        if files[0].dtypes[name] == files[1].dtypes[name] and all(name in h for h in hashes):
            if hashes[0][name] != hashes[1][name]:
                return False
        elif math.prod(shape) <= COMPARED:
            first, second = (np.asarray(f.read(name), np.float32) for f in files)
            if not np.allclose(first, second, rtol=2.0**-7, atol=1e-6):  # bfloat16 has eight bits
                return False
    return True


def verify(
    folder: str | os.PathLike, hashes: dict[str, dict[str, str]], read: Callable[[int], None] = lambda size: None
) -> None:
    """Reads every tensor back and compares its sha256 with `hashes` (part -> tensor -> sha256).

    `read` is told the size in bytes of each tensor that was read.
    """
    faults = []
    for part, expected in hashes.items():
        files, wrong = SafetensorsPart.open(Path(folder) / f"{part}.safetensors"), []
        for name in files.shapes:
            values = np.ascontiguousarray(files.read(name)).reshape(-1).view(np.uint8).data
            if hashlib.sha256(values).hexdigest() != expected.get(name):
                wrong.append(name)
            read(values.nbytes)
        wrong += [name for name in expected if name not in files.shapes]
        faults += [f"{part}: {listed(wrong)} not as written"] if wrong else []
    raise_all(faults, "the disk did not keep what was written; write to another disk: ")


# MARK: writing a folder


def save(
    folder: str | os.PathLike,
    config: ModelConfig,
    params: dict[str, Params | Iterable[LazyTensor]],
    tokenizer: Any = None,
    provenance: dict[str, Any] | None = None,
    *,
    dtype: Any = None,
    quantization: dict[str, str] | None = None,
    overwrite: bool = False,
    finish: Callable[[Path, dict[str, dict[str, str]]], None] | None = None,
    shard_bytes: int | None = None,
) -> dict[str, dict[str, str]]:
    """Writes a checkpoint folder: all of it or, on any error, nothing.

    Args:
      folder: where; must not exist, unless `overwrite` and it is a checkpoint.
      config: sizes; they must fit the parameters.
      params: parameters of each part, nested dicts or `LazyTensor`s in the layout of files. A text encoder that is not
        there is recorded as `null`.
      tokenizer: a `PromptTokenizer`, or None.
      provenance: where the weights come from; anything JSON can hold.
      dtype: floating-point parameters of nested dicts are cast to it; None for as they are.
      quantization: of the parts whose parameters are quantised, such as {"transformer": "int8"}.
      overwrite: replace a checkpoint that is there.
      finish: called with the complete folder and the hashes before it gets its name, such as `verify`; may add files,
        or refuse it by an error.
      shard_bytes: size of a shard; `SHARD_BYTES` by default.

    Returns:
      sha256 of every tensor, by part and name.
    """
    folder = Path(folder)
    refuse_existing(folder, overwrite)
    if "text_encoder" not in params:
        config = dataclasses.replace(config, text_encoder=None)
    parts = {p: lazy_tensors(v, dtype) if isinstance(v, dict) else list(v) for p, v in params.items()}
    faults = []
    for part, tensors in parts.items():
        if part not in MODULES or getattr(config, part) is None:
            faults.append(f"the config has no {part}")
            continue
        found = {tensor.name: tensor.shape for tensor in tensors}
        expected = tensor_shapes(part, getattr(config, part), (quantization or {}).get(part))
        faults += compare_shapes(part, expected, found)
    raise_all(faults, "the parameters do not fit the config: ")
    labels = {"quantization": quantization} if quantization else {}
    values = {"format": FORMAT, **to_dict(config), **labels, "provenance": provenance or {}}
    with new_folder(folder) as new:
        (new / "config.json").write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", "utf-8")
        hashes = {part: write_part(new, part, tensors, shard_bytes or SHARD_BYTES) for part, tensors in parts.items()}
        if tokenizer is not None:
            tokenizer.save(new)
        if finish is not None:
            finish(new, hashes)
    return hashes


def refuse_existing(
    folder: Path, overwrite: bool, read: Callable[[Path], Any] | None = None, kind: str = "a checkpoint folder"
) -> None:
    """Refuses a folder that exists, and always one that is not a checkpoint: it may be somebody's home.

    Args:
      folder: where something shall be written.
      overwrite: whether one of our own may be replaced.
      read: gives something for a folder of our own, else nothing or a UserError; by default for checkpoints.
      kind: what such a folder is called.
    """
    read = read or _read_config
    if not os.path.lexists(folder):
        return
    if not overwrite:
        raise UserError(f"{folder} exists and is kept; choose another output or add --overwrite")
    if folder.is_symlink() or not folder.is_dir() or any(folder.iterdir()):
        with contextlib.suppress(UserError):
            if read(folder) and not folder.is_symlink():
                return
        raise UserError(f"{folder} is not {kind} and is not overwritten; choose another output")


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder with a temporary name beside `folder`; takes its place at the end, or is removed on an error."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
        try:
            yield new
            new.chmod(0o755)  # mkdtemp made it private
            if folder.exists():
                old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".old", dir=folder.parent))
                os.replace(folder, old)
                try:
                    os.replace(new, folder)
                except OSError:
                    os.replace(old, folder)
                    raise
                shutil.rmtree(old, ignore_errors=True)
            else:
                os.replace(new, folder)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}; nothing was written") from error


def write_part(
    folder: Path, part: str, tensors: list[LazyTensor], shard_bytes: int, metadata: dict[str, str] | None = None
) -> dict[str, str]:
    """One file `part`.safetensors, or shards of at most `shard_bytes` and their index. `metadata` goes into each."""
    shards: list[list[LazyTensor]] = [[]]
    room = shard_bytes
    for tensor in tensors:
        if shards[-1] and tensor.nbytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(tensor)
        room -= tensor.nbytes
    if len(shards) == 1:
        return write_safetensors(folder / f"{part}.safetensors", tensors, metadata)
    hashes, weight_map = {}, {}
    for number, shard in enumerate(shards, 1):
        name = f"{part}-{number:05}-of-{len(shards):05}.safetensors"
        hashes.update(write_safetensors(folder / name, shard, metadata))
        weight_map.update({tensor.name: name for tensor in shard})
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors)}, "weight_map": weight_map}
    (folder / f"{part}.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", "utf-8")
    return hashes
