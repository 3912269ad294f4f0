"""Where a checkpoint is: in the package, in a folder, or on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from longlive_jax.errors import UserError

SHIPPED = Path(__file__).parent / "weights"
"""Checkpoint folders that come with the package, by name."""


def find(source: str | Path) -> Path:
    """The folder of a checkpoint: a path, a shipped one by name, or a hub id "owner/name" (downloaded or from cache).

    A folder without config.json does not hide a shipped checkpoint of its name.

    Raises:
      UserError: it is nowhere.
    """
    path = Path(source)
    if not (path / "config.json").exists() and (SHIPPED / path / "config.json").exists():
        return SHIPPED / path
    if path.is_dir():
        return path
    if isinstance(source, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not path.exists():
        return _download(source)
    shipped = ", ".join(sorted(p.name for p in SHIPPED.glob("*") if p.is_dir()))
    raise UserError(
        f"checkpoint '{source}' is neither a folder, nor a hub id (owner/name), "
        f"nor shipped with the package ({shipped})"
    )


def _download(repo: str) -> Path:
    """A snapshot of our own format; honours HF_HOME, HF_TOKEN, HF_HUB_OFFLINE and what is on disk already."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, allow_patterns=["*.json", "*.safetensors"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"cannot get checkpoint '{repo}' from the hub: {reason}; check the id, or give a folder"
        ) from None
