"""Figures of a run: JSON lines always, TensorBoard where it is installed, Weights & Biases where it is asked for."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from longlive_jax.errors import UserError
from longlive_jax.files import whole_file
from longlive_jax.training.tensorboard import Board


class Metrics:
    """Writes figures by step.

    Args:
      folder: gets `metrics.jsonl` and `tensorboard/`.
      start: steps done; lines after it, of a run that was killed before its next checkpoint, are dropped.
      say: gets a warning when a figure cannot be written.
      tensorboard: write it, if tensorboardX can be imported; given up at the first error, which is said.
      wandb: project, or None.
      config: settings of the run, for Weights & Biases.
    """

    def __init__(
        self,
        folder: Path,
        start: int,
        say: Callable[[str], None],
        *,
        tensorboard: bool = True,
        wandb: str | None = None,
        config: dict | None = None,
    ):
        self.path = Path(folder) / "metrics.jsonl"
        self._say, self._warned = say, False
        drop_after(self.path, start)
        self._board = self._tensorboard(Path(folder) / "tensorboard", start) if tensorboard else None
        self._wandb = _wandb(wandb, folder, config) if wandb else None

    def write(self, step: int, figures: dict[str, float | str]) -> None:
        """One line. A disk that is full is said once and does not stop the run."""
        numbers = {name: value for name, value in figures.items() if not isinstance(value, str)}
        # JSON has no nan; what is not finite is null there.
        line = {n: v if isinstance(v, str) or math.isfinite(v) else None for n, v in figures.items()}
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps({"step": step, **line}) + "\n")
        except OSError as error:
            if not self._warned:
                self._say(f"warning: figures cannot be written to {self.path} ({error.strerror}); training goes on")
            self._warned = True
        if self._board is not None:
            try:
                self._board.write(step, numbers)
            except OSError as error:
                self._give_up(self._board.folder, error)
                self._board.drop()
                self._board = None
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def close(self) -> None:
        if self._board is not None:
            self._board.drop()
        if self._wandb is not None:
            self._wandb.finish()

    def _tensorboard(self, folder: Path, start: int) -> Board | None:
        try:
            return Board(folder, start)
        except ImportError:
            return None
        except OSError as error:
            self._give_up(folder, error)
            return None

    def _give_up(self, folder: Path, error: OSError) -> None:
        self._say(
            f"warning: TensorBoard files cannot be written to {folder} ({error.strerror}) and are given up; training "
            f"goes on, figures go to {self.path}"
        )


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Figures of several steps as one line: means over the steps that have them.

    But `skipped` is how many updates were left out, and `skipped_in_a_row` what it was in the end: a learner that
    learns in every fifth step is in few of the rows, and seldom in the last.
    """
    figures = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [float(row[name]) for row in rows if name in row]
        if name.endswith("skipped_in_a_row"):
            figures[name] = values[-1]
        elif name.endswith("skipped"):  # the learner's own is a count since its phase began
            figures[name] = float(sum(row.get(f"{name}_in_a_row", 0) > 0 for row in rows))
        else:
            figures[name] = sum(values) / len(values)
    return figures


def drop_after(path: Path, step: int) -> None:
    """Removes lines of later steps (and one cut off by a kill)."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text("utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    try:
        with whole_file(path) as partial:
            partial.write_text("".join(kept), "utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}); free some space") from error


def _wandb(project: str, folder: Path, config: dict | None):
    try:
        import wandb
    except ImportError:
        raise UserError(f"run.wandb is '{project}', but wandb is not installed: pip install wandb") from None
    # A run that goes on is the same run there.
    path = str(Path(folder).absolute())
    name = f"{Path(path).name}-{hashlib.sha256(path.encode()).hexdigest()[:8]}"
    return wandb.init(project=project, dir=path, config=config, id=name, resume="allow")
