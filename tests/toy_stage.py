"""A stage so small that the trainer can be tested in seconds: a linear map, learnt from noisy pairs.

Run as a script it is a run of its own, to be killed: `python toy_stage.py OUTPUT [--resume] [--die-at STEP]`, or one
of several processes: `--distributed`, on a mesh of `--devices N`.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import signal
import sys
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.training.run_config import OptimizerConfig, RunConfig
from longlive_jax.training.stage_config import StageConfig
from longlive_jax.training.stages.base import Stage
from longlive_jax.training.step import Part, Turn
from longlive_jax.training.trainer import train


@dataclasses.dataclass(frozen=True)
class ToyPhase:
    name: str
    steps: int
    batch_size: int = 4
    rate: float = 0.05
    minutes: float | None = None


@dataclasses.dataclass(frozen=True)
class ToyConfig(StageConfig):
    stage: ClassVar[str] = "toy"
    phases: tuple[ToyPhase, ...] = (ToyPhase("one", 6), ToyPhase("two", 6))
    optimizer: OptimizerConfig = OptimizerConfig(warmup=0, ema=0.9)
    run: RunConfig = RunConfig(streams=2, save_every=4, log_every=1, tensorboard=False)
    width: int = 3


@dataclasses.dataclass(frozen=True)
class ToySource:
    seed: int
    width: int
    length: int

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return {"x": np.random.default_rng([self.seed, int(index)]).standard_normal(self.width).astype(np.float32)}


class ToyStage(Stage):
    """Learns a diagonal; `poison` steps have a loss that is not a number."""

    name = "toy"

    def __init__(self, config, output, say=print, *, poison=(), on_step=lambda step: None):
        super().__init__(config, output, say)
        self.poison, self.on_step = poison, on_step

    def shapes(self):
        return {"toy": {"w": jax.ShapeDtypeStruct((self.config.width,), jnp.float32)}}, {}

    def activations(self, phase):
        return {"activations": 8 * phase.batch_size * self.config.width}

    def parameters(self):
        return {"toy": {"w": np.zeros(self.config.width, np.float32)}}, {"goal": np.arange(self.config.width) + 1.0}

    def source(self, phase, seed):
        return ToySource(seed, self.config.width, phase.steps * phase.batch_size)

    @functools.cache  # noqa: B019
    def _turns(self, poisoned):
        def loss(params, nets, carry, batch, keys):
            noise = 0.1 * jax.random.normal(keys.own, batch["x"].shape)
            error = jnp.mean(jnp.square(batch["x"] * (params["w"] - nets["goal"]) + noise))
            lost = {"toy_not_finite": jnp.full((), 0.25)} if poisoned else {}
            return error * (jnp.nan if poisoned else 1.0), (carry, {"twice": 2 * error, **lost})

        return (Turn("toy", loss),)

    def turns(self, phase, step, *, plain=False):
        if not plain:
            self.on_step(step + (6 if phase.name == "two" else 0))
        return self._turns(step in self.poison)

    def parts(self, phase, step):
        add = lambda nets, carry, batch, keys, made: batch["x"] + nets["goal"]
        double = lambda nets, carry, batch, keys, made: 2 * made["add"]
        return Part("add", add, 1.0), Part("double", double, 0.5)

    def validate(self, best, frozen):
        return {"validation_error": float(np.abs(best["toy"]["w"] - frozen["goal"]).mean())}, np.zeros(
            (2, 16, 16, 3), np.uint8
        )

    def finish(self, best, frozen, folder: Path, provenance):
        folder.mkdir(exist_ok=True)
        np.save(folder / "w.npy", best["toy"]["w"])


class Silent:
    """A reporter that keeps what it is told."""

    def __init__(self):
        self.lines, self.steps = [], []

    def say(self, line):
        self.lines.append(line)

    def progress(self, done, total, phase, figures):
        self.steps.append(done)


def main(output: str, *options: str) -> None:
    die_at = int(options[options.index("--die-at") + 1]) if "--die-at" in options else None

    def on_step(step):
        if step == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    config = ToyConfig()
    if "--distributed" in options:
        from longlive_jax.cli.train import join_others

        join_others()
    if "--devices" in options:
        devices = int(options[options.index("--devices") + 1])
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, streams=2 * devices, data=devices))
    stage = ToyStage(config, Path(output), on_step=on_step)
    train(stage, Path(output), Silent(), resume="--resume" in options)


if __name__ == "__main__":
    main(*sys.argv[1:])
