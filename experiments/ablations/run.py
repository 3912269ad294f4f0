"""Ablations on the sprites world: videos of the same prompts and seeds by several arms, read and written down.

    python experiments/ablations/run.py --study switch --checkpoint sprites --clips 200 --output runs/ablations
    python experiments/ablations/report.py runs/ablations

Studies: switch, memory, steps, drift, int8, tuning (this one also needs --before DIR, the checkpoint before streaming
long tuning). Each appends to OUTPUT/STUDY.jsonl, a line a clip and arm, after every batch: a run that was interrupted,
or stopped by --minutes, goes on where it was, and --clips may grow later.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from longlive_jax import checkpoint, hub
from longlive_jax.errors import UserError
from longlive_jax.pipeline import LongLivePipeline
from longlive_jax.sidecar import versions
from longlive_jax.video import contact_sheet, save_image
from records import point_records, switch_records
from studies import STUDIES, Arm, Study, clips_of

SHOWN = 4
"""The first clips, of which a strip of frames is kept to look at."""


class Results:
    """The lines of one study, appended to as they come.

    Args:
      path: the file; what a killed run left of its last line is cut off.
      setup: what all lines have in common; stands in the first line.
      made_with: stands beside it, and may differ when the run goes on.

    Raises:
      UserError: the file was made with another setup, or is not such a file.
    """

    def __init__(self, path: Path, setup: dict[str, Any], made_with: dict[str, str]):
        self.path, self.done = path, {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            data = path.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]
            if len(whole) < len(data):
                os.truncate(path, len(whole))
            first, records = parse_results(whole.decode(), path)
            if first is not None:
                differing = [name for name, value in setup.items() if first.get(name) != value]
                if differing:
                    raise UserError(
                        f"{path} holds results of another {' and '.join(differing)}; give a new --output or delete it"
                    )
                self.done = {(r["arm"], r["clip"]) for r in records}
                return
        self.done = set()
        self._append([setup | {"versions": made_with}])

    def add(self, records: list[dict[str, Any]]) -> None:
        """Appends the lines of a batch."""
        self._append(records)
        self.done |= {(r["arm"], r["clip"]) for r in records}

    def _append(self, lines: list[dict[str, Any]]) -> None:
        with open(self.path, "a") as file:
            file.write("".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())


def parse_results(text: str, path: Path) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """Setup (None in an empty file) and records of a results file."""
    try:
        lines = [json.loads(line) for line in text.splitlines()]
        known = all({"arm", "clip"} <= set(line) for line in lines[1:])
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} holds no results ({error}); delete it or give another --output") from error
    if lines and not ("study" in lines[0] and known):
        raise UserError(f"{path} holds no results of an ablation; delete it or give another --output")
    return (lines[0], lines[1:]) if lines else (None, [])


class Pipelines:
    """Pipelines of the arms, each loaded once.

    Args:
      folders: "given" and perhaps "before" -> checkpoint.
    """

    def __init__(self, folders: dict[str, str]):
        self._folders, self._loaded = folders, {}

    def missing(self, arm: Arm) -> str | None:
        """Why this arm cannot run with this version, if it cannot."""
        unknown = set(arm.load) - set(inspect.signature(LongLivePipeline.from_pretrained).parameters)
        return f"the pipeline does not take {', '.join(unknown)}" if unknown else None

    def of(self, arm: Arm) -> LongLivePipeline:
        key = (arm.checkpoint, tuple(sorted(arm.load.items())))
        if key not in self._loaded:
            self._loaded[key] = LongLivePipeline.from_pretrained(self._folders[arm.checkpoint], **arm.load)
        return self._loaded[key]


def run(
    study: Study,
    folders: dict[str, str],
    clips: int,
    output: Path,
    *,
    arms: list[str] | None = None,
    batch_size: int = 8,
    minutes: float | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Makes what is missing of a study.

    Batches go round the arms, so that a run which stops early has the same clips of each.

    Args:
      study: which.
      folders: see `Pipelines`.
      clips: how many an arm.
      output: folder of the results.
      arms: names of those to run; all by default.
      batch_size: clips made together; they do not depend on it.
      minutes: no batch is started after these.
      say: gets lines of progress.
    """
    started, chosen = time.monotonic(), choose(study, arms)
    needed = sorted({arm.checkpoint for arm in study.arms})
    for name in needed:
        if name not in folders:
            raise UserError(f"study {study.name} compares two checkpoints; give the other one as --{name} DIR")
    pipelines = Pipelines(folders)
    for arm in list(chosen):
        if reason := pipelines.missing(arm):
            say(f"{study.name}: arm '{arm.name}' is left out: {reason}")
            chosen.remove(arm)
    setup = {
        "study": study.name,
        "seconds": study.seconds,
        "points": list(study.points),
        "checkpoint": {name: checkpoint.checkpoint_hash(hub.find(folders[name])) for name in needed},
        "arms": {arm.name: {**arm.settings, **arm.load} for arm in study.arms},
    }
    results = Results(output / f"{study.name}.jsonl", setup, versions())
    for first in range(0, clips, batch_size):
        numbers = range(first, min(first + batch_size, clips))
        for group in [chosen] if study.switch_at is not None else [[arm] for arm in chosen]:
            group = [arm for arm in group if any((arm.name, i) not in results.done for i in numbers)]
            if not group:
                continue
            if minutes is not None and time.monotonic() - started > 60 * minutes:
                say(f"{study.name}: stopped after {minutes:g} minutes; the same command goes on")
                return
            began = time.monotonic()
            made = make(study, group, pipelines, list(numbers), batch_size)
            results.add([record for record, _ in made if (record["arm"], record["clip"]) not in results.done])
            keep_strips(output / "frames" / study.name, made)
            names = ", ".join(arm.name for arm in group)
            say(f"{study.name}: {names}: clips {first} to {numbers[-1]}, {time.monotonic() - began:.0f} s")


def choose(study: Study, names: list[str] | None) -> list[Arm]:
    """The arms of these names, in the study's order."""
    known = [arm.name for arm in study.arms]
    for name in names or ():
        if name not in known:
            raise UserError(f"study {study.name} has no arm '{name}'; known: {'; '.join(known)}")
    return [arm for arm in study.arms if names is None or arm.name in names]


def make(study: Study, arms: list[Arm], pipelines: Pipelines, numbers: list[int], batch_size: int):
    """Records and frames of clips; a short batch is filled up, so that nothing is compiled again."""
    clips = clips_of(study, numbers + [numbers[-1]] * (batch_size - len(numbers)))
    if study.switch_at is not None:
        made = switch_records(pipelines.of(arms[0]), study, arms, clips)
    else:
        made = [one for arm in arms for one in point_records(pipelines.of(arm), study, arm, clips)]
    return list({(record["arm"], record["clip"]): (record, frames) for record, frames in made}.values())


def keep_strips(folder: Path, made: list[tuple[dict[str, Any], np.ndarray]]) -> None:
    """A row of frames of each of the first clips."""
    for record, frames in made:
        if record["clip"] < SHOWN:
            save_image(contact_sheet(frames, len(frames), gap=1), folder / f"{record['arm']}-{record['clip']}.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", choices=list(STUDIES), required=True)
    parser.add_argument("--checkpoint", default="sprites")
    parser.add_argument("--before", help="checkpoint without streaming long tuning, for the study 'tuning'")
    parser.add_argument("--clips", type=int, default=200, help="clips an arm")
    parser.add_argument("--arms", nargs="+", help="names of the arms to run; all by default")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--minutes", type=float, help="start no batch after these")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    folders = {"given": args.checkpoint} | ({"before": args.before} if args.before else {})
    try:
        run(
            STUDIES[args.study], folders, args.clips, args.output,
            arms=args.arms, batch_size=args.batch_size, minutes=args.minutes,
        )  # fmt: skip
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
