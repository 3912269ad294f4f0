"""Finding a checkpoint: folders, shipped names, and hub ids from a cache on the disk. Nothing goes to the network."""

import os
import subprocess
import sys

import pytest

from longlive_jax import hub
from longlive_jax.errors import UserError

FIND = """
import sys
from longlive_jax import hub
from longlive_jax.errors import UserError
try:
    print(hub.find(sys.argv[1]))
except UserError as error:
    print("refused:", error)
"""


def make_checkpoint(folder):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A package with one checkpoint in it, and an empty current folder."""
    weights = tmp_path / "package" / "weights"
    make_checkpoint(weights / "sprites")
    monkeypatch.setattr(hub, "SHIPPED", weights)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return weights


def test_a_folder(shipped, tmp_path):
    folder = make_checkpoint(tmp_path / "mine")
    assert hub.find(folder) == hub.find(str(folder)) == folder


def test_a_shipped_name(shipped):
    assert hub.find("sprites") == shipped / "sprites"


def test_a_checkpoint_here_goes_before_a_shipped_one(shipped, tmp_path):
    make_checkpoint(tmp_path / "here" / "sprites")
    assert hub.find("sprites").resolve() == tmp_path / "here" / "sprites"


def test_any_other_folder_here_does_not(shipped, tmp_path):
    (tmp_path / "here" / "sprites").mkdir()
    assert hub.find("sprites") == shipped / "sprites"


@pytest.mark.parametrize("source", ["sprits", "a/b/c", "/nowhere/at/all", "owner/na me"])
def test_what_is_nowhere(shipped, source):
    with pytest.raises(
        UserError, match=r"neither a folder, nor a hub id .*, nor shipped with the package \(sprites\)$"
    ):
        hub.find(source)


def test_a_file_is_no_checkpoint(shipped, tmp_path):
    (tmp_path / "here" / "a").mkdir()
    (tmp_path / "here" / "a" / "model.pt").write_text("")
    with pytest.raises(UserError, match="^checkpoint 'a/model.pt' is neither a folder"):
        hub.find("a/model.pt")


def find_offline(source: str, home) -> str:
    """What a new process without network finds, since the hub's library reads its variables once, at the start."""
    variables = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | variables
    done = subprocess.run(
        [sys.executable, "-c", FIND, source], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_a_hub_id_from_the_users_cache(tmp_path):
    revision = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "hub" / "models--owner--tiny"
    snapshot = make_checkpoint(repo / "snapshots" / revision)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(revision)
    assert find_offline("owner/tiny", tmp_path) == str(snapshot)


def test_a_hub_id_that_is_not_in_the_cache_and_no_network(tmp_path):
    answer = find_offline("owner/none", tmp_path)
    assert answer.startswith("refused: cannot get checkpoint 'owner/none' from the hub: ")
    assert answer.endswith("; check the id, or give a folder")
    assert len(answer.splitlines()) == 1


def test_an_id_that_the_hub_cannot_have(tmp_path):
    answer = find_offline("owner/-none", tmp_path)
    assert answer.startswith("refused: cannot get checkpoint 'owner/-none'") and len(answer.splitlines()) == 1
