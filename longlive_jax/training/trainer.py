"""Runs a stage: the loop around its jitted steps, with checkpoints, figures, validation videos and exact resume.

OUTPUT/run.json            settings, and hashes of the checkpoints the stage starts from
OUTPUT/state/<step>/       what a run goes on from (`checkpointing.py`)
OUTPUT/metrics.jsonl       figures; tensorboard/ beside it
OUTPUT/validation/         videos by step
OUTPUT/checkpoint/         at the end: what the next stage and `longlive generate` take
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from longlive_jax import memory, sharding
from longlive_jax.config import to_dict
from longlive_jax.errors import UserError
from longlive_jax.training.checkpointing import Checkpoints
from longlive_jax.training.flops import count_flops, peak_flops
from longlive_jax.training.learner import Learner, TrainState
from longlive_jax.training.metrics import Metrics
from longlive_jax.training.optimizer import make_optimizer
from longlive_jax.training.runs import claim, plain
from longlive_jax.training.stages.base import Stage
from longlive_jax.training.step import Teaching, arrange, make_step, put
from longlive_jax.video import VideoWriter


@runtime_checkable
class Reporter(Protocol):
    """Who is told how a run goes."""

    def say(self, line: str) -> None: ...

    def progress(self, done: int, total: int, phase: str, figures: dict[str, float]) -> None: ...


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or a termination signal came; a checkpoint was written."""


class TimeOver(Exception):
    """`run.minutes` have passed; a checkpoint was written."""


# MARK: does it fit


def required_memory(stage: Stage) -> dict[str, int]:
    """Bytes on all devices of the mesh together, by what needs them; the most hungry phase counts."""
    learners, frozen = stage.shapes()
    run, optimizer = stage.config.run, stage.config.optimizer
    count = lambda tree: sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))
    weights = 4 * count(learners)
    averaged = 4 * count({name: params for name, params in learners.items() if stage.averages(name)})
    phases = [stage.activations(phase) for phase in stage.config.phases]
    largest = max(phases, key=lambda parts: sum(parts.values()))
    return {
        "weights": weights * run.data,
        "optimiser": weights * run.data * (2 if optimizer.b1 else 1),
        "averaged weights": averaged * run.data if optimizer.ema else 0,
        # A stream's gradient is whole on its device before it is summed; with several times, the sum is beside it.
        "gradients": weights * run.devices * (1 if run.streams == run.devices else 2),
        "frozen networks": jnp.dtype(run.dtype).itemsize * count(frozen) * run.data,
        **{name: size * run.devices for name, size in largest.items()},
    }


def check_memory(stage: Stage, mesh: Mesh | None) -> None:
    """Refuses a run that cannot fit, before anything is allocated or compiled."""
    parts, free = required_memory(stage), memory.available(mesh)
    if free is not None and sum(parts.values()) > free:
        raise UserError(
            f"training needs about {memory.describe(parts)}, but only {memory.readable(free)} are free; use more "
            "run.streams (smaller parts of a batch), remat, run.dtype bfloat16, or more devices (run.fsdp)"
        )


# MARK: the run


def train(stage: Stage, output: Path, reporter: Reporter, *, resume: bool = False) -> Path | None:
    """Runs a stage to its end, or goes on with one.

    Args:
      stage: what to train.
      output: folder of the run.
      reporter: is told how it goes.
      resume: whether `output` holds a run to go on with.

    Returns:
      The checkpoint folder.

    Raises:
      UserError: the run cannot start, or came to nothing; the last good checkpoint is named.
      Interrupted: a signal came. All is saved; `resume` goes on.
    """
    output = Path(output)
    run = stage.config.run
    mesh = None
    if run.devices > 1:
        mesh = sharding.make_mesh(data=run.data, fsdp=run.fsdp)
    check_memory(stage, mesh)
    claim(output, stage.config, stage.sources, resume=resume)
    checkpoints = Checkpoints(output / "state", keep=run.keep, say=reporter.say)
    loop = None
    try:
        loop = _Loop(stage, output, reporter, checkpoints, mesh)
        loop.run()
        return loop.finish()
    except BaseException as error:
        checkpoints.wait()
        last = checkpoints.latest_path
        note = f"last good checkpoint: {last}; go on with --resume" if last else "no checkpoint was written yet"
        if isinstance(error, UserError):
            raise UserError(f"{error} ({note})") from error
        reporter.say(note)
        if isinstance(error, TimeOver):
            return None
        raise
    finally:
        checkpoints.close()
        if loop is not None:
            loop.metrics.close()


class _Loop:
    """One process's part in a run."""

    def __init__(self, stage: Stage, output: Path, reporter: Reporter, checkpoints: Checkpoints, mesh: Mesh | None):
        self.stage, self.config, self.output, self.mesh = stage, stage.config, output, mesh
        self.reporter, self.checkpoints = reporter, checkpoints
        params, frozen = stage.parameters()
        self.frozen = put(jax.tree.map(lambda a: a.astype(self.config.run.dtype), frozen), mesh)
        self.names = tuple(params)
        self.iterator = None
        self.state = self._begin(params, self.config.phases[0])
        self.step, self.saved = 0, None
        if checkpoints.latest is not None:
            self.step = self.saved = checkpoints.latest
            self.state, self.iterator = checkpoints.restore(self.state, self._iterator_at)
            reporter.say(f"resumed at step {self.step} of {self.config.steps}")
        run = self.config.run
        self.metrics = Metrics(
            output, self.step, reporter.say, tensorboard=run.tensorboard, wandb=run.wandb, config=to_dict(self.config)
        )
        self.steps: dict[Any, Callable] = {}
        self.clock = {"data": 0.0, "save": 0.0, "validate": 0.0}
        self.pending: list[dict[str, jax.Array]] = []
        self.marked = self.started = time.monotonic()
        self.stopped_by: int | None = None
        self.flops: dict[Any, float] = {}

    # MARK: state

    def _teaching(self, phase) -> dict[str, Teaching]:
        teaching = {}
        for name in self.names:
            config = self.config.optimizer
            if not self.stage.averages(name):
                config = dataclasses.replace(config, ema=0.0)
            optimizer = make_optimizer(config, self.stage.rate(phase, name), phase.steps)
            teaching[name] = Teaching(optimizer, config)
        return teaching

    def _begin(self, params: dict[str, Any], phase) -> TrainState:
        teaching = self._teaching(phase)
        learners = {n: Learner.begin(p, teaching[n].optimizer, teaching[n].config) for n, p in params.items()}
        return put(TrainState.begin(learners, self.config.run.seed, self.stage.carry()), self.mesh)

    def _next_phase(self, phase) -> None:
        """The weights to hand on begin a new phase; key and step go on."""
        fresh = self._begin({name: learner.best for name, learner in self.state.learners.items()}, phase)
        self.state = fresh.replace(step=self.state.step, key=self.state.key)

    def _bounds(self) -> Iterator[tuple[Any, int, int]]:
        end = 0
        for phase in self.config.phases:
            start, end = end, end + phase.steps
            yield phase, start, end

    def _iterator_at(self, step: int):
        """The iterator a checkpoint's position is of; None between two phases, where a new one begins."""
        for phase, start, end in self._bounds():
            if start < step < end:
                return self.stage.data(phase)
        return None

    # MARK: the loop

    def run(self) -> None:
        with _signals(self):
            for phase, start, end in self._bounds():
                if self.step < end:
                    self._run_phase(phase, start, end)

    def _run_phase(self, phase, start: int, end: int) -> None:
        if self.step == start and start > 0:
            self._next_phase(phase)
        if self.step == start or self.iterator is None:
            self.iterator = self.stage.data(phase)
        run = self.config.run
        teaching = self._teaching(phase)
        self.marked = time.monotonic()
        while self.step < end:
            batch = self._batch()
            turns = self.stage.turns(phase, self.step - start)
            if (phase.name, turns) not in self.steps:
                self.steps[phase.name, turns] = make_step(turns, teaching, self.mesh)
                self.flops[phase.name, turns] = self._count(phase, self.step - start, batch)
            self.state, metrics = self.steps[phase.name, turns](self.state, self.frozen, batch)
            self.step += 1
            self.pending.append(metrics | {"flops": self.flops[phase.name, turns]})
            last = self.step == end
            if self.step % run.log_every == 0 or last:
                self._log(phase)
            if self.step % run.save_every == 0 or last:
                self._save()
            if last or (run.validate_every and self.step % run.validate_every == 0):
                self._validate()
            self._stop_if_asked()

    def _batch(self) -> Any:
        began = time.monotonic()
        batch = put(arrange(next(self.iterator), self.config.run.devices), self.mesh, streams=True)
        self.clock["data"] += time.monotonic() - began
        return batch

    def _count(self, phase, step: int, batch: Any) -> float:
        """Model FLOPs of a step, all streams and turns."""
        turns = self.stage.turns(phase, step, plain=True)
        nets = self.frozen | {name: learner.params for name, learner in self.state.learners.items()}
        own = lambda tree: jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[2:], a.dtype), tree)
        total = 0.0
        for turn in turns:
            grad = jax.grad(turn.loss, has_aux=True)
            key = jax.random.key(0)
            total += count_flops(grad, nets[turn.learner], nets, own(self.state.carry), own(batch), key)
        return total * self.config.run.streams

    def _log(self, phase) -> None:
        """A line of the figures since the last: means over the steps, and where the time went."""
        rows = jax.device_get(self.pending)
        names = list(dict.fromkeys(name for row in rows for name in row))
        figures = {n: float(np.mean([row[n] for row in rows if n in row])) for n in names}
        figures |= {n: float(rows[-1][n]) for n in names if "skipped" in n and n in rows[-1]}
        elapsed, n = time.monotonic() - self.marked, len(rows)
        rest = sum(self.clock.values())
        figures["seconds"] = elapsed / n
        figures |= {f"seconds_{name}": seconds / n for name, seconds in self.clock.items()}
        figures["seconds_step"] = (elapsed - rest) / n
        figures["flops_per_second"] = figures["flops"] / max(figures["seconds_step"], 1e-9)
        peak = peak_flops(jax.devices()[0].device_kind, self.config.run.dtype)
        if peak is not None:
            figures["mfu"] = figures["flops_per_second"] / (peak * self.config.run.devices)
        self.metrics.write(self.step, {"phase": phase.name, **figures})
        self.reporter.progress(self.step, self.config.steps, phase.name, figures)
        self.pending, self.marked = [], time.monotonic()
        self.clock = dict.fromkeys(self.clock, 0.0)
        in_a_row = max((v for name, v in figures.items() if name.endswith("skipped_in_a_row")), default=0)
        if in_a_row >= self.config.run.max_skips:
            raise UserError(
                f"{in_a_row:g} updates in a row were not fit (not finite, or spikes) at step {self.step}; lower the "
                "rate or optimizer.clip, or raise run.max_skips"
            )

    def _save(self) -> None:
        began = time.monotonic()
        # On a CPU arrays are written from where they are, while the next step has them overwritten: it gets others.
        state = jax.tree.map(jnp.copy, self.state) if jax.default_backend() == "cpu" else self.state
        self.checkpoints.save(self.step, state, self.iterator)
        self.saved = self.step
        self.clock["save"] += time.monotonic() - began

    def _validate(self) -> None:
        began = time.monotonic()
        best = {name: learner.best for name, learner in self.state.learners.items()}
        figures, video = self.stage.validate(best, self.frozen)
        path = self.output / "validation" / f"step-{self.step:06d}.mp4"
        try:
            with VideoWriter(path, overwrite=True) as writer:
                writer.write(video)
        except (UserError, OSError) as error:
            self.reporter.say(f"warning: {error}; training goes on")
        if figures:
            self.metrics.write(self.step, figures)
        self.clock["validate"] += time.monotonic() - began

    def _stop_if_asked(self) -> None:
        limit = self.config.run.minutes
        over = limit is not None and time.monotonic() - self.started > 60 * limit
        if not over and self.stopped_by is None:
            return
        if self.saved != self.step:
            self._save()
        self.checkpoints.wait()
        if self.step == self.config.steps:
            return
        why = f"{limit:g} minutes are over" if over else signal.Signals(self.stopped_by).name
        self.reporter.say(f"stopped at step {self.step} of {self.config.steps} ({why})")
        raise TimeOver if over else Interrupted

    def finish(self) -> Path:
        """Writes the checkpoint folder of the stage's end."""
        self.checkpoints.wait()
        if self.checkpoints.latest != self.step:
            raise UserError(f"the last checkpoint could not be written to {self.checkpoints.folder}; free some space")
        best = jax.device_get({name: learner.best for name, learner in self.state.learners.items()})
        frozen = jax.device_get(self.frozen)
        if self.config.run.dtype != "float32":
            _, frozen = self.stage.parameters()  # what is handed on is not rounded
        folder = self.output / "checkpoint"
        provenance = {
            "stage": self.stage.name, "steps": self.step, "made": time.strftime("%Y-%m-%d"),
            "sources": self.stage.sources, "settings": plain(self.config),
        }  # fmt: skip
        self.stage.finish(best, frozen, folder, provenance)
        return folder


@contextlib.contextmanager
def _signals(loop: _Loop):
    """While it runs, the first Ctrl-C or SIGTERM lets the step end and a checkpoint be written; the second kills."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = {}

    def note(number, frame):
        loop.stopped_by = number
        signal.signal(number, old[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        old[number] = signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
