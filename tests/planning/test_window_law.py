"""The fitted law against numpy's least squares, simulated noise, and tables of Student's t."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kvfloor.planning import fit_window_law
from kvfloor.statistics import student_quantile

WINDOWS = (128, 256, 512, 1024, 2048)


def test_an_exact_power_law_is_found_and_inverted() -> None:
    law = fit_window_law(WINDOWS, [3.0 * w**-0.7 for w in WINDOWS])
    assert law.exponent == pytest.approx(0.7) and law.constant == pytest.approx(3.0)
    assert law.low == pytest.approx(0.7) and law.high == pytest.approx(0.7)
    assert law.nats(4096) == pytest.approx(3.0 * 4096**-0.7)
    assert law.window(law.nats(700)) == 700 and law.window(law.nats(700) * 0.999) == 702


def test_the_fit_is_that_of_numpy() -> None:
    noise = np.random.default_rng(0).normal(size=5) * 0.1
    nats = [2.0 * w**-0.5 * math.exp(e) for w, e in zip(WINDOWS, noise, strict=True)]
    law = fit_window_law(WINDOWS, nats)
    (slope, level), covariance = np.polyfit(np.log(WINDOWS), np.log(nats), 1, cov=True)
    assert law.exponent == pytest.approx(-slope) and math.log(law.constant) == pytest.approx(level)
    half = 3.182446305284263 * math.sqrt(covariance[0, 0])  # t of 3 degrees of freedom
    assert (law.low, law.high) == pytest.approx((-slope - half, -slope + half))


@pytest.mark.parametrize(
    ("freedom", "t"), [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (9, 2.26216), (30, 2.04227)]
)
def test_quantiles_are_those_of_tables(freedom: int, t: float) -> None:
    assert student_quantile(0.95, freedom) == pytest.approx(t, rel=1e-5)


def test_intervals_hold_what_they_promise() -> None:
    """95 % of the exponents and of the next points lie inside; with the normal's 1.96 it would be 85 %."""
    source, inside, predicted, normal = np.random.default_rng(1), 0, 0, 0
    for _ in range(600):
        nats = [w**-0.6 * math.exp(0.1 * source.normal()) for w in (*WINDOWS, 4096)]
        law = fit_window_law(WINDOWS[:4], nats[:4])
        low, high = law.nats_interval(4096)
        inside += law.low <= 0.6 <= law.high
        predicted += low <= nats[5] <= high
        normal += abs(law.exponent - 0.6) <= (law.high - law.exponent) * 1.96 / 4.30265
    assert 0.925 < inside / 600 < 0.975 and 0.925 < predicted / 600 < 0.975
    assert normal / 600 < 0.9


@pytest.mark.parametrize(
    ("windows", "nats", "why"),
    [
        ((1, 2, 3), (3.0, 2.0, 1.0), "at least 4 different windows, got 3"),
        ((1, 2, 2, 3), (3.0, 2.0, 2.0, 1.0), "at least 4 different windows, got 3"),
        ((1, 2, 3, 4), (3.0, 2.0, 1.0), "equally many"),
        ((1, 2, 3, 4), (3.0, 2.0, 1.0, 0.0), "nats"),
        ((0, 2, 3, 4), (3.0, 2.0, 1.0, 0.5), "window"),
    ],
)
def test_bad_points_are_refused(windows: tuple[float, ...], nats: tuple[float, ...], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        fit_window_law(windows, nats)


def test_a_divergence_that_does_not_fall_has_no_window() -> None:
    with pytest.raises(ValueError, match="does not fall"):
        fit_window_law(WINDOWS, [0.1, 0.2, 0.3, 0.4, 0.5]).window(0.05)
