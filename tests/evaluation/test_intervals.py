"""Intervals against published values, and against how often they hold the truth."""

import numpy as np
import pytest
from scipy import stats

from longlive_jax.evaluation.intervals import mean_interval, paired_share_difference, wilson


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_published_values(successes, trials, low, high):
    """Newcombe 1998, Statistics in Medicine 17, table I, method 3."""
    assert wilson(successes, trials) == pytest.approx((low, high), abs=5e-5)
    mirrored = wilson(trials - successes, trials)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_without_clips_nothing_is_known():
    assert wilson(0, 0) == (0.0, 1.0)
    assert paired_share_difference([], [])[1:] == (-1.0, 1.0)


def test_a_paired_difference_by_hand():
    """3 gained, 1 lost, of 10: (3.5 - 1.5) / 12 and its standard error sqrt(5 - 4 / 12) / 12."""
    ours = [True] * 3 + [False] + [True] * 3 + [False] * 3
    theirs = [False] * 3 + [True] + [True] * 3 + [False] * 3
    difference, low, high = paired_share_difference(ours, theirs)
    assert difference == pytest.approx(0.2)
    assert (low, high) == pytest.approx((1 / 6 - 1.95996 * 0.180021, 1 / 6 + 1.95996 * 0.180021), abs=1e-4)
    assert paired_share_difference(theirs, ours) == pytest.approx((-difference, -high, -low))


def test_arms_that_agree_are_not_known_to_be_equal():
    difference, low, high = paired_share_difference([True] * 20, [True] * 20)
    assert difference == 0 and low == -high and 0.05 < high < 0.2


@pytest.mark.parametrize(("gain", "loss"), [(0.02, 0.02), (0.3, 0.05), (0.1, 0.1)])
def test_paired_differences_hold_the_truth_as_often_as_they_say(gain, loss):
    rng, count, held = np.random.default_rng(0), 40, 0
    for _ in range(1000):
        draw = rng.uniform(size=count)
        ours, theirs = draw < gain + 0.4, (draw >= gain) & (draw < gain + 0.4 + loss)
        _, low, high = paired_share_difference(ours, theirs)
        held += low <= gain - loss <= high
    assert 0.935 <= held / 1000


def test_pairing_narrows_the_interval():
    rng = np.random.default_rng(0)
    theirs = rng.uniform(size=100) < 0.5
    ours = theirs.copy()
    ours[:3] = True
    paired = paired_share_difference(ours, theirs)
    shuffled = paired_share_difference(rng.permutation(ours), theirs)
    assert paired[2] - paired[1] < 0.5 * (shuffled[2] - shuffled[1])


def test_the_interval_of_a_mean_is_that_of_student_where_both_hold():
    values = np.random.default_rng(3).normal(2.0, 1.0, 200)
    mean, low, high = mean_interval(values)
    expected = stats.t.interval(0.95, 199, values.mean(), stats.sem(values))
    assert mean == pytest.approx(values.mean()) and (low, high) == pytest.approx(expected, abs=0.03)
    assert mean_interval([1.0])[1:] == (-np.inf, np.inf)


def test_the_interval_of_a_few_is_students():
    """t of 3 degrees of freedom is 3.1824, the standard error of 1, 2, 3, 4 is sqrt(5 / 3) / 2."""
    half = 3.1824 * np.sqrt(5 / 3) / 2
    assert mean_interval([1, 2, 3, 4]) == pytest.approx((2.5, 2.5 - half, 2.5 + half), abs=1e-3)
