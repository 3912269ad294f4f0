"""FILE.json beside FILE.mp4: everything that made the video, so that it can be made again.

Layout (JSON object, keys in this order):

    format      "longlive video"
    prompts     list of texts, first to last
    switches    {"asked_seconds": [..], "applied_seconds": [..]}, one fewer than prompts each
    seconds     length in whole blocks, with which the same video is made again
    seed        seed of the noise
    settings    every other setting, as the caller names them
    versions    see `versions`
    checkpoint  what identifies the weights: name, hash
    timings     seconds and rates measured
"""

import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from longlive_jax.errors import UserError
from longlive_jax.files import whole_file
from longlive_jax.prompts import Schedule
from longlive_jax.video import require_free

FORMAT = "longlive video"
SHAPES = {
    "prompts": list,
    "switches": dict,
    "seconds": (int, float),
    "seed": int,
    "settings": dict,
    "versions": dict,
    "checkpoint": dict,
    "timings": dict,
}


def sidecar_path(video: str | os.PathLike) -> Path:
    """Where the record of `video` stands: clip.mp4 -> clip.json."""
    return Path(video).with_suffix(".json")


def versions() -> dict[str, str | int]:
    """What ran: versions of Python and the libraries that decide the numbers, JAX's backend and its devices."""
    import jax  # here, so that reading a record needs no accelerator

    found = {"python": platform.python_version()}
    for name in ("longlive-jax", "jax", "jaxlib", "flax", "numpy"):
        try:
            found[name.replace("-", "_")] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # longlive_jax run from a folder that was never installed
            found[name.replace("-", "_")] = "not installed"
    devices = jax.devices()
    return found | {"backend": jax.default_backend(), "device": devices[0].device_kind, "devices": len(devices)}


def make_record(
    *,
    prompts: Sequence[str],
    asked_seconds: Sequence[float],
    applied_seconds: Sequence[float],
    seconds: float,
    seed: int,
    settings: Mapping[str, Any],
    checkpoint: Mapping[str, Any],
    timings: Mapping[str, Any],
) -> dict[str, Any]:
    """The record of one video, as the module's docstring lays it out, with this machine's `versions`.

    Raises:
      ValueError: the switch times are not one fewer than the prompts.
    """
    if not len(asked_seconds) == len(applied_seconds) == len(prompts) - 1:
        raise ValueError(f"{len(prompts)} prompts, but {len(asked_seconds)} and {len(applied_seconds)} switch times")
    return {
        "format": FORMAT,
        "prompts": list(prompts),
        "switches": {"asked_seconds": list(asked_seconds), "applied_seconds": list(applied_seconds)},
        "seconds": seconds,
        "seed": seed,
        "settings": dict(settings),
        "versions": versions(),
        "checkpoint": dict(checkpoint),
        "timings": dict(timings),
    }


def write_sidecar(video: str | os.PathLike, record: Mapping[str, Any], *, overwrite: bool = False) -> Path:
    """Writes `record` beside `video` and returns its path; readers see the old file or the whole new one.

    Paths, dtypes, tuples and numpy scalars and arrays in the record become plain JSON.

    Raises:
      UserError: the file exists and `overwrite` is false, or the folder cannot be written.
    """
    path = require_free(sidecar_path(video), overwrite)
    text = json.dumps(record, indent=2, ensure_ascii=False, default=_plain) + "\n"
    try:
        with whole_file(path) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; free some space or give another --output") from error
    return path


def _plain(value: Any) -> Any:
    """JSON for what `json` does not know."""
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, (type, np.dtype)):
        return np.dtype(value).name
    raise TypeError(f"{type(value).__name__} has no place in a sidecar")


def load_sidecar(path: str | os.PathLike) -> dict[str, Any]:
    """Reads a record written by `write_sidecar`; the path of the video itself is taken for that of its record.

    Raises:
      UserError: it is missing, is no JSON, or is no record of a video.
    """
    path = Path(path)
    if path.suffix.lower() == ".mp4":
        path = sidecar_path(path)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; --from takes the .json that stands beside a generated .mp4") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text; --from takes the .json that stands beside a generated .mp4") from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}:{error.lineno}: not valid JSON ({error.msg}); restore the file as it was written"
        ) from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise UserError(f'{path} is not the record of a longlive video (no "format": "{FORMAT}"); check the path')
    for key, kind in SHAPES.items():
        if not isinstance(record.get(key), kind) or isinstance(record[key], bool):
            state = "missing" if key not in record else "not of the right kind"
            raise UserError(f"{path}: {key!r} is {state}; restore the file as it was written")
    record_schedule(record, path)
    return record


def record_schedule(record: Mapping[str, Any], path: str | os.PathLike = "the record") -> Schedule:
    """The schedule (prompts, switch times asked, length, seed) with which the video is made again.

    Raises:
      UserError: naming `path`, if they do not fit together.
    """
    try:
        asked = record["switches"].get("asked_seconds")
        if not isinstance(asked, list):
            raise UserError("'switches' has no list 'asked_seconds'; restore the file as it was written")
        return Schedule(tuple(record["prompts"]), tuple(asked), record["seconds"], record["seed"])
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
