"""Event files for TensorBoard, and a disk that is full; figures of a window of steps."""

import dataclasses
import json
import resource
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from toy_stage import Silent, ToyConfig, ToyPhase, ToyStage

from longlive_jax.errors import UserError
from longlive_jax.training import tensorboard
from longlive_jax.training.metrics import Metrics, summary
from longlive_jax.training.step import Turn
from longlive_jax.training.trainer import train

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


# MARK: several steps as one line


def test_skipped_updates_are_counted_and_not_averaged():
    rows = [{"loss": 1.0, "skipped": 5, "skipped_in_a_row": 2, "critic_skipped": 1, "critic_skipped_in_a_row": 0}]
    rows += [{"critic_skipped": 2, "critic_skipped_in_a_row": 1}] * 2
    rows += [{"loss": 3.0, "skipped": 6, "skipped_in_a_row": 3, "critic_skipped": 3, "critic_skipped_in_a_row": 0}]
    rows += [{"critic_skipped": 3, "critic_skipped_in_a_row": 0}]
    assert summary(rows) == {
        "loss": 2.0, "skipped": 2, "skipped_in_a_row": 3, "critic_skipped": 2, "critic_skipped_in_a_row": 0
    }  # fmt: skip


class Seldom(ToyStage):
    """The student learns in every third step, from a loss that is not a number; the critic in every step."""

    def shapes(self):
        learners, frozen = super().shapes()
        return learners | {"critic": learners["toy"]}, frozen

    def parameters(self):
        learners, frozen = super().parameters()
        return learners | {"critic": {"w": np.zeros(self.config.width, np.float32)}}, frozen

    def turns(self, phase, step, *, plain=False):
        both = Turn("toy", self._turns(True)[0].loss), Turn("critic", self._turns(False)[0].loss, "critic_")
        return self.kept.setdefault(step % 3 == 0, both if step % 3 == 0 else both[1:])

    @property
    def kept(self):
        return self.__dict__.setdefault("_kept", {})


def test_a_student_that_never_learns_is_seen_whenever_it_learns(tmp_path):
    """Its fourth skip in a row is in step 10; steps 11 and 12 are the critic's alone."""
    config = dataclasses.replace(ToyConfig(), phases=(ToyPhase("one", 18),))
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, log_every=6, max_skips=4))
    with pytest.raises(UserError, match="^4 updates in a row .* at step 12"):
        train(Seldom(config, tmp_path), tmp_path, Silent())
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(r["skipped"], r["skipped_in_a_row"], r["critic_skipped"]) for r in lines] == [(2, 2, 0), (2, 4, 0)]


def test_mfu_of_a_device_that_is_told(tmp_path):
    config = dataclasses.replace(ToyConfig(), phases=(ToyPhase("one", 2),))
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, device_tflops=1e-6))
    train(ToyStage(config, tmp_path), tmp_path, Silent())
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1])
    assert last["mfu"] == pytest.approx(last["flops_per_second"] / 1e6)
