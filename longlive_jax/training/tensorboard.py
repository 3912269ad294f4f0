"""TensorBoard's event files, written by the training loop itself.

tensorboardX's own `SummaryWriter` has a thread that writes. On a full disk that thread dies, nobody empties its queue,
and the next figure blocks the run for ever. A line of figures is a kilobyte: here it is written at once, and an error
is seen.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Board:
    """An event file. Every method but `drop` may raise OSError.

    Attributes:
      folder: gets the file; is made.

    Args:
      folder: see above.
      start: steps done; what other files say of later ones is hidden by TensorBoard.

    Raises:
      ImportError: tensorboardX is not installed.
    """

    def __init__(self, folder: Path, start: int):
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.proto.summary_pb2 import Summary
        from tensorboardX.record_writer import RecordWriter

        self.folder, self._event, self._summary = folder, Event, Summary
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard asks for "tfevents" in the name and reads files in the order of their names. The process is named
        # so that a run that goes on within a second does not overwrite the one before.
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        self._file = RecordWriter(str(folder.absolute() / name))
        try:
            self._write(file_version="brain.Event:2")
            self._write(step=start + 1, session_log=SessionLog(status=SessionLog.START))
            self._file.flush()
        except OSError:
            self.drop()
            raise

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Figures of a step, on the disk when this returns."""
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        self._write(step=step, summary=self._summary(value=values))
        self._file.flush()

    def drop(self) -> None:
        """Closes the file, whatever becomes of it."""
        with contextlib.suppress(OSError):
            self._file.close()

    def _write(self, **fields: Any) -> None:
        self._file.write(self._event(wall_time=time.time(), **fields).SerializeToString())
