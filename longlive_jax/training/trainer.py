"""Runs a stage: the loop around its jitted steps, with checkpoints, figures, validation videos and exact resume.

OUTPUT/run.json            settings, and hashes of the checkpoints the stage starts from
OUTPUT/state/<step>/       what a run goes on from (`checkpointing.py`)
OUTPUT/metrics.jsonl       figures; tensorboard/ beside it
OUTPUT/validation/         videos by step, and a picture of each
OUTPUT/checkpoint/         at the end: what the next stage and `longlive generate` take

Several processes (`jax.distributed`) run the same loop: each draws the streams of its own devices, all write the state,
the first writes everything else.
"""

from __future__ import annotations

import contextlib
import functools
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from longlive_jax import sharding
from longlive_jax.config import to_dict
from longlive_jax.errors import UserError
from longlive_jax.training.checkpointing import Checkpoints
from longlive_jax.training.first_state import first_state, teaching_of
from longlive_jax.training.flops import count_flops, peak_flops
from longlive_jax.training.footprint import check_memory
from longlive_jax.training.learner import TrainState
from longlive_jax.training.metrics import Metrics, summary
from longlive_jax.training.runs import claim, hold, plain, release, shorten, shortened
from longlive_jax.training.stages.base import Stage
from longlive_jax.training.step import DEVICES, Teaching, arrange, gathered, make_step, own_places, put, shardings
from longlive_jax.training.streams import axes, each, keys_of
from longlive_jax.video import VideoWriter, contact_sheet, save_image


@runtime_checkable
class Reporter(Protocol):
    """Who is told how a run goes."""

    def say(self, line: str) -> None: ...

    def progress(self, done: int, total: int, phase: str, figures: dict[str, float]) -> None: ...


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or a termination signal came; a checkpoint was written, if a step had been done."""


class TimeOver(Exception):
    """`run.minutes` have passed; a checkpoint was written."""


def train(stage: Stage, output: Path, reporter: Reporter, *, resume: bool = False) -> Path | None:
    """Runs a stage to its end, or goes on with one.

    Args:
      stage: what to train.
      output: folder of the run.
      reporter: is told how it goes.
      resume: whether `output` holds a run to go on with.

    Returns:
      The checkpoint folder; None if `run.minutes` were over before the end. Then all is saved; `resume` goes on.

    Raises:
      UserError: the run cannot start, or came to nothing; the last good checkpoint is named. An output in which
        nothing was saved is free again.
      Interrupted: a signal came. All is saved; `resume` goes on (or the same call, if no step had been done).
    """
    output = Path(output)
    run = stage.config.run
    mesh = None
    if run.devices > 1:
        mesh = sharding.make_mesh(data=run.data, fsdp=run.fsdp)
    if jax.process_count() > 1 and run.devices != jax.device_count():
        raise UserError(
            f"the mesh has {run.devices} devices, {jax.process_count()} processes have {jax.device_count()}; make "
            "run.data x run.fsdp their number"
        )
    check_memory(stage, mesh)
    held = contextlib.ExitStack()
    if jax.process_index() == 0:
        claim(output, stage.config, stage.sources, resume=resume)
        held.callback(hold(output).release)
    _together("claimed")
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
        if last is None and not resume and jax.process_index() == 0:
            release(output)
        if isinstance(error, UserError):
            raise UserError(f"{error} ({note})") from error
        reporter.say(note)
        if isinstance(error, TimeOver):
            return None
        raise
    finally:
        checkpoints.close()
        if loop is not None:
            loop._close_data()
            if loop.metrics is not None:
                loop.metrics.close()
        held.close()


class _Loop:
    """One process's part in a run."""

    def __init__(self, stage: Stage, output: Path, reporter: Reporter, checkpoints: Checkpoints, mesh: Mesh | None):
        self.stage, self.config, self.output, self.mesh = stage, stage.config, output, mesh
        self.reporter, self.checkpoints = reporter, checkpoints
        self.lengths = shortened(output)
        params, frozen = stage.parameters()
        self.frozen = put(jax.tree.map(lambda a: a.astype(self.config.run.dtype), frozen), mesh)
        self.names = tuple(params)
        self.iterator = None
        done = checkpoints.latest or 0
        under_way = [phase for phase, start, end in self._bounds() if start < done <= end]
        self.state = self._begin(params, (under_way or self.config.phases)[0])
        self.step, self.saved = 0, None
        streams = range(self.config.run.streams)
        self.mine = [s for s in streams if s % self.config.run.devices in own_places(mesh)]
        if checkpoints.latest is not None:
            self.step = self.saved = checkpoints.latest
            like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), self.state)
            self.state = None  # what is read takes its place
            self.state, self.iterator = checkpoints.restore(like, self._iterator_at)
            reporter.say(f"resumed at step {self.step} of {self.total}")
        run = self.config.run
        self.metrics = None
        if jax.process_index() == 0:
            self.metrics = Metrics(
                output, self.step, reporter.say, tensorboard=run.tensorboard, wandb=run.wandb,
                config=to_dict(self.config),
            )  # fmt: skip
        self.steps: dict[Any, Callable] = {}
        self.parts: dict[Any, Callable] = {}
        self.clock = {"data": 0.0, "save": 0.0, "validate": 0.0, "split": 0.0}
        self.split: dict[str, float] = {}
        self.compiles = False  # whether a program was made since the last figures
        self.quickest = float("inf")
        self.pending: list[dict[str, jax.Array]] = []
        self.marked = self.started = time.monotonic()
        self.stopped_by: int | None = None
        self.making_data = False  # a first phase may have clips to encode, for minutes
        self.flops: dict[Any, float] = {}

    # MARK: state

    def _teaching(self, phase) -> dict[str, Teaching]:
        return teaching_of(self.stage, phase, self.names, self._length(phase))

    def _begin(self, params: dict[str, Any], phase) -> TrainState:
        begin = functools.partial(first_state, self.stage, phase, self._teaching(phase))
        if self.mesh is None:
            return put(begin(params), None)
        # Made where it lives: no device could hold all of it.
        params = put(params, self.mesh)
        where = shardings(jax.eval_shape(begin, params), self.mesh)
        return jax.jit(begin, out_shardings=where)(params)

    def _next_phase(self, phase) -> None:
        """The weights to hand on begin a new phase; key and step go on."""
        fresh = self._begin({name: learner.best for name, learner in self.state.learners.items()}, phase)
        self.state = fresh.replace(step=self.state.step, key=self.state.key)

    def _length(self, phase) -> int:
        return self.lengths.get(phase.name, phase.steps)

    @property
    def total(self) -> int:
        """Steps of all phases."""
        return sum(self._length(phase) for phase in self.config.phases)

    def _bounds(self) -> Iterator[tuple[Any, int, int]]:
        end = 0
        for phase in self.config.phases:
            start, end = end, end + self._length(phase)
            yield phase, start, end

    def _iterator_at(self, step: int):
        """The iterator a checkpoint's position is of; None between two phases, where a new one begins."""
        for phase, start, end in self._bounds():
            if start < step < end:
                return self.stage.data(phase, step - start, self.mine)
        return None

    # MARK: the loop

    def run(self) -> None:
        with _signals(self):
            for index in range(len(self.config.phases)):
                # Asked for anew each time: a phase that turned out shorter begins the next one earlier.
                phase, start, end = list(self._bounds())[index]
                if self.step < end:
                    self._run_phase(phase, start)

    def _run_phase(self, phase, start: int) -> None:
        if self.step == start and start > 0:
            self._next_phase(phase)
        if self.step == start or self.iterator is None:
            self.making_data = True
            self.iterator = self.stage.data(phase, self.step - start, self.mine)
            self.making_data = False
        run = self.config.run
        self.marked, self.quickest = time.monotonic(), float("inf")
        while self.step < start + self._length(phase):
            batch = self._batch()
            turns = self.stage.turns(phase, self.step - start)
            if (phase.name, turns) not in self.steps:
                self.steps[phase.name, turns] = make_step(turns, self._teaching(phase), self.mesh)
                self.compiles = True
                self.flops[phase.name, turns] = self._count(phase, self.step - start, batch)
            if run.split_every and self.step % run.split_every == 0:
                self._time_parts(phase, self.step - start, batch)
            self.state, metrics = self.steps[phase.name, turns](self.state, self.frozen, batch)
            self.step += 1
            self.pending.append(metrics | {"flops": self.flops[phase.name, turns]})
            last = self.step == start + self._length(phase)
            if self.step % run.log_every == 0 or last:
                self._fit(phase, start, self._log(phase))
            if self.step % run.save_every == 0 or last:
                self._save()
            if last or (run.validate_every and self.step % run.validate_every == 0):
                self._validate()
            self._stop_if_asked()
        self._close_data()

    def _close_data(self) -> None:
        if self.iterator is not None and hasattr(self.iterator, "close"):
            self.iterator.close()

    def _fit(self, phase, start: int, seconds: float) -> None:
        """Makes the phase shorter if at so many seconds a step it would take longer than its `minutes`."""
        done, length = self.step - start, self._length(phase)
        compiled, self.compiles = self.compiles, False
        if phase.minutes is None or compiled or (done > max(1, length // 10) and self.quickest < float("inf")):
            return
        # The quickest so far: a pause, or a neighbour on the same cores, must not cost the phase its steps.
        self.quickest = seconds = min(seconds, self.quickest)
        least = max(done, self.config.optimizer.warmup) + 1
        affordable = 60 * phase.minutes / seconds
        # A little over is let go: another schedule is another program to compile.
        steps = length if affordable > 0.95 * length else min(length, max(least, int(affordable)))
        if jax.process_count() > 1:
            steps = int(multihost_utils.broadcast_one_to_all(np.int32(steps)))
        if steps == length:
            return
        if jax.process_index() == 0:
            shorten(self.output, phase.name, steps)
        self.lengths[phase.name] = steps
        self.steps = {key: step for key, step in self.steps.items() if key[0] != phase.name}  # another schedule
        self.reporter.say(
            f"phase {phase.name}: {steps} steps instead of {length}, for {phase.minutes:g} minutes at "
            f"{seconds:.3g} s a step"
        )

    def _batch(self) -> Any:
        began = time.monotonic()
        batch = self.stage.parted(next(self.iterator))
        batch = put(arrange(batch, len(own_places(self.mesh))), self.mesh, streams=True)
        self.clock["data"] += time.monotonic() - began
        return batch

    def _time_parts(self, phase, step: int, batch: Any) -> None:
        """Runs the parts of a step one by one and notes what each takes, in seconds an average step.

        Inside the step they are one program, where nobody can time them. Each is compiled by itself here and run on
        the first streams, one a device, as often as there are such rows of streams; so their sum is not quite the
        step's time: what the compiler joins across parts, and the optimiser, are missing.
        """
        jax.block_until_ready(self.state)  # steps that still run are nobody's part
        began = time.monotonic()
        nets = self.frozen | {name: learner.params for name, learner in self.state.learners.items()}
        devices, many = self.config.run.devices, self.config.run.devices > 1
        rows = self.config.run.streams // devices
        keys = keys_of(jax.random.key(self.step), (rows, devices))
        first = [each(lambda a: a[0] if many else a[0, 0], tree) for tree in (self.state.carry, batch, keys)]
        made: dict[str, Any] = {}
        along: dict[str, Any] = {}
        for part in self.stage.parts(phase, step):
            name = (phase.name, part.function)
            new = name not in self.parts
            if new:
                ins = None, *(axes(tree) for tree in first), dict(along)
                over = functools.partial(jax.vmap, in_axes=ins, out_axes=part.axes, spmd_axis_name=DEVICES)
                self.parts[name] = jax.jit(over(part.function) if many else part.function)
            run = lambda name=name: jax.block_until_ready(self.parts[name](nets, *first, made))
            with sharding.using(self.mesh), sharding.taken(*(DEVICES if many else ())):
                if new:
                    run()
                clock = time.monotonic()
                made[part.name] = run()
                along[part.name] = part.axes
            self.split[f"seconds_{part.name}"] = (time.monotonic() - clock) * rows * part.times
        self.clock["split"] += time.monotonic() - began

    def _count(self, phase, step: int, batch: Any) -> float:
        """Model FLOPs of a step, all streams and turns."""
        turns = self.stage.turns(phase, step, plain=True)
        nets = self.frozen | {name: learner.params for name, learner in self.state.learners.items()}
        one = lambda tree: each(lambda a: jax.ShapeDtypeStruct(a.shape[2:], a.dtype), tree)
        total = 0.0
        for turn in turns:
            grad = jax.grad(turn.loss, has_aux=True)
            keys = keys_of(jax.random.key(0))
            args = nets[turn.learner], nets, one(self.state.carry), one(batch), keys
            total += count_flops(grad, *args, expected=turn.expected)
        return total * self.config.run.streams

    def _log(self, phase) -> float:
        """A line of the figures since the last (`metrics.summary`), and where the time went.

        Returns:
          Seconds a step.
        """
        rows = jax.device_get(self.pending)
        figures = summary(rows)
        elapsed, n = time.monotonic() - self.marked, len(rows)
        # Not the wait for data: the device computes in it.
        rest = sum(seconds for name, seconds in self.clock.items() if name != "data")
        figures["seconds"] = elapsed / n
        figures |= self.split
        figures |= {f"seconds_{name}": seconds / n for name, seconds in self.clock.items()}
        figures["seconds_step"] = (elapsed - rest) / n
        figures["flops_per_second"] = figures["flops"] / max(figures["seconds_step"], 1e-9)
        given = self.config.run.device_tflops
        peak = 1e12 * given if given else peak_flops(jax.devices()[0].device_kind, self.config.run.dtype)
        if peak is not None:
            figures["mfu"] = figures["flops_per_second"] / (peak * self.config.run.devices)
        if self.metrics is not None:
            self.metrics.write(self.step, {"phase": phase.name, **figures})
        self.reporter.progress(self.step, self.total, phase.name, figures)
        self.pending, self.marked, self.split = [], time.monotonic(), {}
        self.clock = dict.fromkeys(self.clock, 0.0)
        for name, share in figures.items():
            if name.endswith("not_finite") and share > 0:
                self.reporter.say(f"warning: {name} is {share:.3g}: nothing is learnt from so much; training goes on")
        in_a_row = max((v for name, v in figures.items() if name.endswith("skipped_in_a_row")), default=0)
        if in_a_row >= self.config.run.max_skips:
            raise UserError(
                f"{in_a_row:g} updates in a row were not fit (not finite, or spikes) at step {self.step}; lower the "
                "rate or optimizer.clip, or raise run.max_skips"
            )
        return figures["seconds_step"]

    def _save(self) -> None:
        jax.block_until_ready(self.state)  # steps that still run are no part of saving
        began = time.monotonic()
        # On a CPU arrays are written from where they are, while the next step has them overwritten: it gets others.
        state = jax.tree.map(jnp.copy, self.state) if jax.default_backend() == "cpu" else self.state
        self.checkpoints.save(self.step, state, self.iterator)
        self.saved = self.step
        self.clock["save"] += time.monotonic() - began

    def _validate(self) -> None:
        jax.block_until_ready(self.state)
        began = time.monotonic()
        best = {name: learner.best for name, learner in self.state.learners.items()}
        if jax.process_count() > 1:
            best, frozen = gathered((best, self._handed_on), self.mesh)
        else:
            frozen = self.frozen
        if jax.process_index() == 0:
            try:
                self._write_validation(*self.stage.validate(best, frozen))
            except UserError as error:  # no memory for it, mostly
                self.reporter.say(f"warning: no validation video ({error}); training goes on")
        self.clock["validate"] += time.monotonic() - began

    def _write_validation(self, figures: dict[str, float], video: np.ndarray) -> None:
        path = self.output / "validation" / f"step-{self.step:06d}.mp4"
        try:
            with VideoWriter(path, overwrite=True) as writer:
                writer.write(video)
        except (UserError, OSError) as error:
            self.reporter.say(f"warning: {error}; training goes on")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            moments = np.linspace(0, len(video) - 1, 4).astype(int)
            save_image(contact_sheet(video[moments], 4), path.with_suffix(".png"))
        except (UserError, OSError) as error:
            self.reporter.say(f"warning: {error}; training goes on")
        if figures:
            self.metrics.write(self.step, figures)

    def _stop_if_asked(self) -> None:
        limit = self.config.run.minutes
        over = limit is not None and time.monotonic() - self.started > 60 * limit
        number = self.stopped_by or 0
        if jax.process_count() > 1:  # all or none; asking costs, so not in every step
            if self.step % self.config.run.log_every:
                return
            asked = multihost_utils.process_allgather(np.array([over, number], np.int32))
            over, number = bool(asked[..., 0].any()), int(asked[..., 1].max())
        if not over and not number:
            return
        if self.saved != self.step:
            self._save()
        self.checkpoints.wait()
        if self.checkpoints.latest != self.step:  # it could not be written: once more
            self._save()
            self.checkpoints.wait()
        if self.step == self.total:
            return
        why = f"{limit:g} minutes are over" if over else signal.Signals(number).name
        self.reporter.say(f"stopped at step {self.step} of {self.total} ({why})")
        raise TimeOver if over else Interrupted

    @property
    def _handed_on(self) -> dict[str, Any]:
        """Frozen networks but the teacher, which is the largest and in no checkpoint."""
        return {name: params for name, params in self.frozen.items() if name != "teacher"}

    def finish(self) -> Path:
        """Writes the checkpoint folder of the stage's end."""
        self.checkpoints.wait()
        if self.checkpoints.latest != self.step:
            raise UserError(f"the last checkpoint could not be written to {self.checkpoints.folder}; free some space")
        best = gathered({name: learner.best for name, learner in self.state.learners.items()}, self.mesh)
        frozen = gathered(self._handed_on, self.mesh)
        if self.config.run.dtype != "float32":
            _, frozen = self.stage.parameters()  # what is handed on is not rounded
        folder = self.output / "checkpoint"
        provenance = {
            "stage": self.stage.name, "steps": self.step, "made": time.strftime("%Y-%m-%d"),
            "sources": self.stage.sources, "settings": plain(self.config),
        }  # fmt: skip
        if jax.process_index() == 0:
            self.stage.finish(best, frozen, folder, provenance)
        _together("finished")
        return folder


def _together(name: str) -> None:
    """Waits for all processes."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def _signals(loop: _Loop):
    """While it runs, the first Ctrl-C or SIGTERM lets the step end and a checkpoint be written; the second kills.

    While data are made the first ends that at once: no step has been done since the last checkpoint.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = {}

    def note(number, frame):
        loop.stopped_by = number
        signal.signal(number, old[number])
        if loop.making_data:
            raise Interrupted

    for number in (signal.SIGINT, signal.SIGTERM):
        old[number] = signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
