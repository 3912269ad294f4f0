"""Where weights are: in the package, on the disk, or on the Hugging Face hub.

Downloads honour HF_HOME, HF_TOKEN and HF_HUB_OFFLINE. Of files to convert, what is in the cache is taken from there
without a look at the network. For a checkpoint of ours the hub is asked whether there is a newer one; the cache is
taken where it does not answer.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from longlive_jax.errors import UserError
from longlive_jax.tensor_files import read_index

SHIPPED = Path(__file__).parent / "weights"
"""Checkpoint folders that come with the package, by name."""

ID = r"[\w.-]+/[\w.-]+"
"""owner/name of a repository on the hub."""

WEIGHTS = (".safetensors", ".pt", ".pth", ".bin")


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
    if isinstance(source, str) and re.fullmatch(ID, source) and not path.exists():
        return _download(source)
    shipped = ", ".join(sorted(p.name for p in SHIPPED.glob("*") if p.is_dir()))
    raise UserError(
        f"checkpoint '{source}' is neither a folder, nor a hub id (owner/name), "
        f"nor shipped with the package ({shipped})"
    )


def folder(source: str | Path, patterns: Sequence[str], complete: Callable[[Path], bool]) -> Path:
    """A folder of files: a path, or the snapshot of a hub id, with the files that match the patterns.

    Args:
      source: path or "owner/name". Whatever exists on the disk, or is no id, is a path and comes back as it is.
      patterns: what to download, and no more.
      complete: whether a folder in the cache has all that is needed, so that the network need not be asked.

    Raises:
      UserError: the hub does not give the files.
    """
    if not isinstance(source, str) or Path(source).exists() or not re.fullmatch(ID, source):
        return Path(source)
    snapshot = _snapshot(source)
    return snapshot if snapshot is not None and complete(snapshot) else _download(source, patterns)


def file(source: str | Path) -> Path:
    """A file of weights: a path, "owner/name/path/to/file" on the hub, or "owner/name" with one such file in it.

    A file that is sharded is named as if it were not. What is or would be in a folder on the disk is a path and comes
    back as it is.

    Raises:
      UserError: the hub does not give the file, or the repository has none or several.
    """
    path = Path(source)
    known = re.fullmatch(rf"({ID})(?:/(.+))?", source) if isinstance(source, str) else None
    if known is None or path.exists() or source.startswith("."):
        return path
    repo, name = known[1], known[2]
    if Path(repo).exists() or (name is None and path.suffix in WEIGHTS):
        return path
    if name is None:
        name = _only_weights(repo)
    if name.endswith("adapter_model.safetensors"):
        with contextlib.suppress(UserError):  # peft notes the LoRA's alpha in it
            _file(repo, name.removesuffix("adapter_model.safetensors") + "adapter_config.json")
    if not name.endswith(".safetensors") or _cached(repo, name):
        return _file(repo, name)
    index = _cached(repo, f"{name}.index.json")
    if index is None:
        try:
            return _file(repo, name)
        except UserError as error:
            try:
                index = _file(repo, f"{name}.index.json")
            except UserError:
                raise error from None
    for shard in read_index(index)[1]:
        _file(repo, Path(name).with_name(shard).as_posix())
    return index.with_name(Path(name).name)


def origin(path: Path) -> str | None:
    """ "owner/name@revision" of a file in the hub's cache; None for any other."""
    match = re.search(r"models--([^/]+?)--([^/]+)/snapshots/([^/]+)/", path.absolute().as_posix())
    return f"{match[1]}/{match[2]}@{match[3]}" if match else None


def _only_weights(repo: str) -> str:
    """The name of the one file of weights of a repository."""
    from huggingface_hub import list_repo_files

    try:
        names = list_repo_files(repo)
    except Exception as error:  # its versions raise what the library for HTTP under them does
        snapshot = _snapshot(repo)
        if snapshot is None:
            raise _refusal(f"'{repo}'", error) from None
        names = [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*")]
    names = sorted(name for name in names if name.endswith(WEIGHTS))
    if not names:
        raise UserError(f"'{repo}' has no file of weights ({', '.join(WEIGHTS)}); choose another repository")
    if len(names) > 1:
        raise UserError(f"'{repo}' has {len(names)} files of weights; name one: {repo}/{'|'.join(names)}")
    return names[0]


def _snapshot(repo: str) -> Path | None:
    """The folder of a repository in the cache, with what was downloaded of it."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, local_files_only=True))
    except (ValueError, OSError):
        return None


def _cached(repo: str, name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(repo, name)
    except HFValidationError as error:
        raise _refusal(f"'{repo}'", error) from None
    return Path(found) if isinstance(found, str) else None


def _file(repo: str, name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return _cached(repo, name) or Path(hf_hub_download(repo, name))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise _refusal(f"'{repo}/{name}'", error) from None


def _download(repo: str, patterns: Sequence[str] = ("*.json", "*.safetensors")) -> Path:
    """A snapshot with the files that match; by default of our own format."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise _refusal(f"checkpoint '{repo}'", error) from None


def _refusal(what: str, error: Exception) -> UserError:
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return UserError(f"cannot get {what} from the hub: {reason[0]}; check the id, or give a folder")
