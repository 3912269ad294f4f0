"""Reading weights: formats, wrappers, entries of a file, and everything that can be wrong with one."""

import json
import os
import pickle
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from longlive_jax.conversion.readers import GENERATOR_KEYS, MAPPED_BYTES, open_weights
from longlive_jax.errors import UserError

TENSORS = {"blocks.0.weight": torch.arange(6.0).reshape(2, 3), "head.bias": torch.ones(3)}


def message(*args, **kwargs) -> str:
    with pytest.raises(UserError) as error:
        open_weights(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def write(path, tensors, **kwargs):
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path, **kwargs)
    return path


# MARK: what can be read


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_formats_and_dtypes(tmp_path, suffix, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in TENSORS.items()}
    reader = open_weights(write(tmp_path / f"x{suffix}", tensors))
    assert reader.shapes == {"blocks.0.weight": (2, 3), "head.bias": (3,)}
    expected = ml_dtypes.bfloat16 if dtype == torch.bfloat16 else str(dtype).removeprefix("torch.")
    assert set(reader.dtypes.values()) == {np.dtype(expected)}
    values = reader.read("blocks.0.weight")
    assert values.dtype == np.dtype(expected)
    np.testing.assert_array_equal(values.astype(np.float32), TENSORS["blocks.0.weight"])
    assert reader.paths == [tmp_path / f"x{suffix}"]


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize(
    "stored",
    [
        "model.{0}",
        "module.{0}",
        "model.module.{0}",
        "_fsdp_wrapped_module.{0}",
        "model._fsdp_wrapped_module.{0}",
        "model._fsdp_wrapped_module.blocks._checkpoint_wrapped_module.{1}",
        "_orig_mod.model.{0}",
        "module._orig_mod.{0}",
        "_orig_mod.module.model.{0}",
        "model.diffusion_model.{0}",
        "module.model._fsdp_wrapped_module.blocks._fsdp_wrapped_module._checkpoint_wrapped_module.{1}",
    ],
)
def test_wrappers_are_taken_off(tmp_path, suffix, stored):
    names = {name: stored.format(name, name.removeprefix("blocks.")) for name in ("blocks.0.weight",)}
    path = write(tmp_path / f"x{suffix}", {names[name]: TENSORS[name] for name in names})
    reader = open_weights(path)
    assert list(reader.shapes) == ["blocks.0.weight"]
    np.testing.assert_array_equal(reader.read("blocks.0.weight"), TENSORS["blocks.0.weight"])


def test_two_names_for_one_tensor(tmp_path):
    path = write(tmp_path / "x.pt", {"model.head.bias": torch.ones(3), "head.bias": torch.ones(3)})
    text = message(path)
    assert "model.head.bias" in text
    assert "same tensor" in text


def test_views_and_old_files(tmp_path):
    tensors = {"t": torch.arange(6.0).reshape(2, 3).T, "p": torch.nn.Parameter(torch.ones(2))}
    for zipped in (True, False):
        path = write(tmp_path / f"{zipped}.pth", tensors, _use_new_zipfile_serialization=zipped)
        reader = open_weights(path)
        np.testing.assert_array_equal(reader.read("t"), tensors["t"])
        np.testing.assert_array_equal(reader.read("p"), np.ones(2))


def test_shards(tmp_path):
    names = {"blocks.0.weight": "m-00001-of-00002.safetensors", "head.bias": "m-00002-of-00002.safetensors"}
    for name, file in names.items():
        save_file({name: TENSORS[name]}, tmp_path / file)
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    reader = open_weights(tmp_path / "m.safetensors")
    assert set(reader.shapes) == set(TENSORS)
    np.testing.assert_array_equal(reader.read("head.bias"), np.ones(3))
    assert [path.name for path in reader.paths] == sorted(names.values())
    by_index = open_weights(tmp_path / "m.safetensors.index.json")
    assert (by_index.where, by_index.shapes) == (reader.where, reader.shapes)
    os.truncate(tmp_path / "m-00002-of-00002.safetensors", 20)
    (tmp_path / "m-00001-of-00002.safetensors").unlink()
    text = message(tmp_path / "m.safetensors")
    assert "m-00001-of-00002.safetensors is missing" in text
    assert "m-00002-of-00002.safetensors is cut off" in text


def resident() -> int:
    """Bytes of memory in use, pages of mapped files included."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmRSS"].split()[0]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory in use is read from Linux's /proc")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_file_does_not_stay_in_memory(tmp_path, dtype):
    """24 tensors of 16 MiB: never more in use than what is read before the next mapping and the tensor itself."""
    size = 2**24
    tensors = {f"blocks.{i}.w": torch.full((size // dtype.itemsize,), i, dtype=dtype) for i in range(24)}
    path = write(tmp_path / "large.pth", {"generator": tensors})
    del tensors
    reader = open_weights(path, keys=GENERATOR_KEYS)
    before, most = resident(), 0
    for name in reader.shapes:
        values = reader.read(name)
        assert values[::1024].sum(dtype=np.float64) == values.size // 1024 * int(name.split(".")[1])
        most = max(most, resident() - before)
        del values
    assert size / 2 < most < MAPPED_BYTES + 3 * size < 24 * size / 2


# MARK: entries


def test_entries_in_their_order(tmp_path):
    content = {key: {"w": torch.full((1,), float(i))} for i, key in enumerate(reversed(GENERATOR_KEYS))}
    path = write(tmp_path / "x.pt", {**content, "step": 3})
    assert open_weights(path, keys=GENERATOR_KEYS).read("w") == 2
    assert open_weights(path, "generator_ema", keys=GENERATOR_KEYS).read("w") == 1
    del content["generator"]
    path = write(tmp_path / "x.pt", content)
    assert open_weights(path, keys=GENERATOR_KEYS).read("w") == 1
    assert "[generator_ema]" in open_weights(path, keys=GENERATOR_KEYS).where
    text = message(path, "generator", keys=GENERATOR_KEYS)
    assert "no entry 'generator'" in text
    assert "model, generator_ema" in text


def test_other_entries(tmp_path):
    path = write(tmp_path / "x.pt", {"critic": TENSORS, "step": 3})
    assert "has critic; expected one of generator" in message(path, keys=GENERATOR_KEYS)
    path = write(tmp_path / "bare.pt", TENSORS)
    assert "bare dict" in message(path, "generator", keys=GENERATOR_KEYS)
    path = write(tmp_path / "x.safetensors", TENSORS)
    assert "leave out the key" in message(path, "generator")
    assert "no named tensors" in message(write(tmp_path / "list.pt", [torch.ones(2)]))
    text = message(write(tmp_path / "odd.pt", {"w": torch.ones(2), "lr": 0.1, "s": torch.eye(2).to_sparse()}))
    assert "lr, s" in text


def test_types_that_cannot_be_converted(tmp_path):
    path = write(tmp_path / "q.pt", {"w": torch.ones(2).to(torch.float8_e4m3fn)})
    assert "cannot be converted; save them as float32 or bfloat16" in message(path)


# MARK: faults


class Evil:
    """Would make a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_unsafe_pickles_are_refused(tmp_path, zipped):
    harm = tmp_path / "harm"
    content = {"model": {"w": torch.ones(2)}, "x": Evil(harm)}
    text = message(write(tmp_path / "x.pt", content, _use_new_zipfile_serialization=zipped))
    assert "refused" in text
    assert "state dict alone" in text
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Evil(harm)))
    assert "bare.pt" in message(tmp_path / "bare.pt")
    assert not harm.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_pickles(tmp_path, zipped):
    path = write(tmp_path / "x.pt", {"w": torch.ones(5000)}, _use_new_zipfile_serialization=zipped)
    size = path.stat().st_size
    for keep in (size - 1, size // 2, 100, 3, 0):
        os.truncate(path, keep)
        assert "damaged" in message(path)


def test_missing_and_foreign_files(tmp_path):
    assert "No such file" in message(tmp_path / "x.pt")
    assert "x.safetensors is missing" in message(tmp_path / "x.safetensors")
    (tmp_path / "x.ckpt").write_text("")
    assert "only .safetensors, .pt" in message(tmp_path / "x.ckpt")
    for suffix in ("pt", "safetensors"):
        (tmp_path / f"x.{suffix}").write_bytes(os.urandom(500))
        assert "damaged" in message(tmp_path / f"x.{suffix}")
        (tmp_path / f"dir.{suffix}").mkdir()
        assert f"dir.{suffix}" in message(tmp_path / f"dir.{suffix}")


def test_without_torch(tmp_path, monkeypatch):
    path = write(tmp_path / "x.pt", TENSORS)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert 'pip install "longlive-jax[convert]"' in message(path)
    assert open_weights(write(tmp_path / "x.safetensors", TENSORS)).shapes
