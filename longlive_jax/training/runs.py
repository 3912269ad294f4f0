"""The folder of a run: what it began with, and who may go on with it."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from longlive_jax.config import from_dict, to_dict
from longlive_jax.errors import UserError
from longlive_jax.files import whole_file
from longlive_jax.sidecar import versions
from longlive_jax.training.config_files import differences
from longlive_jax.training.stage_config import StageConfig


def stored_config(output: Path, kind: type[StageConfig]) -> StageConfig:
    """The settings that the run in `output` began with.

    Raises:
      UserError: there is no run, or it is of another stage.
    """
    path = Path(output) / "run.json"
    try:
        values = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{output} holds no run to resume; leave --resume out to start one") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}); start again in another --output") from None
    if values.get("stage") != kind.stage:
        raise UserError(f"{output} holds a run of stage {values.get('stage')}, not {kind.stage}; give its own --output")
    return from_dict(kind, values["config"], str(path))


def shortened(output: Path) -> dict[str, int]:
    """Steps of the phases that were made shorter than their settings, to end in time."""
    return json.loads((Path(output) / "run.json").read_text("utf-8")).get("shortened", {})


def shorten(output: Path, phase: str, steps: int) -> None:
    """Notes that a phase has fewer steps: a run that goes on must follow the same learning rate.

    Raises:
      UserError: it cannot be written; without the note the run could not go on as it began.
    """
    path = Path(output) / "run.json"
    try:
        values = json.loads(path.read_text("utf-8"))
        _write(path, values | {"shortened": values.get("shortened", {}) | {phase: steps}})
    except OSError as error:
        raise UserError(
            f"cannot note in {path} that phase {phase} has {steps} steps ({error.strerror}); free some space"
        ) from error


def _write(path: Path, values: dict[str, Any]) -> None:
    with whole_file(path) as partial:
        partial.write_text(json.dumps(values, indent=1) + "\n", "utf-8")


def claim(output: Path, config: StageConfig, sources: dict[str, str], *, resume: bool) -> None:
    """Makes the folder of a new run, or checks that the one there is the run to go on with.

    Raises:
      UserError: the folder holds another run, cannot be written, or what this one began with has changed.
    """
    path = Path(output) / "run.json"
    if resume:
        old = stored_config(output, type(config))
        changed = differences(plain(old), plain(config))
        stored = json.loads(path.read_text("utf-8"))
        began_with = stored["sources"]
        changed += [
            f"the checkpoint given as {role} is another one"
            for role in sorted(began_with.keys() | sources.keys())
            if began_with.get(role) != sources.get(role)
        ]
        prompts = stored.get("prompts", {})  # runs of before have no such hashes
        changed += [
            f"the prompts in {name} are others"
            for name, value in _hashes(config).items()
            if prompts.get(name, value) != value
        ]
        if changed:
            raise UserError(
                f"{output} goes on only as it began, but {'; '.join(changed)}; leave these as they were, or start "
                "a run in another --output with --init"
            )
        return
    if path.exists():
        stored_config(output, type(config))  # one of another stage cannot be gone on with
        raise UserError(f"{output} holds a run and is kept; go on with it by --resume, or choose another --output")
    values = {
        "stage": config.stage, "config": to_dict(config), "sources": sources, "prompts": _hashes(config),
        "versions": versions(),
    }  # fmt: skip
    try:
        output.mkdir(parents=True, exist_ok=True)
        _write(path, values)
    except OSError as error:
        raise UserError(f"cannot write {output} ({error.strerror}); give another --output") from error


def hold(output: Path) -> FileLock:
    """Keeps other processes out of the folder of a run until it is released, or this process has ended in any way.

    Raises:
      UserError: another process holds it; both would write the same checkpoints.
    """
    lock = FileLock(output / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"another process is at work on the run in {output}; let it end, stop it, or choose another --output"
        ) from None
    except (OSError, NotImplementedError):
        pass  # some network file systems have no locks
    return lock


def release(output: Path) -> None:
    """Undoes `claim` for a run that failed before it saved anything: its folder is free for a corrected one."""
    with contextlib.suppress(OSError):
        (Path(output) / "run.json").unlink()


def _hashes(config: StageConfig) -> dict[str, str]:
    """sha256 of the prompt files of a stage that has any, by their names in the settings."""
    found = {}
    for name in getattr(config, "prompts", ()):
        try:
            found[name] = hashlib.sha256(Path(name).read_bytes()).hexdigest()
        except OSError as error:
            raise UserError(f"cannot read {name} ({error.strerror}); check --prompts") from error
    return found


def plain(config: StageConfig) -> dict[str, Any]:
    """As JSON gives it back: tuples are lists."""
    return json.loads(json.dumps(to_dict(config)))
