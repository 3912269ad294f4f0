"""A stage's settings as a YAML file, and what two runs' settings disagree about."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from longlive_jax.config import from_dict, to_dict
from longlive_jax.errors import UserError
from longlive_jax.training.official_files import described_quirks, is_official, official_values
from longlive_jax.training.run_config import HARMLESS
from longlive_jax.training.stage_config import StageConfig
from longlive_jax.yaml_files import read_yaml


def read_config(
    path: str | Path, kind: type[StageConfig], say: Callable[[str], None] = lambda line: None
) -> StageConfig:
    """A stage's settings from a YAML file, ours or LongLive v1.0's; what it leaves out is the stage's own.

    Args:
      path: the file.
      kind: of the stage.
      say: told, of LongLive's file, each key that has no say here, and which quirks it switches on.

    Raises:
      UserError: no such file, not YAML, or a key or value that is not understood.
    """
    path = Path(path)
    values = read_yaml(path)
    if is_official(values):
        try:
            values, elsewhere = official_values({key: _number(value) for key, value in values.items()}, kind)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        for key, place in elsewhere.items():
            say(f"{path}: {key} has no say here: {place}")
        say(f"{path}: {described_quirks()}")
    return from_values(kind, values if values is not None else {}, str(path))


def from_values(kind: type[StageConfig], values: Any, where: str) -> StageConfig:
    """As `config.from_dict`, but nested tables that are given in part keep the stage's own values for the rest."""
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected a table of settings, got {values!r}")
    own, filled = {f.name: f.default for f in dataclasses.fields(kind)}, {}
    for name, value in values.items():
        given = own.get(name)
        if dataclasses.is_dataclass(given) and isinstance(value, dict):
            value = {**to_dict(given), **{k: _number(v) for k, v in value.items()}}
        elif name == "phases" and isinstance(value, list):
            value = [{k: _number(v) for k, v in p.items()} if isinstance(p, dict) else p for p in value]
        filled[name] = _number(value)
    return from_dict(kind, filled, where)


def _number(value: Any) -> Any:
    """YAML reads 2e-3 as a text (it wants 2.0e-3); everybody means the number."""
    if isinstance(value, str) and value[:1] in "+-.0123456789" and "e" in value.lower():
        try:
            return float(value)
        except ValueError:
            return value
    return value


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """What a run's settings and new ones disagree about, as "run.streams: 1, now 2"; harmless fields left out."""
    found = []
    for name in sorted(old.keys() | new.keys()):
        one, two, path = old.get(name), new.get(name), prefix + name
        if isinstance(one, dict) and isinstance(two, dict):
            found += differences(one, two, f"{path}.")
        elif one != two and not (prefix == "run." and name in HARMLESS):
            found.append(f"{path}: {one}, now {two}")
    return found
