"""95 % intervals of what was measured on a number of clips: shares, means, and differences between paired arms."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 4000
FEW = 10


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Interval of a share of `trials` (Wilson 1927); all of [0, 1] without trials."""
    if trials == 0:
        return 0.0, 1.0
    interval = stats.binomtest(successes, trials).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def paired_share_difference(ours: Sequence[bool], theirs: Sequence[bool]) -> tuple[float, float, float]:
    """Share of `ours` less that of `theirs` on the same clips, and its interval (Agresti and Min 2005).

    Half a clip is added to each cell of the 2 x 2 table, so that arms which agree on every clip still get an interval
    of some width; a bootstrap would give none.
    """
    ours, theirs = np.asarray(ours, bool), np.asarray(theirs, bool)
    if len(ours) == 0:
        return math.nan, -1.0, 1.0
    gained, lost, count = (ours & ~theirs).sum() + 0.5, (theirs & ~ours).sum() + 0.5, len(ours) + 2
    middle = (gained - lost) / count
    half = stats.norm.ppf(0.5 + CONFIDENCE / 2) * math.sqrt((gained + lost) - (gained - lost) ** 2 / count) / count
    return float(ours.mean() - theirs.mean()), max(-1.0, float(middle - half)), min(1.0, float(middle + half))


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and its interval, by resampling the clips; of paired differences, when those are the values.

    Of fewer than `FEW` values Student's, for resampling so few gives intervals that are too narrow.
    """
    values = np.asarray(values, float)
    if len(values) < 2:
        return float(values.mean()) if len(values) else math.nan, -math.inf, math.inf
    if len(values) < FEW:
        half = stats.t.ppf(0.5 + CONFIDENCE / 2, len(values) - 1) * stats.sem(values)
        return float(values.mean()), float(values.mean() - half), float(values.mean() + half)
    found = stats.bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, confidence_level=CONFIDENCE, method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return float(values.mean()), float(found.low), float(found.high)
