"""Every stage runs through at tiny sizes, from the command line, each starting from what the one before left."""

import json
from pathlib import Path

import pytest

from longlive_jax import checkpoint
from longlive_jax.cli import main

EXPERIMENTS = Path(__file__).parents[2] / "experiments" / "sprites"


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))


def longlive(*args):
    with pytest.raises(SystemExit) as caught:
        main(list(args))
    return caught.value.code


@pytest.mark.parametrize(
    "stage", ["vae", "teacher", "ar", *(pytest.param(s, marks=pytest.mark.slow) for s in ("init", "long"))]
)
def test_stage(tmp_path, capsys, stage):
    output = tmp_path / stage
    config = str(EXPERIMENTS / f"{stage}.yaml")
    assert longlive("train", stage, "--config", config, "--smoke", "--output", str(output)) == 0
    folder, steps = output / "checkpoint", 6 if stage in ("init", "long") else 4
    assert f"{folder}: stage {stage} is done after {steps} steps" in capsys.readouterr().out
    config = checkpoint.load_config(folder)
    parts = ["vae"] if stage == "vae" else ["vae", "transformer", "text_encoder"]
    for part in parts:
        assert checkpoint.load(folder, part)
    assert checkpoint.load_provenance(folder)["stage"] == stage
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert all(line["loss"] is not None for line in lines if "loss" in line)
    assert (output / "validation" / f"step-{steps:06d}.mp4").stat().st_size > 500
    if steps == 6:
        assert any("critic_loss" in line for line in lines)
        assert checkpoint.load_provenance(output / "critic")["network"] == "critic"
    assert longlive("train", stage, "--smoke", "--output", str(output)) == 1
    assert "holds a run and is kept" in capsys.readouterr().err
    assert longlive("train", stage, "--output", str(output), "--resume") == 0
    assert (config.vae.latent_std == (1.0,) * 16) == (stage != "vae")


def test_bad_input_is_one_line(tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text("optimiser: {}\n")
    assert longlive("train", "ar", "--config", str(path), "--output", str(tmp_path / "o")) == 1
    assert capsys.readouterr().err == f"longlive: {path}: unknown key 'optimiser'; did you mean 'optimizer'?\n"
    assert longlive("train", "ar", "--smoke", "--init", "sprites", "--output", str(tmp_path / "o")) == 1
    error = capsys.readouterr().err
    assert "init sprites is of another model: " in error and "transformer.dim is 128, the settings say 32" in error
    assert not (tmp_path / "o").exists()
