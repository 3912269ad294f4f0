"""Event files for TensorBoard, and a disk that is full; figures of a window of steps."""

import json
import resource
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from longlive_jax.training import tensorboard
from longlive_jax.training.metrics import Metrics

RECORDS = """
import sys
from pathlib import Path
from tensorboardX.proto.event_pb2 import Event
data, at = Path(sys.argv[1]).read_bytes(), 0
while at < len(data):
    size = int.from_bytes(data[at : at + 8], "little")
    event = Event.FromString(data[at + 12 : at + 12 + size])
    values = [(v.tag, v.simple_value) for v in event.summary.value]
    print(event.step, event.file_version, event.session_log.status, *values)
    at += 16 + size
"""

FULL = """
import json, resource, sys
from pathlib import Path
from longlive_jax.training.metrics import Metrics
said = []
metrics = Metrics(Path(sys.argv[1]), 0, said.append)
metrics.write(1, {"loss": 1.0})
metrics.path = Path("/dev/null")  # which has room
resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
for step in range(2, 40):
    metrics.write(step, {f"figure {i}": 1.0 for i in range(20)})
metrics.close()
print(json.dumps(said))
"""


def files(folder: Path) -> list[Path]:
    return sorted((folder / "tensorboard").iterdir())


def records(path: Path) -> list[str]:
    """In a process of its own: event files are read here without what wrote them."""
    return subprocess.run(
        [sys.executable, "-c", RECORDS, str(path)], check=True, capture_output=True, text=True
    ).stdout.splitlines()


def test_an_event_file_is_what_tensorboard_reads(tmp_path):
    metrics = Metrics(tmp_path, 4, print)
    metrics.write(5, {"loss": 0.5, "seconds": 2.0, "phase": "one"})
    (path,) = files(tmp_path)
    assert "tfevents" in path.name
    begun, purge, figures = records(path)
    assert begun == "0 brain.Event:2 0"
    assert purge == "5  1", "later steps of a run that was killed are hidden"
    assert figures == "5  0 ('loss', 0.5) ('seconds', 2.0)", "on the disk at once, words left out"
    metrics.close()


def test_a_full_disk_ends_the_board_and_not_the_run(tmp_path):
    """It used to block: tensorboardX's thread had died, and its queue was full."""
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], check=True, capture_output=True, text=True, timeout=120
    )
    assert done.stderr == ""
    assert json.loads(done.stdout) == [
        f"warning: TensorBoard files cannot be written to {tmp_path / 'tensorboard'} (File too large) and are given "
        f"up; training goes on, figures go to /dev/null"
    ]


@pytest.mark.parametrize("limit", [None, 10], ids=["no folder", "no room"])
def test_a_board_that_cannot_begin_is_left_out(tmp_path, limit):
    said, old = [], resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit is None:
        (tmp_path / "tensorboard").write_text("a file")
    try:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
        metrics = Metrics(tmp_path, 0, said.append)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    metrics.write(1, {"loss": 1.0})
    metrics.close()
    assert len(said) == 1 and "are given up; training goes on" in said[0]
    assert metrics.path.read_text() == '{"step": 1, "loss": 1.0}\n'


def test_a_run_that_goes_on_keeps_the_file_before(tmp_path, monkeypatch):
    monkeypatch.setattr(tensorboard.time, "time", lambda: 1.0)
    for process in (1, 2):
        monkeypatch.setattr(tensorboard.os, "getpid", lambda process=process: process)
        Metrics(tmp_path, 0, print).close()
    assert [path.name for path in files(tmp_path)] == [
        f"events.out.tfevents.1.{socket.gethostname()}.{process}" for process in (1, 2)
    ]
