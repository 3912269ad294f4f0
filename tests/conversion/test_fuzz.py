"""Damaged files of every format: what is read of them either works or is refused by one line that names the file.

A case takes a good folder, damages one file of it (bytes, sizes, headers, settings), and converts or loads it. Nothing
else than a UserError may come out, nothing may be left at the output, and an earlier conversion there stays as it was.
`LONGLIVE_FUZZ=20000` makes so many cases of it in all.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import json
import os
import random
import shutil
import signal
import struct
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_tokenizer import NORMAL, SPECIAL, charsmap, message

from longlive_jax import checkpoint
from longlive_jax.config import TextEncoderConfig, TransformerConfig, VAEConfig
from longlive_jax.conversion import parity, tables
from longlive_jax.conversion.convert import convert_wan
from longlive_jax.conversion.export import export
from longlive_jax.errors import UserError
from longlive_jax.tokenizer import PromptTokenizer, train_unigram

CASES = int(os.environ.get("LONGLIVE_FUZZ", "1100"))
SECONDS = 20  # of the processor, so that a busy machine does not matter; a case takes a twentieth
MEMORY = 400 * 2**20  # more than any case may add to the most memory ever in use

TINY = {
    "transformer": TransformerConfig(
        dim=8, ffn_dim=8, num_layers=1, num_heads=2, text_dim=8, text_length=8, time_dim=8
    ),
    "vae": VAEConfig(base_width=1, res_blocks=1),
    "text_encoder": TextEncoderConfig(
        vocab_size=90, dim=8, attention_dim=8, ffn_dim=8, num_heads=2, num_layers=1
    ),
}  # fmt: skip
SETTINGS = {
    "model_type": "t2v", "dim": 8, "ffn_dim": 8, "freq_dim": 8, "in_dim": 16, "out_dim": 16, "num_heads": 2,
    "num_layers": 1, "text_len": 8, "eps": 1e-6,
}  # fmt: skip
DIT, VAE, TEXT = "diffusion_pytorch_model", "Wan2.1_VAE", "models_t5_umt5-xxl-enc-bf16"
TOKENIZER = "google/umt5-xxl"


# MARK: good folders


def lora() -> dict[str, torch.Tensor]:
    name = "base_model.model.blocks.0.self_attn.q.lora_{}.weight"
    return {name.format("A"): torch.randn(2, 8), name.format("B"): torch.randn(8, 2)}


def shards(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    names = list(tensors)
    files = {name: f"{DIT}-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, folder / file)
    (folder / f"{DIT}.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A folder of each layout: `torch`, `sharded`, `diffusers`, `ours`, and files beside them in `files`."""
    root, generator = tmp_path_factory.mktemp("good"), torch.Generator().manual_seed(0)
    states = {
        part: {
            name: torch.randn(shape, generator=generator)
            for name, shape in tables.WAN[part](cfg).torch_shapes(checkpoint.tensor_shapes(part, cfg)).items()
        }
        for part, cfg in TINY.items()
    }
    for layout in ("torch", "sharded", "files"):
        (root / layout).mkdir()
        (root / layout / "config.json").write_text(json.dumps(SETTINGS))
    tokenizer = train_unigram(["a red square moves left"], 80)
    tokenizer.save(root / "torch" / TOKENIZER)
    save_file(states["transformer"], root / "torch" / f"{DIT}.safetensors")
    torch.save(states["vae"], root / "torch" / f"{VAE}.pth")
    torch.save(states["text_encoder"], root / "torch" / f"{TEXT}.pth", _use_new_zipfile_serialization=False)
    shards(states["transformer"], root / "sharded")
    save_file(states["vae"], root / "sharded" / f"{VAE}.safetensors")
    (root / "sharded" / TOKENIZER).mkdir(parents=True)
    extra = message(3, message(2, charsmap({"é": "e"})))
    (root / "sharded" / TOKENIZER / "spiece.model").write_bytes(SPECIAL + NORMAL + extra)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "SHARD_BYTES", 4000)
        convert_wan(root / "torch", root / "ours", dtype="float32")
        export(root / "ours", root / "diffusers", "diffusers")
    files = root / "files"
    torch.save({"generator_ema": states["transformer"], "step": 3}, files / "base.pt")
    torch.save({"generator_lora": lora()}, files / "lora.pt")
    save_file(lora(), files / "adapter_model.safetensors", {"lora_adapter_metadata": '{"transformer.lora_alpha": 2}'})
    (files / "adapter_config.json").write_text('{"lora_alpha": 4, "r": 2, "peft_type": "LORA"}')
    arrays = {"ids": np.ones((1, 4), np.int32), "mask": np.ones((1, 4), np.int32), "prompt_embeds": np.ones((1, 4, 8))}
    np.savez(files / "case.npz", meta=json.dumps({"kind": "text", "weights": "wan"}), **arrays)
    np.savez_compressed(files / "small.npz", meta=json.dumps({"kind": "text", "weights": "wan"}), **arrays)
    return root


# MARK: damage

ODD = (
    None, True, 0, -1, 1, 3, 7, 2**31, 2**50, 2**63, 2**64, 10**30, 0.5, -1.0, 1e308, float("nan"), float("inf"), "",
    "x", "../../x", "/etc/passwd", "..", "\0", "\ud800", "a\nb", "\x1b[2J", "y" * 5000, [], {}, [1, 2], ["x"], [[]],
    [2**50], [-1], [0, 2**60], {"a": {"b": 1}},
)  # fmt: skip


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


def damage_bytes(draw: random.Random, data: bytes) -> bytes:
    """Bits, ranges, sizes; mostly near one of the ends, where headers and directories are."""
    out = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        size = len(out)
        near = min(size, draw.choice((16, 200, 2000, size)))
        at = draw.randrange(near + 1) if draw.random() < 0.7 else size - draw.randrange(near + 1)
        some = draw.choice((1, 2, 4, 8, 60, 1000))
        kind = draw.randrange(8)
        if kind == 0 and at < size:
            out[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            out[at : at + some] = draw.randbytes(len(out[at : at + some]))
        elif kind == 2:
            out[at : at + some] = bytes(len(out[at : at + some]))
        elif kind == 3:
            del out[at : at + some]
        elif kind == 4:
            out[at:at] = draw.randbytes(some) if draw.random() < 0.5 else out[at : at + some]
        elif kind == 5:
            del out[at:]
        elif kind == 6:
            number = draw.choice((0, 1, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**50, 2**63 - 1, 2**64 - 1))
            width = draw.choice((2, 4, 8))
            out[at : at + width] = (number % 2 ** (8 * width)).to_bytes(width, "little")
        else:
            other = draw.randrange(size + 1)
            out[at : at + some], out[other : other + some] = out[other : other + some], out[at : at + some]
    return bytes(out)


def damage_values(draw: random.Random, values):
    """One value, key or entry somewhere in JSON."""
    node = values
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return values
        key = draw.choice(keys)
        if isinstance(node[key], (dict, list)) and node[key] and draw.random() < 0.8:
            node = node[key]
            continue
        kind = draw.randrange(10)
        if kind == 0:
            del node[key]
        elif kind == 1 and isinstance(node, dict):
            node[draw.choice(("x", "../x", "__metadata__", "model." + key, key.replace("0", "900001")))] = node[key]
        elif kind == 2 and isinstance(node, dict):
            node[key.replace("0", draw.choice(("1", "2", "900001", "99999999999")))] = node.pop(key)
        elif kind == 3:
            node[key] = nested(draw.choice((40, 900, 990, 3000)))
        elif kind == 4 and isinstance(node[key], int):
            node[key] += draw.choice((-1, 1, 2**40))
        elif kind == 5 and isinstance(node[key], list):
            node[key] = node[key] * draw.choice((0, 2, 1000))
        else:
            node[key] = draw.choice(ODD)
        return values


def dumps(values) -> bytes:
    """JSON, nested ever so deep."""
    marks: list[str] = []

    def flat(value):
        depth, inner = 0, value
        while isinstance(inner, list) and len(inner) == 1 and isinstance(inner[0], list):
            depth, inner = depth + 1, inner[0]
        if depth > 20:
            marks.append("[" * (depth + 1) + "]" * (depth + 1))
            return f"#nested{len(marks) - 1}#"
        if isinstance(value, dict):
            return {k: flat(v) for k, v in value.items()}
        return [flat(v) for v in value] if isinstance(value, list) else value

    text = json.dumps(flat(values))
    for i, mark in enumerate(marks):
        text = text.replace(f'"#nested{i}#"', mark)
    return text.encode()


def damage_json(draw: random.Random, data: bytes) -> bytes:
    if draw.random() < 0.3:
        return damage_bytes(draw, data)
    values = json.loads(data)
    for _ in range(draw.choice((1, 1, 2))):
        values = damage_values(draw, values)
    return dumps(values)


def damage_safetensors(draw: random.Random, data: bytes) -> bytes:
    kind = draw.random()
    if kind < 0.35:
        return damage_bytes(draw, data)
    length = int.from_bytes(data[:8], "little")
    if kind < 0.45:
        return struct.pack("<Q", draw.choice((0, 1, length - 1, length + 8, 2**27, 2**50, 2**63, 2**64 - 1))) + data[8:]
    header = dumps(damage_values(draw, json.loads(data[8 : 8 + length])))
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def damage_zip(draw: random.Random, data: bytes) -> bytes:
    """The archive itself, or a member of it: then with the right checksum, perhaps compressed, or renamed."""
    if draw.random() < 0.4:
        return damage_bytes(draw, data)
    out, found = io.BytesIO(), zipfile.ZipFile(io.BytesIO(data))
    members = [(info.filename, found.read(info)) for info in found.infolist()]
    pickles = [i for i, (name, _) in enumerate(members) if name.endswith("data.pkl")]
    i = pickles[0] if pickles and draw.random() < 0.7 else draw.randrange(len(members))
    name, content = members[i]
    kind = draw.randrange(8)
    if kind == 0:
        del members[i]
    elif kind == 1:
        members[i] = (draw.choice(("x", "../../x", "x/data.pkl", "archive/constants.pkl", name + "2")), content)
    elif kind == 2:
        members.append((name, damage_bytes(draw, content)))
    else:
        members[i] = (name, damage_bytes(draw, content))
    with zipfile.ZipFile(out, "w", draw.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as file:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of two members with one name
            for name, content in members:
                file.writestr(name, content)
    return out.getvalue()


# MARK: use


def load(folder: Path, out: Path) -> None:
    """What `longlive generate` reads, and a conversion back."""
    config = checkpoint.load_config(folder)
    for part in checkpoint.MODULES:
        if getattr(config, part) is not None:
            checkpoint.load(folder, part, np.float32)
    PromptTokenizer.from_folder(folder, config.transformer.text_length)
    checkpoint.checkpoint_hash(folder)
    export(folder, out, "diffusers", overwrite=True)


def read_case(folder: Path, out: Path) -> None:
    for name in ("case.npz", "small.npz"):
        case = parity.read_case(folder / name)
        for array, axes in (("ids", "b l"), ("mask", "b l"), ("prompt_embeds", "b l e")):
            case.get(array, axes)


def tokenize(folder: Path, out: Path) -> None:
    tokens = PromptTokenizer.from_folder(folder / TOKENIZER, 8)
    tokens(["a red café moves", ""])
    tokens.save(out.parent / "saved")
    shutil.rmtree(out.parent / "saved")


def convert(**files: str) -> Callable[[Path, Path], None]:
    """Converts the folder, with a `generator` or `lora` out of it."""

    def use(folder: Path, out: Path) -> None:
        loras = [(folder / files["lora"], 1.0)] if "lora" in files else []
        generator = folder / files["generator"] if "generator" in files else None
        convert_wan(folder if not files else folder.parent / "base", out, generator=generator, loras=loras,
                    dtype="float32", overwrite=True)  # fmt: skip

    return use


@dataclass(frozen=True)
class Target:
    """What is damaged, how, and how it is used.

    Attributes:
      layout: folder of `good`.
      files: of it, one of which is damaged.
      damage, use: see above.
      share: of all cases.
      named: what a message may name instead: where the fault shows is not always where it is.
    """

    layout: str
    files: tuple[str, ...]
    damage: Callable[[random.Random, bytes], bytes]
    use: Callable[[Path, Path], None]
    share: int
    named: tuple[str, ...] = ()


OURS = tuple(f"{part}-00001-of-0000" for part in checkpoint.MODULES)

TARGETS = {
    "safetensors": Target("torch", (f"{DIT}.safetensors",), damage_safetensors, convert(), 14),
    "settings": Target("torch", ("config.json",), damage_json, convert(), 10, (f"{DIT}.safetensors",)),
    "shards": Target("sharded", (f"{DIT}-00001-of-00002.safetensors",), damage_safetensors, convert(), 6),
    "index": Target("sharded", (f"{DIT}.safetensors.index.json",), damage_json, convert(), 8),
    "zip": Target("torch", (f"{VAE}.pth",), damage_zip, convert(), 12),
    "old layout": Target("torch", (f"{TEXT}.pth",), damage_bytes, convert(), 10),
    "generator": Target("files", ("base.pt",), damage_zip, convert(generator="base.pt"), 5),
    "lora.pt": Target("files", ("lora.pt",), damage_zip, convert(lora="lora.pt"), 5),
    "lora": Target(
        "files", ("adapter_model.safetensors",), damage_safetensors, convert(lora="adapter_model.safetensors"), 5
    ),
    "adapter": Target(
        "files", ("adapter_config.json",), damage_json, convert(lora="adapter_model.safetensors"), 4,
        ("adapter_model.safetensors",),
    ),
    "diffusers": Target("diffusers", ("model_index.json", "longlive.json"), damage_json, convert(), 5),
    "diffusers sizes": Target(
        "diffusers", tuple(f"{part}/config.json" for part in checkpoint.MODULES), damage_json, convert(), 8, ("wan",)
    ),
    "ours": Target("ours", ("config.json",), damage_json, load, 10, ("ours",)),
    "our index": Target(
        "ours", tuple(f"{part}.safetensors.index.json" for part in checkpoint.MODULES), damage_json, load, 6
    ),
    "our shards": Target("ours", OURS, damage_safetensors, load, 10),
    "case": Target("files", ("case.npz", "small.npz"), damage_zip, read_case, 12),
    "tokenizer.json": Target("torch", (f"{TOKENIZER}/tokenizer.json",), damage_json, tokenize, 8),
    "spiece.model": Target("sharded", (f"{TOKENIZER}/spiece.model",), damage_bytes, tokenize, 8),
}  # fmt: skip


# MARK: cases


class TooLong(BaseException):
    """A case did not come to an end. Not an Exception: nothing shall catch it."""


@contextlib.contextmanager
def watchdog(case: str):
    """Raises `TooLong` in Python; where that is not heard, in a library, ends the process and says where."""

    def ring(*_):
        raise TooLong(f"{case} took more than {SECONDS} s of the processor")

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    faulthandler.dump_traceback_later(30 * SECONDS, exit=True)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGPROF, before)


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of all that is in a folder."""
    found = {str(path.relative_to(folder)): path.stat() for path in folder.rglob("*")}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in found.items()}


def peak() -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_files(good, tmp_path, monkeypatch, name):
    target = TARGETS[name]
    monkeypatch.setattr(os, "fsync", lambda _: None)
    folder, base, results = tmp_path / "wan", tmp_path / "base", tmp_path / "results"
    shutil.copytree(good / target.layout, folder)
    shutil.copytree(good / "torch", base)
    earlier = results / "earlier"
    (export(good / "ours", earlier, "diffusers") if target.use is load else convert_wan(good / "torch", earlier))
    kept = snapshot(results)
    files = [path for name in target.files for path in sorted(folder.glob(f"{name}*"))]
    total = sum(t.share for t in TARGETS.values())
    worked = 0
    with contextlib.suppress(OSError):  # the peak of memory is counted anew, where the kernel can
        Path("/proc/self/clear_refs").write_text("5")
    start = peak()
    for number in range(-(-CASES * target.share // total)):
        case = f"{name} {number}"
        draw = random.Random(case)
        path = files[draw.randrange(len(files))]
        whole = path.read_bytes()
        path.write_bytes(target.damage(draw, whole))
        try:
            with watchdog(case), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # numbers too large for their type
                target.use(folder, earlier if number % 2 else results / "new")
            worked += 1
        except UserError as error:
            text = str(error)
            assert "\n" not in text, case
            assert any(part in text for part in (path.name, *target.named)), f"{case}: {path.name} not in: {text}"
            assert snapshot(results) == kept, f"{case}: {text}"
        except BaseException as error:
            raise AssertionError(f"{case} ({path.name}): {type(error).__name__}: {error}") from error
        finally:
            path.write_bytes(whole)
        if (results / "new").exists():
            shutil.rmtree(results / "new")
        kept = snapshot(results)
        assert {Path(entry).parts[0] for entry in kept} == {"earlier"}, case
    assert peak() - start < MEMORY
    assert worked < number, "damage that nothing minds is none"
