"""The recorder on a real clone of the official repository, which the tests cannot contain.

Run by hand:

    git clone -b v1.0 https://github.com/NVlabs/LongLive official
    LONGLIVE_REPO=official python -m pytest -m slow tests/parity/test_recorder.py
"""

import os
from pathlib import Path

import pytest

from longlive_jax.conversion.export import export
from longlive_jax.conversion.record import record
from longlive_jax.conversion.recording import Run
from longlive_jax.conversion.side_by_side import side_by_side

REPO = os.environ.get("LONGLIVE_REPO")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(REPO is None, reason="LONGLIVE_REPO names no official clone")]


@pytest.mark.parametrize("name", ["batch2", "switch_keep_sink", "switch_refresh_sink", "relative_rope", "lora"])
def test_it_records_what_was_recorded(originals, write_case, tmp_path, name):
    """The official code, run by the recorder, gives the latents of the cases, which were recorded without it."""
    if name == "lora":
        pytest.importorskip("peft", reason="the official code lays a LoRA over the model by peft")
    run = Run(
        wan=originals["wan"],
        generator=originals["base"],
        lora=originals["lora"] if name == "lora" else None,
        inputs=write_case(name),
        decode=False,
        device="cpu",
    )
    told = record(Path(REPO), tmp_path / "again.npz", run)
    assert told["max_abs"] < 1e-5, "measured: 2.4e-6, from another order of summation"
    assert ("recache_ms" in told["times"]) == name.startswith("switch")


def test_both_sides(originals, tmp_path):
    run = Run(
        wan=originals["wan"], generator=originals["base"], random_embeds=True, switch_frames=(4,), frames=9, height=32,
        width=48, device="cpu",
    )  # fmt: skip
    entry = side_by_side(Path(REPO), run, atol=2e-5)
    assert entry["ok"], entry
    assert set(entry["quantities"]) == {"latents", "pixels"}
    assert entry["quantities"]["pixels"]["psnr"] > 100


def test_the_official_code_loads_what_we_export(originals, checkpoints, write_case, tmp_path):
    """A checkpoint converted from its files and back: its Wan folder and generator give the same latents."""
    export(checkpoints["base"], tmp_path / "back", "torch")
    run = Run(
        wan=tmp_path / "back",
        generator=tmp_path / "back/longlive_base.pt",
        inputs=write_case("switch_keep_sink"),
        decode=False,
        device="cpu",
    )
    assert record(Path(REPO), tmp_path / "again.npz", run)["max_abs"] < 1e-5
