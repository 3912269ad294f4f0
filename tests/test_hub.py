"""Finding a checkpoint: folders, shipped names, and hub ids from a cache on the disk. Nothing leaves this machine."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

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


def test_the_token_is_sent_to_the_hub(tmp_path):
    """HF_TOKEN goes with the requests for the model, and a refusal is a line; the hub is a server of this test."""
    seen = []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append((self.path, self.headers.get("authorization")))
            self.send_error(403)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        variables = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_TOKEN": "hf_secret"}
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
        own = inherited | variables | {"HF_HOME": str(tmp_path)}
        command = [sys.executable, "-c", FIND, "owner/private"]
        done = subprocess.run(command, env=own, capture_output=True, text=True, check=True)
        server.shutdown()
    assert done.stdout.startswith("refused: cannot get checkpoint 'owner/private' from the hub: ")
    assert len(done.stdout.strip().splitlines()) == 1
    assert "hf_secret" not in done.stdout
    assert {token for path, token in seen if "owner/private" in path} == {"Bearer hf_secret"}


# MARK: files of other people


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """The cache of `hub_cache`, an empty current folder, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "home/hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def put(hub_cache, tmp_path, repo, *names):
    for name in names:
        (tmp_path / "file").write_text(name)
        snapshot = hub_cache(repo, tmp_path / "file", name)
    return snapshot


@pytest.mark.parametrize(
    "path",
    ["lora.pt", "loras/lora.pt", "./a/b/lora.pt", "../a/b/lora.pt", "/a/b/lora.pt", "here/is/lora.pt", "a b/c/d"],
)
def test_a_file_that_is_a_path(offline, path, tmp_path):
    (tmp_path / "here/here/is").mkdir(parents=True)
    assert hub.file(path) == Path(path)
    assert hub.file(Path("owner/name/lora.pt")) == Path("owner/name/lora.pt")


def test_a_file_of_a_repository(offline, hub_cache, tmp_path):
    snapshot = put(hub_cache, tmp_path, "org/long", "models/base.pt", "lora.pt")
    assert hub.file("org/long/models/base.pt") == snapshot / "models/base.pt"
    assert hub.origin(snapshot / "models/base.pt") == f"org/long@{snapshot.name}"
    assert hub.origin(tmp_path / "base.pt") is None
    with pytest.raises(UserError, match="^cannot get 'org/long/none.pt' from the hub: .*; check the id"):
        hub.file("org/long/none.pt")
    with pytest.raises(UserError, match="^cannot get 'org/-bad' from the hub: "):
        hub.file("org/-bad/lora.safetensors")
    (tmp_path / "here/org/long").mkdir(parents=True)  # from here on it is a folder on the disk
    assert hub.file("org/long/lora.pt") == Path("org/long/lora.pt")


def test_the_only_weights_of_a_repository(offline, hub_cache, tmp_path):
    snapshot = put(hub_cache, tmp_path, "org/lora", "README.md", "lora.safetensors")
    assert hub.file("org/lora") == snapshot / "lora.safetensors"
    put(hub_cache, tmp_path, "org/two", "a.pt", "b.pt")
    with pytest.raises(UserError, match=r"'org/two' has 2 files of weights; name one: org/two/a.pt\|b.pt"):
        hub.file("org/two")
    put(hub_cache, tmp_path, "org/text", "README.md")
    with pytest.raises(UserError, match="'org/text' has no file of weights"):
        hub.file("org/text")
    with pytest.raises(UserError, match="cannot get 'org/none' from the hub"):
        hub.file("org/none")


def test_a_sharded_file_of_a_repository(offline, hub_cache, tmp_path):
    index = json.dumps({"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}})
    (tmp_path / "index").write_text(index)
    snapshot = hub_cache("org/big", tmp_path / "index", "dit/m.safetensors.index.json")
    put(hub_cache, tmp_path, "org/big", "dit/m-1.safetensors")
    with pytest.raises(UserError, match="cannot get 'org/big/dit/m-2.safetensors'"):
        hub.file("org/big/dit/m.safetensors")
    put(hub_cache, tmp_path, "org/big", "dit/m-2.safetensors")
    assert hub.file("org/big/dit/m.safetensors") == snapshot / "dit/m.safetensors"


def test_only_what_is_needed_is_downloaded(offline, hub_cache, tmp_path, monkeypatch):
    """And nothing is asked of the hub when the cache has it all."""
    snapshot = put(hub_cache, tmp_path, "org/wan", "config.json")
    asked = []

    def download(repo, **kwargs):
        if kwargs.get("local_files_only"):
            return str(snapshot)
        asked.append((repo, kwargs["allow_patterns"]))
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert hub.folder("org/wan", ["config.json"], lambda folder: (folder / "config.json").exists()) == snapshot
    assert asked == []
    assert hub.folder("org/wan", ["*.pth"], lambda folder: False) == snapshot
    assert asked == [("org/wan", ["*.pth"])]
    assert hub.folder(str(tmp_path), ["*"], lambda folder: False) == tmp_path
    assert len(asked) == 1
