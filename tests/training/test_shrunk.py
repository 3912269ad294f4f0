"""`--smoke`: whatever the settings are, their stage can be made and fits one device."""

import dataclasses
from pathlib import Path

import pytest

from longlive_jax.training.config import DistillationConfig, Quirks
from longlive_jax.training.config_files import read_config
from longlive_jax.training.footprint import described_memory
from longlive_jax.training.run_config import RunConfig
from longlive_jax.training.stage_config import STAGES, InitTrainConfig, LongTrainConfig, StudentTrainConfig
from longlive_jax.training.stages import stage_of

FOLDERS = ("sprites/cpu", "sprites/gpu", "wan")
EXPERIMENTS = sorted(p for f in FOLDERS for p in (Path(__file__).parents[2] / "experiments" / f).glob("*.yaml"))


def check(config, output: Path) -> None:
    tiny = config.shrunk()
    assert tiny.run.devices == 1 and tiny.run.streams <= 2 and tiny.steps == 2
    assert described_memory(stage_of(tiny, output, lambda line: None)).endswith("on each of 1 devices")
    assert not output.exists()


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_configs_in_experiments(path, tmp_path):
    kind = {"decoder": "vae", "student": "ar"}.get(path.stem, path.stem)
    check(read_config(path, STAGES[kind]), tmp_path / "run")


@pytest.mark.parametrize("kind", [InitTrainConfig, LongTrainConfig])
@pytest.mark.parametrize("window", [6, 12, 21])
def test_the_official_quirks(kind, window, tmp_path):
    config, frames = kind(), 240 if kind is LongTrainConfig else 21
    config = dataclasses.replace(
        config, distillation=DistillationConfig(max_frames=frames, quirks=Quirks.reference()),
        sampler=dataclasses.replace(config.sampler, window=window),
    )  # fmt: skip
    check(config, tmp_path / "run")
    assert len(config.shrunk().distillation.starts) == (2 if kind is LongTrainConfig else 1)


def test_streams_stay_where_there_were_several():
    tiny = dataclasses.replace(StudentTrainConfig(), run=RunConfig(streams=8, fsdp=8, device_gib=80.0)).shrunk()
    assert (tiny.run.streams, tiny.phases[0].batch_size, tiny.run.device_gib) == (2, 2, None)


def test_parts_of_a_step_are_timed_by_default():
    """Where there are parts; `--smoke` does it once. The recipes of the sprites leave it out: their time is short."""
    for name, kind in STAGES.items():
        assert kind().run.split_every == (200 if name in ("init", "long") else 0)
    for path in EXPERIMENTS:
        if path.parent.name == "cpu" and path.stem in STAGES:
            assert read_config(path, STAGES[path.stem]).run.split_every == 0
