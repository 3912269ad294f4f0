"""Settings from JSON files that came from elsewhere: whatever is wrong with one is a line that names it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from longlive_jax.errors import UserError

MAX_BYTES = 64 * 2**20
"""The index of a thousand shards has a few MB. A larger file is no settings and is not read."""

MAX_DEPTH = 32
"""Ours are nested 5 deep; what is nested without end would only fail later, where it is compared or printed."""


def read_json(path: Path, advice: str = "copy or download it again") -> dict[str, Any]:
    """The settings in a JSON file.

    Args:
      path: the file.
      advice: what to do about a broken one, the end of each message.

    Raises:
      UserError: it cannot be read, is larger than `MAX_BYTES`, or is no JSON table.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}; {advice}") from error
    if len(data) > MAX_BYTES:
        raise UserError(f"{path} is larger than {MAX_BYTES // 2**20} MB, which no settings are; {advice}")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not valid JSON ({error}); {advice}") from error
    return parse_json(text, str(path), advice)


def parse_json(text: str, where: str, advice: str = "copy or download it again") -> dict[str, Any]:
    """The settings in a JSON text; `where` names it in messages. Raises UserError if it is no JSON table."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON ({error}); {advice}") from error
    if not isinstance(values, dict):
        raise UserError(f"{where} holds no settings; {advice}")
    level, depth = [values], 0
    while level := [child for node in level for child in (node.values() if isinstance(node, dict) else node)
                    if isinstance(child, (dict, list))]:  # fmt: skip
        depth += 1
        if depth > MAX_DEPTH:
            raise UserError(f"{where} is nested more than {MAX_DEPTH} deep, which no settings are; {advice}")
    if "\\ud" in text.lower():  # an escape may be half of a character, which no file of ours could hold again
        try:
            json.dumps(values, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(f"{where} has half a character in a text ({error}); {advice}") from error
    return values
