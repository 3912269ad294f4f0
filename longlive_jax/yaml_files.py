"""Settings from YAML files given to --config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from longlive_jax.errors import UserError


def read_yaml(path: Path) -> Any:
    """What a YAML file says; None for an empty one.

    Raises:
      UserError: no such file, or no YAML.
    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path given to --config") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        raise UserError(f"{path}{f':{where.line + 1}' if where else ''}: not valid YAML") from None
