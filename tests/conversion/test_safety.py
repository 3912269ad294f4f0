"""Files made to do harm: pickles that run code, sizes that fill the memory, names that lead out of the folder."""

import collections
import io
import json
import os
import pickle
import pickletools
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from longlive_jax import checkpoint
from longlive_jax.conversion import parity
from longlive_jax.conversion.convert import convert_wan
from longlive_jax.conversion.lora import open_lora
from longlive_jax.conversion.readers import open_weights
from longlive_jax.errors import UserError
from longlive_jax.json_files import parse_json
from longlive_jax.tokenizer import PromptTokenizer, train_unigram


def message(function, *args, **kwargs) -> str:
    with pytest.raises(UserError) as error:
        function(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


# MARK: pickles


class Evil:
    """Would make a folder when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class Optimizer(collections.OrderedDict):
    """A container of a class of its own, with state that is set by code."""

    def __init__(self, evil=None):
        super().__init__(w=torch.ones(2))
        self.evil = evil


def old_opcodes(path: Path) -> bytes:
    """The same call by INST and by OBJ, which protocol 2 no longer writes."""
    text = str(path).encode()
    return b"(S'" + text + b"'\nios\nmkdir\n0(cos\nmkdir\nS'" + text + b"'\no."


CONTENTS = {
    "in an entry beside the weights": lambda evil: {"generator": {"w": torch.ones(2)}, "ema": evil},
    "in place of a weight": lambda evil: {"generator_lora": {"x.lora_A.weight": evil}},
    "deep in lists": lambda evil: {"generator": {"w": torch.ones(2)}, "state": [{"groups": [(1, [evil])]}]},
    "as a key": lambda evil: {"generator": {"w": torch.ones(2)}, "x": {evil: 1}},
    "in an optimizer": lambda evil: {"generator": {"w": torch.ones(2)}, "optimizer": Optimizer(evil)},
    "in a numpy array": lambda evil: {"w": np.array([evil], object)},
    "in a tensor's attributes": lambda evil: {"w": with_attribute(torch.ones(2), evil)},
}


def with_attribute(tensor: torch.Tensor, evil: Evil) -> torch.Tensor:
    tensor.note = evil
    return tensor


@pytest.mark.parametrize("name", ["x.pt", "x.pth", "x.bin", "adapter_model.bin"])
@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_that_run_code(tmp_path, name, content, zipped):
    harm, path = tmp_path / "harm", tmp_path / name
    torch.save(CONTENTS[content](Evil(harm)), path, _use_new_zipfile_serialization=zipped)
    assert f"{path} is refused: it holds more than weights" in message(open_weights, path, keys=("generator",))
    assert name in message(open_lora, path)
    assert not harm.exists()
    torch.load(path, weights_only=False)
    assert harm.exists(), "the file is harmless, so this test shows nothing"


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5, "old"])
def test_bare_pickles(tmp_path, protocol):
    harm, path = tmp_path / "harm", tmp_path / "x.pt"
    data = old_opcodes(harm) if protocol == "old" else pickle.dumps(Evil(harm), protocol)
    pickletools.dis(data, io.StringIO())  # it is one
    path.write_bytes(data)
    assert str(path) in message(open_weights, path)
    assert not harm.exists()


def test_pickles_under_other_names(tmp_path):
    """In a zip of another layout, in a script archive, and in files that are said to be something else."""
    harm = tmp_path / "harm"
    data = pickle.dumps({"w": Evil(harm)}, 2)
    torch.save({"w": torch.ones(2)}, tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as file:
        good = {info.filename: file.read(info) for info in file.infolist()}
    root = next(iter(good)).partition("/")[0]
    archives = {
        "other": {"weights.pkl": data, "data/0": b"1234"},
        "flat": {"data.pkl": data, "version": b"3\n"},
        "twice": {**good, f"{root}x/data.pkl": data},
        "script": {**good, f"{root}/constants.pkl": data, f"{root}/code/__torch__.py": b"import os"},
        "replaced": {**good, f"{root}/data.pkl": data},
    }
    for name, members in archives.items():
        path = tmp_path / f"{name}.pt"
        with zipfile.ZipFile(path, "w") as file:
            for member, content in members.items():
                file.writestr(member, content)
        assert str(path) in message(open_weights, path)
    for name in ("x.safetensors", "x.ckpt", "x.pkl"):
        (tmp_path / name).write_bytes(data)
        assert name in message(open_weights, tmp_path / name)
    assert not harm.exists()


def test_pickles_in_cases(tmp_path):
    harm = tmp_path / "harm"
    meta = json.dumps({"kind": "text"})
    np.savez(tmp_path / "a.npz", meta=meta, ids=np.array([Evil(harm)], object))
    np.savez(tmp_path / "b.npz", meta=np.array([Evil(harm)], object))
    (tmp_path / "c.npz").write_bytes(pickle.dumps(Evil(harm)))
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as file:
        file.writestr("meta.npy", pickle.dumps(Evil(harm)))
    for name in "abcd":
        assert f"{name}.npz" in message(parity.read_case, tmp_path / f"{name}.npz")
    assert not harm.exists()


# MARK: sizes


def peak() -> int:
    """The most memory that was ever in use."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024


@pytest.fixture
def little_memory():
    """Fails where memory in use grew by more than 200 MB: what is claimed here is at least 8 GB."""
    if not Path("/proc/self/status").exists():
        pytest.skip("memory in use is read from Linux's /proc")
    before = peak()
    yield
    assert peak() - before < 200e6


PETA = 2**50


def test_headers_that_claim_petabytes(tmp_path, little_memory):
    for name, size in (("a", 2**40), ("b", 2**63), ("c", 2**64 - 1)):
        (tmp_path / f"{name}.safetensors").write_bytes(size.to_bytes(8, "little") + b"{}")
        assert "damaged" in message(open_weights, tmp_path / f"{name}.safetensors")
    for ends in ([0, 4 * PETA], [0, 8]):
        header = json.dumps({"w": {"dtype": "F32", "shape": [PETA], "data_offsets": ends}}).encode()
        (tmp_path / "d.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
        assert "damaged" in message(open_weights, tmp_path / "d.safetensors")
    tensors = {"meta": torch.empty(PETA, device="meta"), "spread": torch.ones(1).expand(PETA)}
    for name, tensor in tensors.items():
        for zipped in (True, False):
            path = tmp_path / f"{name}.pt"
            torch.save({name: tensor}, path, _use_new_zipfile_serialization=zipped)
            assert f"more than plain tensors: {name}" in message(open_weights, path)
    torch.save({"w": torch.ones(7)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    seven, many = b"K\x07", b"\x8a\x08" + (2**45).to_bytes(8, "little")  # pickle's BININT1 and LONG1
    data = (tmp_path / "old.pt").read_bytes()
    assert seven in data
    (tmp_path / "old.pt").write_bytes(data.replace(seven, many))
    assert "damaged" in message(open_weights, tmp_path / "old.pt")


@pytest.mark.parametrize("size", [2**31, 2**45, 2**61])
def test_cases_that_claim_petabytes(tmp_path, little_memory, size):
    np.savez(tmp_path / "x.npz", meta=json.dumps({"kind": "text"}), ids=np.ones(1234567, np.int8))
    with zipfile.ZipFile(tmp_path / "x.npz") as file:
        members = {info.filename: file.read(info) for info in file.infolist()}
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as file:
        for name, data in members.items():  # the header is padded with blanks, so the longer number fits
            wrong = f"({size},), }}".encode()
            start = data.index(b"'shape': ") + 9
            file.writestr(name, data[:start] + wrong + data[start + len(wrong) :] if name == "ids.npy" else data)
    assert "x.npz is damaged" in message(parity.read_case, tmp_path / "x.npz")


def bomb(path: Path, name: str, head: bytes, size: int) -> None:
    """A zip archive with a member of `size` zeros after `head`, deflated to a thousandth."""
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as file, file.open(name, "w") as member:
        member.write(head)
        for _ in range(size // 10**7):
            member.write(bytes(10**7))


def test_cases_that_inflate(tmp_path, little_memory):
    """400 MB of zeros in 0.4 MB, as they are, and with a size in the archive that is too small."""
    path, size = tmp_path / "x.npz", 4 * 10**8
    np.savez_compressed(path, meta=json.dumps({"kind": "text"}))
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|i1", "fortran_order": False, "shape": (size,)})
    bomb(path, "ids.npy", header.getvalue(), size)
    assert path.stat().st_size < 10**6
    assert f"{path} claims 0.4 GB in a file of 0.3" in message(parity.read_case, path)
    full = (size + len(header.getvalue())).to_bytes(4, "little")
    path.write_bytes(path.read_bytes().replace(full, (4000).to_bytes(4, "little")))
    assert "x.npz is damaged" in message(parity.read_case, path)
    np.savez_compressed(path, meta=json.dumps({"kind": "text"}), ids=np.zeros(10**7, np.int8))
    assert parity.read_case(path).arrays["ids"].shape == (10**7,)


def test_weights_that_inflate(tmp_path, little_memory):
    """PyTorch's archives are not compressed: neither the pickle nor a tensor may be, whether it is small or huge."""
    torch.save({"w": torch.arange(1000.0)}, tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as file:
        members = {info.filename: file.read(info) for info in file.infolist()}
    for name in members:
        path = tmp_path / f"{name.replace('/', '-')}.pt"
        with zipfile.ZipFile(path, "w") as file:
            for other, data in members.items():
                file.writestr(other, data, zipfile.ZIP_DEFLATED if other == name else zipfile.ZIP_STORED)
        assert f"{path} holds {name} compressed" in message(open_weights, path)
    pickled = next(name for name in members if name.endswith("data.pkl"))
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w") as file:
        for name in members.keys() - {pickled}:
            file.writestr(name, members[name])
    bomb(path, pickled, members[pickled], 4 * 10**8)
    assert f"{path} holds {pickled} compressed" in message(open_weights, path)


DEEP = "[" * 100_000, '{"a":' * 100_000, '{"num_heads": 2, "x": ' + "[" * 500 + "]" * 500 + "}"


def settings_files(wan: Path, tmp_path: Path) -> dict[Path, tuple]:
    """Every file of settings, and what reads it."""
    convert_wan(wan, tmp_path / "ours", dtype="float32")
    (tmp_path / "pipe/vae").mkdir(parents=True)
    files = {
        wan / "config.json": (convert_wan, wan, tmp_path / "out"),
        wan / "longlive.json": (convert_wan, wan, tmp_path / "out"),
        wan / "google/umt5-xxl/tokenizer.json": (convert_wan, wan, tmp_path / "out"),
        wan / "google/umt5-xxl/spiece.model": (PromptTokenizer.from_folder, wan / "google/umt5-xxl", 8),
        tmp_path / "ours/config.json": (checkpoint.check, tmp_path / "ours"),
        tmp_path / "pipe/model_index.json": (convert_wan, tmp_path / "pipe", tmp_path / "out"),
        tmp_path / "pipe/vae/config.json": (convert_wan, tmp_path / "pipe", tmp_path / "out"),
        tmp_path / "x.safetensors.index.json": (open_weights, tmp_path / "x.safetensors"),
        tmp_path / "adapter_config.json": (open_lora, tmp_path / "adapter_model.safetensors"),
    }
    (wan / "google/umt5-xxl").mkdir(parents=True)
    (tmp_path / "pipe/model_index.json").write_text("{}")
    save_file({"w.lora_A.weight": torch.ones(2, 2)}, tmp_path / "adapter_model.safetensors")
    return files


def test_settings_that_are_huge_or_nested(wan, tmp_path, little_memory):
    for path, (function, *args) in settings_files(wan, tmp_path).items():
        before = path.read_bytes() if path.exists() else None
        for text in DEEP:
            path.write_text(text)
            assert path.name in message(function, *args)
        path.write_bytes(b" ")
        os.truncate(path, 2**33)  # takes no room on the disk
        assert f"{path} is larger than" in message(function, *args)
        path.unlink()
        if before is not None:
            path.write_bytes(before)
    assert not (tmp_path / "out").exists()


def test_settings_with_half_a_character(wan, tmp_path):
    """JSON can say half of a pair by an escape; it is refused where it is read, not where it would be written again."""
    for path, (function, *args) in settings_files(wan, tmp_path).items():
        if path.suffix == ".json" and path.name != "tokenizer.json":  # which its own library refuses
            path.write_text('{"num_heads": 2, "x": ["\\ud800"]}')
            assert f"{path} has half a character" in message(function, *args)
            path.write_text("{}")
    assert parse_json('{"x": "\\ud83d\\ude00"}', "here") == {"x": "\U0001f600"}


def test_a_large_vocabulary_of_nothing(wan, tmp_path):
    """Settings whose sizes alone would take for ever: refused before anything is planned."""
    convert_wan(wan, tmp_path / "ours")
    path = tmp_path / "ours/config.json"
    good = json.loads(path.read_text())
    for part, name, value in (
        ("transformer", "num_layers", 10**9), ("vae", "res_blocks", 10**9), ("text_encoder", "num_layers", 10**12),
        ("transformer", "dim", 2**60), ("transformer", "num_heads", 0), ("vae", "base_width", -8),
        ("text_encoder", "vocab_size", 2**40), ("transformer", "eps", float("nan")),
        ("vae", "latent_std", [1e400] * 16),
    ):  # fmt: skip
        path.write_text(json.dumps({**good, part: {**good[part], name: value}}))
        assert name in (text := message(checkpoint.check, tmp_path / "ours"))
        assert "config.json" in text


# MARK: names


@pytest.mark.parametrize("name", ["../x.safetensors", "sub/x.safetensors", "/x.safetensors", "..\\x", "..", "", "\0"])
def test_shards_elsewhere(wan, tmp_path, states, name):
    """A shard must stand beside its index, also where the path would lead to a good file."""
    dit = wan / "diffusion_pytorch_model.safetensors"
    for folder in (tmp_path, wan / "sub"):
        folder.mkdir(exist_ok=True)
        save_file(states["transformer"], folder / "x.safetensors")
    dit.rename(wan / "x.safetensors")
    index = wan / f"{dit.name}.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(states["transformer"], name)}))
    text = message(convert_wan, wan, tmp_path / "out")
    assert f"{index} names " in text
    assert "shards stand beside their index" in text
    convert_wan(wan, tmp_path / "ours", generator=wan / "x.safetensors")
    for part in checkpoint.MODULES:
        (tmp_path / "ours" / f"{part}.safetensors").unlink()
        path = tmp_path / "ours" / f"{part}.safetensors.index.json"
        path.write_text(json.dumps({"weight_map": {"w": name}}))
        assert f"{path} names " in message(checkpoint.check, tmp_path / "ours")


def test_names_out_of_files_do_not_reach_the_terminal(tmp_path):
    """A tensor may be called by codes that clear the screen, or by a second line that looks like ours."""
    save_file({"\x1b[2J\nlonglive: all is well": torch.ones(1)}, tmp_path / "lora.safetensors")
    faults = open_lora(tmp_path / "lora.safetensors").faults
    text = message(lambda: checkpoint.raise_all(faults))
    assert "\\x1b[2J\\nlonglive: all is well" in text


def test_classes_of_a_pipeline_are_not_loaded(wan, tmp_path, monkeypatch):
    """model_index.json names libraries and classes: words to us, whatever they are."""
    from longlive_jax.conversion.export import export

    convert_wan(wan, tmp_path / "ours", dtype="float32")
    export(tmp_path / "ours", tmp_path / "pipe", "diffusers")
    index = tmp_path / "pipe/model_index.json"
    values = json.loads(index.read_text())
    (tmp_path / "harm.py").write_text("raise SystemExit")
    monkeypatch.syspath_prepend(tmp_path)
    index.write_text(json.dumps({**values, "transformer": ["harm", "../../x"], "vae": ["../../harm", "Evil"]}))
    convert_wan(tmp_path / "pipe", tmp_path / "again", dtype="float32")
    assert checkpoint.checkpoint_hash(tmp_path / "again") == checkpoint.checkpoint_hash(tmp_path / "ours")


def test_a_case_whose_settings_are_no_characters(tmp_path):
    meta = np.array(json.dumps({"kind": "text"}))
    codes = np.frombuffer(meta.tobytes(), np.uint32).copy()
    codes[10] = 0x30000000
    np.savez(tmp_path / "x.npz", meta=np.frombuffer(codes.tobytes(), meta.dtype).reshape(()))
    assert "x.npz is damaged" in message(parity.read_case, tmp_path / "x.npz")


def test_a_tokenizer_that_panics(tmp_path):
    """What the library's Rust code runs into is a line too; other ends, such as Ctrl-C, stay what they are."""
    train_unigram(["a red square moves left"], 80).save(tmp_path)
    tokens = PromptTokenizer.from_folder(tmp_path, 8)
    for name, expected in (("PanicException", UserError), ("Stop", KeyboardInterrupt)):
        error = type(name, (KeyboardInterrupt,), {})("index out of bounds")

        class Damaged:
            def encode_batch(self, *args, **kwargs):
                raise error  # noqa: B023 - called at once

        tokens._tokenizer = Damaged()
        with pytest.raises(expected, match="tokenizer.json is damaged" if expected is UserError else None):
            tokens("a red square")


def test_a_tokenizer_that_is_none(tmp_path):
    train_unigram(["a red square moves left"], 80).save(tmp_path)
    values = json.loads((tmp_path / "tokenizer.json").read_text())
    assert Tokenizer.from_str(json.dumps(values))
    for change in ({"model": {"type": "Unigram", "unk_id": 999, "vocab": []}}, {"model": None}, {"added_tokens": [1]}):
        (tmp_path / "tokenizer.json").write_text(json.dumps({**values, **change}))
        assert "tokenizer.json is no tokenizer file" in message(PromptTokenizer.from_folder, tmp_path, 8)
