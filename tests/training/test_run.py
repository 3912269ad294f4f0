"""The script of all stages: what it packs, what it takes up again, and (slow) the whole of it, interrupted."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest

from longlive_jax import checkpoint
from longlive_jax.training.stage_config import STAGES

PATH = Path(__file__).parents[2] / "experiments" / "sprites" / "run.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("sprites_run", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def make(script, output: Path, **changes):
    settings = {"budget": 25.0, "deadline": None, "rehearse": False} | changes
    return script.Run(output, log=script.Log(output), **settings)


@pytest.fixture
def finished(script, tmp_path, tiny_checkpoint):
    """An output whose stages are all there; the first has a VAE alone."""
    for stage in script.RECIPES["gpu"]:
        folders = ("checkpoint", "critic") if stage in ("init", "long") else ("checkpoint",)
        for folder in folders:
            shutil.copytree(tiny_checkpoint, tmp_path / "one" / stage / folder)
        (tmp_path / "one" / stage / "metrics.jsonl").write_text("{}\n")
    for part in ("transformer", "text_encoder"):
        (tmp_path / "one" / "vae" / "checkpoint" / f"{part}.safetensors").unlink()
    return tmp_path / "one"


def test_what_is_packed_is_taken_up_elsewhere(script, finished, tmp_path):
    make(script, finished).package()
    packed = sorted((finished / "package").iterdir())
    assert [path.name.removesuffix(".tar.gz") for path in packed] == [
        "ar-checkpoint", "init-checkpoint", "init-critic", "long-checkpoint", "report", "student-checkpoint",
        "teacher-checkpoint", "vae-checkpoint",
    ]  # fmt: skip
    assert len(packed) <= 8 and all(path.stat().st_size < script.LIMIT for path in packed)
    with tarfile.open(finished / "package" / "report.tar.gz") as tar:
        assert "ar/metrics.jsonl" in tar.getnames()
    two = tmp_path / "two"
    two.mkdir()
    other = make(script, two)
    other.restore(finished / "package")
    # The last stage's critic is nobody's start, so it stays at home; its checkpoint is the model.
    assert all(other.done(stage) for stage in ("vae", "teacher", "ar", "student", "init"))
    for folder in ("teacher/checkpoint", "init/critic", "long/checkpoint"):
        for part in checkpoint.MODULES:
            ours, theirs = (checkpoint.load(root / folder, part, np.float32) for root in (finished, two))
            for one, half in zip(*map(list, (leaves(ours), leaves(theirs)))):
                np.testing.assert_allclose(half, one, rtol=2**-8)


def leaves(tree):
    return (leaf for value in tree.values() for leaf in (leaves(value) if isinstance(value, dict) else [value]))


def test_stages_that_are_there_are_left_out(script, finished):
    run = make(script, finished)
    assert all(run.stage(stage) for stage in script.RECIPES["gpu"])
    assert "is there" in (finished / "log.jsonl").read_text()
    shutil.rmtree(finished / "init" / "critic")
    assert not make(script, finished, deadline=time.monotonic()).stage("init"), "no time is left to begin it"


def test_settings(script, tmp_path):
    """Sizes fit from stage to stage, and the phases' minutes are the budget less what else takes time."""
    configs = {stage: make(script, tmp_path).config(stage) for stage in script.RECIPES["gpu"]}
    assert configs.keys() == {*STAGES, "student"}
    minutes = sum(phase.minutes for config in configs.values() for phase in config.phases)
    assert minutes == pytest.approx(script.BUDGET - script.OVERHEAD)
    assert len({configs[stage].transformer for stage in ("teacher", "ar", "student", "init", "long")}) == 1
    assert configs["init"].sampler == configs["long"].sampler
    assert configs["teacher"].init == str(tmp_path / "ar/checkpoint") and not configs["teacher"].train_text_encoder
    middle = (script.BUDGET + script.OVERHEAD) / 2
    half = make(script, tmp_path, budget=middle).config("vae").phases
    assert [p.minutes for p in half] == [pytest.approx(p.minutes / 2) for p in configs["vae"].phases]
    assert make(script, tmp_path, rehearse=True).config("long").steps == 2


def test_the_recipe_of_two_cores_has_its_own_order_and_steps(script, tmp_path):
    run = make(script, tmp_path, recipe="cpu", budget=None)
    configs = {stage: run.config(stage) for stage in script.RECIPES["cpu"]}
    assert list(configs) == ["vae", "decoder", "teacher", "ar", "init", "long"]
    assert not configs["decoder"].train_encoder and configs["decoder"].init == str(tmp_path / "vae/checkpoint")
    assert configs["teacher"].init is None and configs["ar"].init == str(tmp_path / "teacher/checkpoint")
    # One text encoder for all: who learns it comes first.
    assert configs["teacher"].train_text_encoder and not configs["ar"].train_text_encoder
    assert configs["init"].init == str(tmp_path / "ar/checkpoint")
    for last in (configs["init"], configs["long"]):
        assert (last.vae, last.teacher) == (str(tmp_path / "decoder/checkpoint"), str(tmp_path / "teacher/checkpoint"))
    assert configs["teacher"].latents == configs["ar"].latents, "a folder a phase"
    names = [phase.name for stage in ("teacher", "ar") for phase in configs[stage].phases]
    assert len(set(names)) == len(names), "a teacher's clips are of one prompt each, a student's change at blocks"
    assert len({configs[stage].transformer for stage in ("teacher", "ar", "init", "long")}) == 1


def test_a_recipe_that_goes_on_keeps_the_model_s_vae_and_sizes(script, tmp_path, tiny_checkpoint):
    before = str(tiny_checkpoint)
    run = make(script, tmp_path, recipe="further", budget=None, begin=before)
    configs = {stage: run.config(stage) for stage in script.RECIPES["further"]}
    assert list(configs) == ["teacher", "student", "init", "long"]
    assert {config.vae for config in configs.values()} == {before}
    assert configs["teacher"].init == before and configs["student"].init == str(tmp_path / "teacher/checkpoint")
    assert configs["init"].init == str(tmp_path / "student/checkpoint")
    assert configs["long"].critic == str(tmp_path / "init/critic")
    # One text encoder for all: who learns it comes first.
    assert configs["teacher"].train_text_encoder and not configs["student"].train_text_encoder
    assert configs["teacher"].latents == configs["student"].latents, "a folder a phase"
    names = [phase.name for stage in ("teacher", "student") for phase in configs[stage].phases]
    assert len(set(names)) == len(names), "a teacher's clips are of one prompt each, a student's change at blocks"
    rehearsal = make(script, tmp_path, recipe="further", budget=None, begin=before, rehearse=True)
    assert rehearsal.config("teacher").init is None, "its tiny networks begin with nothing"


def test_a_model_without_a_vae_gets_the_shipped_one(script, tmp_path):
    teacher = str(PATH.parent / "teacher")
    config = make(script, tmp_path, recipe="further", budget=None, begin=teacher).config("teacher")
    assert (config.init, config.vae) == (teacher, "sprites")


def test_a_start_is_for_the_recipe_that_goes_on(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py", "--output", str(tmp_path / "run"), "--recipe", "cpu", "--from", "x"])
    with pytest.raises(SystemExit):
        script.main()
    assert "recipe further goes on from a model" in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_rehearsal_interrupted_twice(tmp_path):
    """From nothing to a packaged checkpoint that plays."""
    command = [sys.executable, str(PATH), "--output", str(tmp_path / "run"), "--rehearse"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    for stage, number in (("vae", signal.SIGKILL), ("ar", signal.SIGTERM)):
        process = subprocess.Popen(command, env=environment)
        while not (tmp_path / "run" / stage / "state").exists() and process.poll() is None:
            time.sleep(0.5)
        time.sleep(1)
        process.send_signal(number)
        assert process.wait() != 0
    assert subprocess.run(command, env=environment).returncode == 0
    reports = json.loads((tmp_path / "run" / "evaluate" / "evaluation.json").read_text())
    assert set(reports) == {"student-5s", "init-5s", "long-5s", "init-30s", "long-30s"}
    with tarfile.open(tmp_path / "run" / "package" / "long-checkpoint.tar.gz") as tar:
        tar.extractall(tmp_path / "home", filter="data")
    generate = [sys.executable, "-c", "from longlive_jax.cli import main; main()", "generate", "a large red star"]
    folder, video = tmp_path / "home" / "long" / "checkpoint", tmp_path / "video.mp4"
    options = ["--seconds", "1", "--checkpoint", str(folder), "--output", str(video)]
    assert subprocess.run([*generate, *options], env=environment).returncode == 0
    assert video.stat().st_size > 500
