"""The runner of parity cases: what it reports, and cases that cannot be run. The cases themselves: tests/parity."""

import json

import numpy as np
import pytest

from longlive_jax.conversion import parity
from longlive_jax.conversion.convert import convert_wan
from longlive_jax.errors import UserError


@pytest.fixture
def model(wan, tmp_path):
    convert_wan(wan, tmp_path / "model", dtype="float32")
    return tmp_path / "model"


@pytest.fixture
def text_case():
    ids = np.asarray([[4, 7, 1, 0]], np.int64)
    return {
        "meta": json.dumps({"kind": "text"}),
        "ids": ids,
        "mask": (ids > 0).astype(np.int64),
        "prompt_embeds": np.zeros((1, 4, 24), np.float32),
    }


def write(tmp_path, case):
    np.savez(tmp_path / "case.npz", **case)
    return tmp_path / "case.npz"


def message(model, path) -> str:
    with pytest.raises(UserError) as error:
        parity.run_case(model, path)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_entry(model, text_case, tmp_path):
    entry = parity.run_case(model, write(tmp_path, text_case), 1e-4)
    assert entry["case"] == "case"
    assert not entry["ok"]
    expected = np.asarray(parity.text(model, parity.read_case(tmp_path / "case.npz"))["prompt_embeds"][0])
    assert entry["max_abs"] == pytest.approx(np.abs(expected).max())
    assert entry["quantities"]["prompt_embeds"]["rms"] == entry["rms"] == pytest.approx(np.sqrt(np.mean(expected**2)))
    case = text_case | {"prompt_embeds": expected + 0.5 * (expected == expected.max())}
    entry = parity.run_case(model, write(tmp_path, case), 0.6)
    assert entry["ok"]
    assert entry["max_abs"] == pytest.approx(0.5)
    assert entry["quantities"]["prompt_embeds"]["rel"] == pytest.approx(0.5 / np.linalg.norm(case["prompt_embeds"]))
    json.dumps(entry, allow_nan=False)


def test_nan_is_not_ok(model, text_case, tmp_path):
    case = text_case | {"prompt_embeds": np.full((1, 4, 24), np.nan, np.float32)}
    entry = parity.run_case(model, write(tmp_path, case), 1e9)
    assert not entry["ok"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"meta": json.dumps({"kind": "texts"})}, "did you mean 'text'"),
        ({"meta": json.dumps({})}, "no parity case"),
        ({"meta": json.dumps([1])}, "no parity case"),
        ({"meta": "{"}, "no parity case"),
        ({"meta": None}, "no parity case"),
        ({"ids": None}, "has no 'ids'"),
        ({"mask": np.ones(4)}, r"'mask' is [4], expected axes (b l)"),
        ({"prompt_embeds": np.zeros((1, 4, 25))}, "'prompt_embeds' is [1, 4, 25], ours [1, 4, 24]"),
        ({"mask": np.ones((1, 5), np.int64)}, "does not fit"),
    ],
)
def test_cases_that_cannot_be_run(model, text_case, tmp_path, change, expected):
    case = {name: value for name, value in (text_case | change).items() if value is not None}
    assert expected in message(model, write(tmp_path, case))


def test_files_that_are_no_cases(model, text_case, tmp_path):
    assert "there is no case" in message(model, tmp_path / "none.npz")
    path = write(tmp_path, text_case)
    path.write_bytes(path.read_bytes()[:200])
    assert "damaged or no .npz file" in message(model, path)
    np.savez(path, meta=np.asarray({"kind": "text"}, object))
    assert "damaged or no .npz file" in message(model, path), "pickled arrays are not read"
    np.save(tmp_path / "one.npy", np.ones(3))
    (tmp_path / "one.npy").rename(path)
    assert "damaged or no .npz file" in message(model, path)


def test_checkpoint_without_the_part(wan, text_case, tmp_path):
    (wan / "models_t5_umt5-xxl-enc-bf16.pth").unlink()
    convert_wan(wan, tmp_path / "model")
    assert "has no text encoder" in message(tmp_path / "model", write(tmp_path, text_case))
