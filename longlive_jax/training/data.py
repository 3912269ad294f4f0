"""Batches of a stage, drawn ahead: by grain, or by worker processes where drawing would be slower than training.

Record i of a source is a function of i, so batch k is a function of k whoever draws it, and a position is a number.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from longlive_jax.errors import UserError

AHEAD = 2
"""Batches a thread or worker process is ahead."""

DIED = "a process that draws data ended (out of memory?); use fewer run.workers"


@dataclasses.dataclass(frozen=True)
class Rows:
    """A source's records that one process of several trains on, in their order.

    Attributes:
      source: of all records; batch k has those from k * streams * size on, stream by stream.
      streams: of a batch.
      size: records of a stream.
      mine: this process's streams.
    """

    source: Any
    streams: int
    size: int
    mine: Sequence[int]

    def __len__(self) -> int:
        return len(self.source) // (self.streams * self.size) * len(self.mine) * self.size

    def __repr__(self) -> str:
        return f"Rows({self.source!r}, {self.streams}, {self.size}, {list(self.mine)})"

    def __getitem__(self, index) -> Any:
        batch, rest = divmod(int(index), len(self.mine) * self.size)
        stream, record = divmod(rest, self.size)
        return self.source[(batch * self.streams + self.mine[stream]) * self.size + record]


class Batches(Iterator):
    """Batches `[streams, size, ...]` from a position on.

    Args:
      source: of records.
      collate: records of a stream as one; picklable where there are workers.
      streams, size: of a batch.
      position: batches before the first.
      workers: processes that draw; 0 for two threads of this one.
    """

    def __init__(self, source: Any, collate: Callable, streams: int, size: int, *, position: int = 0, workers: int = 0):
        self._next, self._end = position, len(source) // (streams * size)
        self._here = draw = functools.partial(draw_batch, source, collate, streams, size)
        self._pool, self._draw = _pool(workers, draw) if workers else (concurrent.futures.ThreadPoolExecutor(2), draw)
        self._ahead, self._begun = AHEAD * (workers or 2), False
        self._pending: collections.deque[concurrent.futures.Future] = collections.deque()

    def __next__(self) -> Any:
        if not self._begun:
            return self._first()
        self._draw_ahead()
        if not self._pending:
            raise StopIteration
        try:
            return self._pending.popleft().result()
        except concurrent.futures.BrokenExecutor:
            raise UserError(DIED) from None

    def _first(self) -> Any:
        """The first is drawn here: processes take seconds to start, in which the step is compiled."""
        index, self._next, self._begun = self._next, self._next + 1, True
        if index >= self._end:
            raise StopIteration
        self._draw_ahead()
        return self._here(index)

    def _draw_ahead(self) -> None:
        while len(self._pending) < self._ahead and self._next < self._end:
            self._pending.append(self._pool.submit(self._draw, self._next))
            self._next += 1

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def draw_batch(source: Any, collate: Callable, streams: int, size: int, index: int) -> Any:
    """Batch `index`."""
    first = index * streams * size
    parts = [collate([source[first + s * size + i] for i in range(size)]) for s in range(streams)]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *parts)


def grain_batches(source: Any, collate: Callable, streams: int, size: int) -> Iterator | None:
    """The same batches by grain, whose iterator is part of a checkpoint; None where grain is not installed."""
    try:
        import grain
    except ModuleNotFoundError:
        return None
    dataset = grain.MapDataset.source(source).batch(size, batch_fn=collate)
    # Two threads: a batch is drawn while the one before is computed. More would take the cores from a CPU run.
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    return iter(dataset.batch(streams).to_iter_dataset(options))


# MARK: worker processes

_WORK: Callable | None = None
"""In a worker process: what it does."""


def _pool(workers: int, work: Callable) -> tuple[concurrent.futures.ProcessPoolExecutor, Callable]:
    """A pool, and what to submit to it. `work` goes to each worker once, not with every task."""
    context = multiprocessing.get_context("spawn")  # a fork of a process with JAX's threads can hang
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(work,))
    return pool, _task


def _begin(work: Callable) -> None:
    global _WORK
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer, which lets its step end
    os.environ["JAX_PLATFORMS"] = "cpu"  # should anything ask: the accelerator is the trainer's
    _WORK = work


def _task(argument: Any) -> Any:
    return _WORK(argument)


def in_parallel(work: Callable, arguments: Sequence[Any], workers: int) -> Iterator[Any]:
    """`map(work, arguments)`, by worker processes if there are any; their death is a `UserError`."""
    if not workers:
        yield from map(work, arguments)
        return
    pool, task = _pool(workers, work)
    try:
        yield from pool.map(task, arguments, chunksize=max(1, min(64, len(arguments) // (4 * workers))))
    except concurrent.futures.BrokenExecutor:
        raise UserError(DIED) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
