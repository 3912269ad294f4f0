"""Every stage runs through at tiny sizes, from the command line, each starting from what the one before left."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from longlive_jax import checkpoint
from longlive_jax.cli import main
from longlive_jax.conversion.lora import merge, open_lora
from longlive_jax.training.stage_config import LongTrainConfig
from longlive_jax.training.stages.distillation import LongStage
from longlive_jax.training.streams import axes, each, keys_of

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
STARTS = {
    "vae": [],
    "teacher": ["--vae", "vae/checkpoint"],
    "ar": ["--vae", "vae/checkpoint", "--init", "teacher/checkpoint"],
    "init": ["--init", "ar/checkpoint", "--teacher", "teacher/checkpoint"],
    "long": ["--init", "init/checkpoint", "--critic", "init/critic", "--teacher", "teacher/checkpoint"],
}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))


def longlive(*args):
    with pytest.raises(SystemExit) as caught:
        main([str(arg) for arg in args])
    return caught.value.code


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """The stages' folders, one starting from the other."""
    return tmp_path_factory.mktemp("runs")


def run_stage(runs: Path, stage: str) -> None:
    """A stage, and before it those that it starts from, unless they are there."""
    for start in STARTS[stage]:
        if "/" in start and not (runs / start).exists():
            run_stage(runs, start.split("/")[0])
    config = EXPERIMENTS / "sprites" / "cpu" / f"{stage}.yaml"
    assert longlive("train", stage, "--config", config, "--smoke", *STARTS[stage], "--output", stage) == 0


@pytest.mark.parametrize("stage", list(STARTS))
def test_stage(runs, capsys, monkeypatch, stage):
    monkeypatch.chdir(runs)
    run_stage(runs, stage)
    check_stage(Path(stage), stage, capsys.readouterr().out)


def test_a_finished_stage_is_kept_and_ended_again(runs, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(runs)
    if not Path("vae/checkpoint").exists():
        run_stage(runs, "vae")
    assert longlive("train", "vae", "--smoke", "--output", "vae") == 1
    assert "holds a run and is kept" in capsys.readouterr().err
    Path("vae/checkpoint").rename(tmp_path / "before")
    assert longlive("train", "vae", "--output", "vae", "--resume") == 0, "nothing is left to do but the end"
    assert checkpoint.checkpoint_hash("vae/checkpoint") == checkpoint.checkpoint_hash(tmp_path / "before")


@pytest.mark.slow
def test_what_the_last_stage_leaves_behind(runs, monkeypatch):
    monkeypatch.chdir(runs)
    if not Path("long/checkpoint").exists():
        run_stage(runs, "long")
    merged_adapters_are_those_of_the_file()
    options = "--seconds", "1", "--checkpoint", "long/checkpoint", "--output", "video.mp4"
    assert longlive("generate", "a large red star", *options) == 0
    assert Path("video.mp4").stat().st_size > 500


def check_stage(output: Path, stage: str, said: str) -> None:
    folder, steps = output / "checkpoint", 2
    assert f"{folder}: stage {stage} is done after {steps} steps" in said
    config = checkpoint.load_config(folder)
    assert checkpoint.load_provenance(folder)["stage"] == stage
    parts = ["vae"] if stage == "vae" else ["vae", "transformer", "text_encoder"]
    for part in parts:
        assert checkpoint.load(folder, part)
    assert config.vae.latent_std != (1.0,) * 16, "measured by the first stage"
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert all(line["loss"] is not None for line in lines if "loss" in line)
    assert (output / "validation" / f"step-{steps:06d}.mp4").stat().st_size > 500
    if stage in ("init", "long"):
        assert any("critic_loss" in line for line in lines)
        parts = ("rollout", "vae", "teacher", "generator_backward", "critic")
        assert all(lines[0][f"seconds_{part}"] > 0 for part in parts) and "seconds_rollout" not in lines[1]
        assert checkpoint.load_provenance(output / "critic")["network"] == "critic"


def merged_adapters_are_those_of_the_file() -> None:
    """LongLive's `lora.pt` over the generator that the stage began with is the one that it left."""
    for stage in ("init", "long"):
        folders = "--checkpoint", f"{stage}/checkpoint", "--output", f"{stage}-torch"
        assert longlive("convert", *folders, "--to", "torch") == 0
    began, left = (torch.load(f"{s}-torch/longlive_base.pt", weights_only=True)["generator"] for s in ("init", "long"))
    adapters = open_lora("long-torch/lora.pt")
    assert len(adapters.sides) == 2 * 10, "ten linear layers a block"
    for name, weight in began.items():
        made = merge(name.removeprefix("model."), weight.numpy(), [adapters])
        np.testing.assert_allclose(made, left[name].numpy(), atol=1e-6, err_msg=name)
    assert any(not torch.equal(weight, left[name]) for name, weight in began.items()), "something was learnt"


def test_bad_input_is_one_line(tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text("optimiser: {}\n")
    assert longlive("train", "ar", "--config", path, "--output", tmp_path / "o") == 1
    assert capsys.readouterr().err == f"longlive: {path}: unknown key 'optimiser'; did you mean 'optimizer'?\n"
    assert longlive("train", "ar", "--smoke", "--init", "sprites", "--output", tmp_path / "o") == 1
    error = capsys.readouterr().err
    assert "init sprites is of another model: " in error and "transformer.dim is 128, the settings say 16" in error
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.txt": "one\ntwo\n", "b.txt": "three\n"}, "a.txt has 2, b.txt has 1 prompts; make them equally long"),
        ({"a.txt": "one\n", "b.txt": "\n\n"}, "b.txt"),
        ({"a.txt": "one\n"}, "1 prompt files are given; a video with 2 prompts needs 2"),
    ],
    ids=["unequal", "empty", "one file"],
)
def test_prompt_files(tmp_path, capsys, monkeypatch, files, message):
    monkeypatch.chdir(tmp_path)
    for name, text in files.items():
        Path(name).write_text(text)
    assert longlive("train", "long", "--smoke", "--prompts", *files, "--output", "o") == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, "one line"
    assert not Path("o").exists()


@pytest.mark.parametrize("stage", ["init", "long"])
def test_check_says_what_a_pod_needs(tmp_path, capsys, monkeypatch, stage):
    """By shapes alone: nothing of 1.3B or 14B is allocated, no device but this CPU is asked."""
    monkeypatch.chdir(tmp_path)
    config = EXPERIMENTS / "wan" / f"{stage}.yaml"
    assert longlive("train", stage, "--config", config, "--check", "--output", "o") == 0
    said = capsys.readouterr().out
    assert said.startswith(f"stage {stage}, 64 streams on data 1 x fsdp 8: about ") and "on each of 8 devices" in said
    assert longlive("train", stage, "--config", config, "--check", "--output", "o", "--run.device-gib", "15.75") == 1
    assert "but only 15.8 GiB are free" in capsys.readouterr().err
    assert longlive("train", stage, "--config", config, "--check", "--output", "o", "--run.fsdp", "7") == 1
    assert "does not divide" in capsys.readouterr().err
    assert not Path("o").exists()


def test_parts_of_a_distillation_step_fit_together(tmp_path):
    """Traced, not run: what one gives is what the next one takes."""
    stage = LongStage(LongTrainConfig().shrunk(), tmp_path, lambda line: None)
    learners, frozen = stage.shapes()
    frozen["text_encoder"] = checkpoint.abstract_params("text_encoder", stage.model.text_encoder)
    source = stage.source(stage.config.phases[0], 0)
    batch = jax.tree.map(lambda a: a[None], stage.collate([source[i] for i in range(2)]))
    batch = each(lambda a: a[0], stage.parted(batch))
    carry = each(lambda a: a[0, 0], stage.carry(stage.config.phases[0]))
    told = carry, batch, keys_of(jax.random.key(0))
    frames = stage.config.distillation.chunk_frames
    for first in (True, False):
        made, abreast, along = {}, {}, {}
        for part in stage._parts(first):
            made[part.name] = jax.eval_shape(part.function, learners | frozen, *told, made)
            # And side by side, as on a mesh: what streams share stays shared.
            over = jax.vmap(part.function, in_axes=(None, *map(axes, told), dict(along)), out_axes=part.axes)
            rows = [each(lambda a: jnp.broadcast_to(a, (2, *a.shape)), tree) for tree in told]
            abreast[part.name] = jax.eval_shape(over, learners | frozen, *rows, abreast)
            along[part.name] = part.axes
        state, _, draws, tape = abreast["rollout"]
        assert state.position.shape == state.switched.shape == draws.rollout.exit_step.shape == ()
        assert tape.prompt.shape == made["rollout"][3].prompt.shape and tape.x.shape[0] == 2
        assert list(made) == ["rollout", "vae", "teacher", "generator_backward", "critic"]
        assert made["vae"][0].shape == (2, frames, 8, 8, 16)
        assert [flow.shape for flow in made["teacher"]] == [(2, frames, 8, 8, 16)] * 2, "guided: two passes"
        shapes = lambda tree: jax.tree.map(lambda a: a.shape, tree)
        assert shapes(made["generator_backward"]) == shapes(learners["generator"])
        assert shapes(made["critic"]) == shapes(learners["critic"])
