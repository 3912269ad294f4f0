"""Exact resume of streaming long tuning: killed in the middle of a video and gone on with is the same run, bit for bit;
on another mesh up to the order of sums.

Run as a script this is the run that is killed, or the one that goes on with two devices:
`python test_distillation_resume.py OUTPUT DIE_AT`, `python test_distillation_resume.py OUTPUT`.
"""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from run_state import assert_same_state, stored_state
from toy_stage import Silent

from longlive_jax.training.stage_config import LongTrainConfig
from longlive_jax.training.stages.distillation import LongStage
from longlive_jax.training.trainer import train

STEPS, SAVED, KILLED = 6, 3, 5


def config() -> LongTrainConfig:
    """The stage at its smallest, but with three chunks a video, of which a step of both makes two: after three steps a
    video is under way, its prompt changed. Two streams, one after the other, with adapters."""
    small = LongTrainConfig().shrunk()
    block = small.sampler.block_frames
    return dataclasses.replace(
        small, phases=(dataclasses.replace(small.phases[0], steps=STEPS),), student_every=2, lora_rank=2,
        distillation=dataclasses.replace(small.distillation, max_frames=4 * block),
        run=dataclasses.replace(small.run, streams=2, save_every=SAVED, tensorboard=False),
    )  # fmt: skip


class Stage(LongStage):
    """May be killed; leaves no videos, which have nothing to do with this."""

    die_at = None

    def turns(self, phase, step, *, plain=False):
        if step == self.die_at and not plain:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().turns(phase, step, plain=plain)

    def validate(self, best, frozen):
        return {}, np.zeros((2, 16, 16, 3), np.uint8)


def run(folder: Path, *, resume: bool = False, die_at: int | None = None, devices: int = 1) -> Silent:
    settings = config()
    settings = dataclasses.replace(settings, run=dataclasses.replace(settings.run, fsdp=devices))
    stage, reporter = Stage(settings, folder, lambda line: None), Silent()
    stage.die_at = die_at
    train(stage, folder, reporter, resume=resume)
    return reporter


@pytest.mark.slow
def test_killed_and_resumed_is_the_same_run(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(whole)
    state, _ = stored_state(whole, SAVED)
    assert int(state["['carry']['shared']['position']"]) > 0 and bool(state["['carry']['shared']['switched']"])
    assert (done := script(killed, KILLED)).returncode == -signal.SIGKILL, done.stderr
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(killed, elsewhere)
    reporter = run(killed, resume=True)
    assert reporter.lines[0] == f"resumed at step {SAVED} of {STEPS}"
    assert_same_state(whole, killed)
    final, positions = stored_state(killed)
    assert len(positions) == 1
    for learner in ("generator", "critic"):
        for part in ("params", "opt"):
            assert any(f"['{learner}']['{part}']" in name for name in final), "what is compared is there"
    changed = [name for name in state if "lora" in name and not np.array_equal(state[name], final[name])]
    assert any("generator" in name for name in changed) and any("critic" in name for name in changed), "they learnt"

    assert (done := script(elsewhere, devices=2)).returncode == 0, done.stderr
    moved, _ = stored_state(elsewhere)
    name = "['carry']['own']['recent']"
    assert final[name].shape[:2] == (2, 1) and moved[name].shape[:2] == (1, 2)
    for name, value in final.items():
        np.testing.assert_allclose(moved[name].reshape(value.shape), value, rtol=1e-3, atol=1e-4, err_msg=name)


def script(folder: Path, *die_at: int, devices: int = 1) -> subprocess.CompletedProcess:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path), "XLA_FLAGS": flags}
    command = [sys.executable, __file__, str(folder), *map(str, die_at)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        run(Path(sys.argv[1]), die_at=int(sys.argv[2]))
    else:
        run(Path(sys.argv[1]), resume=True, devices=2)
