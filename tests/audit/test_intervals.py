"""Intervals keep their promise: those of shares by exact enumeration, those of means over many seeded samples."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kvfloor.statistics import (
    blocks,
    confidence_of_look,
    mean_exceeds,
    mean_interval,
    paired_counts,
    paired_difference_interval,
    wilson_interval,
)


def test_wilson_covers_its_share_on_average() -> None:
    n, shares = 32, [i / 40 for i in range(1, 40)]
    intervals = [wilson_interval(right, n) for right in range(n + 1)]
    covered = []
    for share in shares:
        mass = [math.comb(n, k) * share**k * (1 - share) ** (n - k) for k in range(n + 1)]
        covered.append(sum(m for m, (low, high) in zip(mass, intervals, strict=True) if low <= share <= high))
    assert 0.94 < sum(covered) / len(covered) < 0.97
    assert min(covered) > 0.89


def test_wilson_has_width_at_the_ends() -> None:
    low, high = wilson_interval(0, 32)
    assert low == pytest.approx(0.0) and 0.1 < high < 0.11
    low, high = wilson_interval(32, 32)
    assert high == pytest.approx(1.0) and 0.89 < low < 0.9


def multinomial(n: int, gain: float, loss: float) -> dict[tuple[int, int], float]:
    """Probability of (gained, lost) among n pairs."""
    rest = 1 - gain - loss
    return {
        (g, b): math.comb(n, g) * math.comb(n - g, b) * gain**g * loss**b * rest ** (n - g - b)
        for g in range(n + 1)
        for b in range(n + 1 - g)
    }


@pytest.mark.parametrize(("gain", "loss"), [(0.02, 0.02), (0.05, 0.2), (0.1, 0.1), (0.01, 0.3)])
def test_the_paired_interval_covers_the_true_difference(gain: float, loss: float) -> None:
    n = 32
    covered = 0.0
    for (gained, lost), mass in multinomial(n, gain, loss).items():
        low, high = paired_difference_interval(gained, lost, n)
        covered += mass * (low <= gain - loss <= high)
    assert covered > 0.93


def test_the_paired_interval_is_not_empty_without_discordant_pairs() -> None:
    low, high = paired_difference_interval(0, 0, 40)
    assert -0.1 < low < -0.05 and high == pytest.approx(-low)


def test_the_paired_interval_is_mirrored_and_monotone() -> None:
    low, high = paired_difference_interval(3, 9, 40)
    other_low, other_high = paired_difference_interval(9, 3, 40)
    assert low == pytest.approx(-other_high) and high == pytest.approx(-other_low)
    lows = [paired_difference_interval(0, lost, 40)[0] for lost in range(41)]
    assert lows == sorted(lows, reverse=True)
    assert paired_difference_interval(0, 40, 40)[0] == -1.0


def test_a_wider_confidence_gives_a_wider_interval() -> None:
    narrow, wide = paired_difference_interval(1, 4, 40, 0.9), paired_difference_interval(1, 4, 40, 0.99)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_counts_of_pairs() -> None:
    assert paired_counts([1, 0, 1, 0], [1, 1, 0, 0]) == (1, 1)
    with pytest.raises(ValueError, match="pair"):
        paired_counts([1, 0], [1])


@pytest.mark.parametrize(("right", "n"), [(-1, 5), (6, 5), (0, 0)])
def test_impossible_counts_are_refused(right: int, n: int) -> None:
    with pytest.raises(ValueError, match="impossible"):
        wilson_interval(right, n)


def test_wilson_matches_published_values() -> None:
    assert wilson_interval(64, 64) == pytest.approx((0.9434, 1.0), abs=1e-4)
    assert wilson_interval(0, 64) == pytest.approx((0.0, 0.0566), abs=1e-4)
    assert wilson_interval(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)


def test_blocks_hold_every_value_once() -> None:
    assert blocks([1.0, 2.0, 3.0, 4.0, 5.0], 2) == [(6.0, 3), (9.0, 2)]
    assert blocks([1.0, 2.0], 64) == [(3.0, 2)]


@pytest.mark.parametrize(("count", "spread"), [(24, 1.0), (48, 1.0), (48, 1.5)])
def test_a_mean_of_skewed_and_dependent_values_is_covered(count: int, spread: float) -> None:
    rng, runs, missed_low, missed_high = np.random.default_rng(count), 300, 0, 0
    wanted = math.exp(spread**2 / 2 + 0.125)
    for run in range(runs):
        level = rng.normal(size=(count, 1)) * 0.5  # common to a block
        values = np.exp(spread * rng.normal(size=(count, 64)) + level)
        _, low, high = mean_interval(blocks(values.ravel().tolist(), 64), resamples=400, seed=run)
        missed_low, missed_high = missed_low + (wanted < low), missed_high + (wanted > high)
    assert missed_low + missed_high <= 0.1 * runs  # 5 % promised; a normal interval misses about 10 %, all above
    assert missed_high <= 0.07 * runs


def test_a_mean_of_equal_values_has_no_width() -> None:
    assert mean_interval([(6.0, 3), (4.0, 2)] * 4) == (2.0, 2.0, 2.0)
    with pytest.raises(ValueError, match="at least 8 blocks of values, got 7"):
        mean_interval([(1.0, 1)] * 7)


def test_looks_share_the_error() -> None:
    errors = [1 - confidence_of_look(0.95, look) for look in range(1, 10_000)]
    assert errors[0] == pytest.approx(0.025) and errors == sorted(errors, reverse=True)
    assert 0.04999 < sum(errors) <= 0.05
    with pytest.raises(ValueError, match="look"):
        confidence_of_look(0.95, 0)


def test_a_mean_at_the_limit_is_rarely_said_to_exceed_it_however_often_one_looks() -> None:
    rng, runs = np.random.default_rng(0), 1000
    skewed = np.exp(1.2 * rng.normal(size=(runs, 200)) - 0.72)  # mean 1
    rare = (rng.random((runs, 200)) < 0.02) * 50.0  # mean 1
    dependent = np.ones((runs, 200))  # each value's mean given the ones before is 1
    for k in range(1, 200):
        dependent[:, k] = np.where(dependent[:, k - 1] > 1, 0.5 + rng.random(runs), 2.0 * rng.random(runs))
    for values in (skewed, rare, dependent):
        assert sum(mean_exceeds(row, 1.0, 0.05) for row in values) <= 0.065 * runs


def test_a_mean_above_the_limit_is_found() -> None:
    rng = np.random.default_rng(1)
    for ratio, count in ((4.0, 16), (2.0, 48), (1.3, 400)):
        values = np.exp(0.7 * rng.normal(size=(100, count)) - 0.245) * ratio
        assert sum(mean_exceeds(row, 1.0, 0.01) for row in values) >= 90, ratio
    assert mean_exceeds([0.05] * 8, 0.01, 0.01) and not mean_exceeds([0.01] * 500, 0.01, 0.01)
    assert mean_exceeds([0.05] * 8 + [0.0] * 500, 0.01, 0.01)  # once shown, it stays shown


def test_impossible_limits_are_refused() -> None:
    for values, limit, error in (([-1.0], 1.0, 0.05), ([1.0], 0.0, 0.05), ([1.0], 1.0, 1.0)):
        with pytest.raises(ValueError, match="must"):
            mean_exceeds(values, limit, error)
