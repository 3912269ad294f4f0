"""The record beside a video: what goes in comes out, and broken records are named."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from longlive_jax.errors import UserError
from longlive_jax.prompts import Schedule
from longlive_jax.sidecar import load_sidecar, make_record, record_schedule, sidecar_path, versions, write_sidecar


def record(**changes):
    values = {
        "prompts": ("a cat", "ein Käfer"),
        "asked_seconds": (5.0,),
        "applied_seconds": (5.25,),
        "seconds": 10,
        "seed": 3,
        "settings": {"switch": "recache", "window": np.int64(12), "steps": np.array([1000, 750]), "dtype": np.float32},
        "checkpoint": {"name": "sprites", "folder": Path("weights"), "sha256": "ab" * 32},
        "timings": {"frames_per_second": np.float32(16.5)},
    }
    return make_record(**(values | changes))


def test_round_trip(tmp_path):
    path = write_sidecar(tmp_path / "out" / "clip.v2.mp4", record())
    assert path == tmp_path / "out" / "clip.v2.json" == sidecar_path(tmp_path / "out" / "clip.v2.mp4")
    loaded = load_sidecar(path)
    assert loaded["prompts"] == ["a cat", "ein Käfer"]
    assert loaded["switches"] == {"asked_seconds": [5.0], "applied_seconds": [5.25]}
    assert loaded["settings"] == {"switch": "recache", "window": 12, "steps": [1000, 750], "dtype": "float32"}
    assert loaded["checkpoint"]["folder"] == "weights"
    assert loaded["timings"] == {"frames_per_second": 16.5}
    assert record_schedule(loaded) == Schedule(("a cat", "ein Käfer"), (5.0,), 10, 3)
    assert load_sidecar(path.with_suffix(".mp4")) == loaded, "the video's name will do"
    assert "Käfer" in path.read_text("utf-8"), "people read it too"
    assert os.listdir(path.parent) == [path.name]


def test_versions_name_everything_that_decides_the_numbers():
    found = versions()
    assert set(found) == {"longlive_jax", "python", "jax", "jaxlib", "flax", "numpy", "backend", "device", "devices"}
    assert found["numpy"] == np.__version__ and found["devices"] >= 1


def test_existing_record_is_kept(tmp_path):
    path = write_sidecar(tmp_path / "clip.mp4", record())
    before = path.read_bytes()
    with pytest.raises(UserError, match="clip.json exists.*--overwrite"):
        write_sidecar(tmp_path / "clip.mp4", record(seed=4))
    assert path.read_bytes() == before
    write_sidecar(tmp_path / "clip.mp4", record(seed=4), overwrite=True)
    assert load_sidecar(path)["seed"] == 4


def test_a_record_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = write_sidecar(tmp_path / "clip.mp4", record())
    before = path.read_bytes()
    with pytest.raises(TypeError, match="object has no place"):
        write_sidecar(tmp_path / "clip.mp4", record(settings={"bad": object()}), overwrite=True)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["clip.json"]
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        write_sidecar(tmp_path / "file" / "clip.mp4", record())


def test_switch_times_must_fit_the_prompts():
    with pytest.raises(ValueError, match="2 prompts"):
        record(applied_seconds=())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "not the record of a longlive video"),
        ({"prompts": "a"}, "'prompts' is not of the right kind"),
        ({"prompts": ["a", ""]}, "prompt 2 is empty"),
        ({"seed": True}, "'seed'"),
        ({"seed": -4}, "seed is -4"),
        ({"seconds": "5"}, "'seconds'"),
        ({"switches": {}}, "asked_seconds"),
        ({"switches": {"asked_seconds": []}}, "one fewer than prompts"),
    ],
)
def test_broken_records_are_named(tmp_path, change, message):
    path = tmp_path / "clip.json"
    path.write_text(json.dumps(json.loads(write_sidecar(tmp_path / "good.mp4", record()).read_text()) | change))
    with pytest.raises(UserError, match=rf"clip\.json.*{message}") as caught:
        load_sidecar(path)
    assert "\n" not in str(caught.value)


def test_missing_key_and_no_json(tmp_path):
    values = record()
    del values["timings"]
    with pytest.raises(UserError, match="'timings' is missing"):
        load_sidecar(write_sidecar(tmp_path / "clip.mp4", values))
    (tmp_path / "cut.json").write_text('{"format": "longlive video",\n "prompts": [')
    with pytest.raises(UserError, match=r"cut\.json:2: not valid JSON"):
        load_sidecar(tmp_path / "cut.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not text"):
        load_sidecar(tmp_path / "binary.json")
    with pytest.raises(UserError, match="beside a generated"):
        load_sidecar(tmp_path / "none.mp4")
