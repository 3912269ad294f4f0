"""What a run of Wan's size needs of each device, counted without one."""

import dataclasses
from pathlib import Path

import jax
import pytest

from longlive_jax.sharding import AXES
from longlive_jax.training.config_files import read_config
from longlive_jax.training.footprint import placed, required_memory
from longlive_jax.training.stage_config import STAGES
from longlive_jax.training.stages import stage_of
from longlive_jax.training.step import spec_of

SETTINGS = Path(__file__).parents[2] / "experiments" / "wan" / "long.yaml"


def wan(tmp_path, **run):
    config = dataclasses.replace(read_config(SETTINGS, STAGES["long"]), prompts=())
    run = dataclasses.replace(config.run, **run)
    phases = (dataclasses.replace(config.phases[0], batch_size=run.streams),)
    return stage_of(dataclasses.replace(config, run=run, phases=phases), tmp_path, lambda line: None)


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    return wan(tmp_path_factory.mktemp("wan"))


def test_all_that_is_large_is_cut_up(stage):
    """Adapters and the text encoder too; the VAE lies everywhere."""
    mesh = jax.sharding.AbstractMesh((1, 8, 1, 1), AXES)
    learners, frozen = stage.shapes()
    for path, leaf in jax.tree_util.tree_leaves_with_path((learners, {k: v for k, v in frozen.items() if k != "vae"})):
        assert leaf.size < 1e7 or "fsdp" in spec_of(path, leaf, mesh), jax.tree_util.keystr(path)
    once = sum(leaf.size for leaf in jax.tree.leaves(learners))
    assert placed(learners, mesh) == once
    assert placed(frozen["vae"], mesh) == 8 * sum(leaf.size for leaf in jax.tree.leaves(frozen["vae"]))


def test_what_an_axis_does_not_divide_is_counted_on_every_device(stage, tmp_path):
    one, odd = (required_memory(s) for s in (stage, wan(tmp_path, fsdp=63, streams=63)))
    assert odd["weights"] > 60 * one["weights"]
    assert odd["frozen networks"] > 50 * one["frozen networks"]
