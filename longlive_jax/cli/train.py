"""`longlive train`: a stage of training from its settings, or on with a run."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from longlive_jax.compilation import keep_compiled_programs
from longlive_jax.errors import UserError
from longlive_jax.training.config_files import read_config
from longlive_jax.training.stage_config import STAGES, StageConfig

UNFINISHED = 3
"""Exit status of a run that ended in time, saved, before its last step: in a script, what needs its checkpoint must not
begin."""


@dataclasses.dataclass
class StageRun:
    """One stage, run. Exits 3 when `run.minutes` were over before its end.

    Attributes:
      output: folder of the run; the checkpoint that the stage ends with is its `checkpoint/`.
      settings: of the stage; any of them, before or after a file's.
      config: YAML file of settings, ours or a training file of LongLive v1.0; what it leaves out is the stage's own.
      smoke: the same stage at tiny sizes, to see it run through.
      resume: go on with the run in output, with the settings that it began with.
      check: say what it needs of each device's memory, by shapes alone, and stop; no checkpoint is needed.
      distributed: this is one of several processes (jax.distributed; each is told of the others by its cluster, or by
        JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID).
    """

    output: Path
    settings: Annotated[StageConfig, tyro.conf.arg(name="")]
    config: Path | None = None
    smoke: bool = False
    resume: bool = False
    check: bool = False
    distributed: bool = False

    def run(self) -> int:
        keep_compiled_programs()
        # Imported here: `--help` and bad input must not wait for jax.
        try:
            from longlive_jax.checkpoint import load_provenance
            from longlive_jax.training.footprint import described_memory
            from longlive_jax.training.stages import stage_of
            from longlive_jax.training.trainer import train
        except ModuleNotFoundError as error:
            raise UserError(f"training needs {error.name}: pip install 'longlive-jax[train]'") from None
        if self.check:
            print(described_memory(stage_of(self.settings, self.output, lambda line: None)))
            return 0
        if self.smoke:
            import jax

            # What runs twice need not be fast.
            jax.config.update("jax_disable_most_optimizations", True)
        first = join_others() if self.distributed else True
        with ConsoleReporter(self.settings.steps, quiet=not first) as reporter:
            stage = stage_of(self.settings, self.output, reporter.say)
            folder = train(stage, self.output, reporter, resume=self.resume)
        if folder is None:
            return UNFINISHED
        if first:
            steps = load_provenance(folder)["steps"]
            print(f"{folder}: stage {self.settings.stage} is done after {steps} steps")
        return 0


def join_others() -> bool:
    """Makes this process one of several; whether it is the first."""
    import jax

    number = {
        argument: int(os.environ[name])
        for argument, name in (("num_processes", "JAX_NUM_PROCESSES"), ("process_id", "JAX_PROCESS_ID"))
        if name in os.environ
    }
    try:
        jax.distributed.initialize(**number)
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"the other processes cannot be joined ({reason}); set JAX_COORDINATOR_ADDRESS (host:port of the first), "
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID, or leave --distributed out"
        ) from error
    return jax.process_index() == 0


def train_command(args: Sequence[str]) -> Any:
    """The type that tyro makes the command's options from: every stage with its settings as defaults, those of the
    stage that `args` name being what --config, --smoke or --resume say."""
    stages = []
    for name, kind in STAGES.items():
        own = kind()
        if list(args[:2]) == ["train", name]:
            own = _defaults(kind, args[2:])
        fields = [("settings", Annotated[kind, tyro.conf.arg(name="")], dataclasses.field(default=own))]
        run = dataclasses.make_dataclass(f"{name.capitalize()}Run", fields, bases=(StageRun,), kw_only=True)
        run.__doc__ = StageRun.__doc__
        summary = kind.__doc__.split("\n\n")[0]
        stages.append(Annotated[run, tyro.conf.subcommand(name, description=summary)])
    union = stages[0]
    for stage in stages[1:]:
        union |= stage
    return dataclasses.make_dataclass(
        "Train", [("stage", Annotated[union, tyro.conf.arg(name="")])],
        namespace={"__doc__": "Train a stage: vae, teacher, ar, init or long.", "run": lambda self: self.stage.run()},
    )  # fmt: skip


def _defaults(kind: type[StageConfig], args: Sequence[str]) -> StageConfig:
    """What the command line's other options change."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument("--output")
    for flag in ("--smoke", "--resume", "--check", "--distributed"):
        parser.add_argument(flag, action="store_true")
    try:
        known, _ = parser.parse_known_args(args)
    except SystemExit:  # an option without its value; tyro says it better
        return kind()
    if known.resume and known.output and not known.config:
        from longlive_jax.training.runs import stored_config

        return stored_config(Path(known.output), kind)
    say = lambda line: print(line, file=sys.stderr)
    settings = read_config(known.config, kind, say) if known.config else kind()
    return settings.shrunk() if known.smoke else settings


class ConsoleReporter:
    """Progress on standard error: a bar with the time left on a terminal, a line at a time in a log."""

    def __init__(self, total: int, *, quiet: bool = False):
        self._console = Console(stderr=True, quiet=quiet)
        columns = TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[note]}")
        self._bar = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._bar.add_task("starting", total=total, note="compiling")
        self._first: tuple[float, int] | None = None

    def __enter__(self) -> ConsoleReporter:
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def say(self, line: str) -> None:
        self._console.print(line, markup=False, emoji=False, highlight=False, soft_wrap=True)

    def progress(self, done: int, total: int, phase: str, figures: dict[str, float]) -> None:
        now = time.monotonic()
        # Counted from the first line on: compilation is not a step.
        self._first = self._first or (now, done)
        began, before = self._first
        left = (
            (now - began) / (done - before) * (total - done) if done > before else figures["seconds"] * (total - done)
        )
        losses = ", ".join(f"{n} {v:.4g}" for n, v in figures.items() if n.endswith("loss"))
        note = f"step {done} of {total}, {losses}, {figures['seconds']:.3g} s a step, {duration(left)} left"
        self._bar.update(self._task, completed=done, total=total, description=phase, note=note)
        if not self._console.is_terminal:
            self.say(f"{phase}: {note}")


def duration(seconds: float) -> str:
    """ "2 h 05 min", "3 min 10 s", "12 s"."""
    seconds = round(seconds)
    hours, minutes = seconds // 3600, seconds // 60 % 60
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {seconds % 60:02} s" if minutes else f"{seconds} s"
