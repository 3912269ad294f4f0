"""How a call is timed: after a warm-up, until its result is there; alone, or in turn with another.

Machines slow down and speed up while they run, so two things are compared in pairs taken close together. On a machine
that others load, the clock can be the time that this process had its processor for (`use_processor_time`).
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

_clock: Callable[[], float] = time.perf_counter


def now() -> float:
    """Seconds, of the clock that everything here is timed by: the wall clock unless another was chosen."""
    return _clock()


def use_processor_time() -> None:
    """Times by the processor time of this process from here on: the same as the wall clock on one idle core."""
    global _clock
    _clock = time.process_time


@dataclasses.dataclass(frozen=True)
class Times:
    """Milliseconds of each call, in order."""

    ms: tuple[float, ...]

    @classmethod
    def of(cls, ms: Iterable[float]) -> Times:
        return cls(tuple(ms))

    @property
    def p50(self) -> float:
        return statistics.median(self.ms)

    @property
    def p95(self) -> float:
        """The smallest that at least 95 % of the calls do not exceed."""
        return sorted(self.ms)[math.ceil(0.95 * len(self.ms)) - 1]

    def summary(self) -> dict[str, float]:
        """For a JSON."""
        return {"p50_ms": self.p50, "p95_ms": self.p95, "min_ms": min(self.ms), "calls": len(self.ms)}


def wait_for_jax(result: Any) -> None:
    import jax

    jax.block_until_ready(result)


def once(call: Callable[[], Any], wait: Callable[[Any], None] = wait_for_jax) -> float:
    """Milliseconds of one call."""
    start = now()
    wait(call())
    return 1000 * (now() - start)


def measure(
    call: Callable[[], Any],
    *,
    warmup: int = 2,
    calls: int = 10,
    seconds: float = math.inf,
    wait: Callable[[Any], None] = wait_for_jax,
) -> Times:
    """Times `call`.

    Args:
      call: the work; what it returns is waited for.
      warmup: calls before, not counted.
      calls: counted calls.
      seconds: no further call is started after so long, once there are three.
      wait: waits for a result; JAX's by default.
    """
    for _ in range(warmup):
        wait(call())
    end, ms = now() + seconds, []
    while len(ms) < calls and (len(ms) < 3 or now() < end):
        ms.append(once(call, wait))
    return Times.of(ms)


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two calls timed in turn: a b a b ... a.

    Attributes:
      a, b: times of each; one more of `a`.
    """

    a: Times
    b: Times

    @property
    def ratios(self) -> tuple[float, ...]:
        """Each b over the mean of the two a around it."""
        return tuple(2 * b / (before + after) for before, b, after in zip(self.a.ms, self.b.ms, self.a.ms[1:]))

    @property
    def ratio(self) -> float:
        """The median; above 1 means that `a` is faster."""
        return statistics.median(self.ratios)

    def summary(self) -> dict[str, Any]:
        spread = {"ratio_min": min(self.ratios), "ratio_max": max(self.ratios), "pairs": len(self.ratios)}
        return {"ratio": self.ratio, **spread, "a": self.a.summary(), "b": self.b.summary()}


def in_turn(
    a: Callable[[], float], b: Callable[[], float], *, warmup: int = 1, pairs: int = 5, seconds: float = math.inf
) -> Pair:
    """Times two calls in turn.

    Args:
      a, b: do the work and give its milliseconds (see `once`).
      warmup: calls of each before, not counted.
      pairs: how often `b` is timed.
      seconds: no further pair is started after so long, once there are three.
    """
    for _ in range(warmup):
        a(), b()
    end, first, second = now() + seconds, [a()], []
    while len(second) < pairs and (len(second) < 3 or now() < end):
        second.append(b())
        first.append(a())
    return Pair(Times.of(first), Times.of(second))
