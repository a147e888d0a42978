"""The Gaussian reference against water poured by bisection, numbers by hand, and codes that exist."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvfloor.floors.measured import (
    attention_matrix,
    gaussian_rate,
    gaussian_reference,
    squared_singular_values,
    value_spread,
)
from tests.floors.measured import read_oracle


def poured(variances: list[float], distortion: float) -> float:
    """Bits with theta found by bisection."""
    low, high = 0.0, max(variances)
    for _ in range(200):
        theta = 0.5 * (low + high)
        low, high = (theta, high) if sum(min(theta, v) for v in variances) < distortion else (low, theta)
    return sum(max(0.0, 0.5 * math.log2(v / high)) for v in variances if v > 0.0)


def test_by_hand():
    two = gaussian_rate(torch.tensor([4.0, 1.0]), 1.0)  # theta = 1/2
    assert two.bits == pytest.approx(0.5 * math.log2(8.0) + 0.5 * math.log2(2.0)) and two.level == pytest.approx(0.5)
    one = gaussian_rate(torch.tensor([4.0, 1.0, 0.0]), 3.0)  # the weak component is not sent: theta = 2
    assert one.bits == pytest.approx(0.5) and (one.level, one.sent, one.components) == (pytest.approx(2.0), 1, 2)


VARIANCES = st.lists(st.floats(1e-3, 1e3) | st.just(0.0), min_size=1, max_size=12)


@given(VARIANCES, st.floats(1e-3, 1.2))
def test_equals_water_poured_by_bisection(variances, share):
    distortion = share * sum(variances)
    found = gaussian_rate(torch.tensor(variances, dtype=torch.float64), distortion)
    if share >= 1.0 or sum(variances) == 0.0:
        assert found.bits == 0.0
    else:
        assert found.bits == pytest.approx(poured(variances, distortion), rel=1e-6, abs=1e-6)
        spent = sum(min(found.level, v) for v in variances)
        assert spent == pytest.approx(distortion, rel=1e-9)


@given(VARIANCES, st.floats(1e-3, 0.9), st.floats(1.0, 4.0))
def test_falls_with_the_distortion_and_is_zero_from_the_variance_on(variances, share, factor):
    here = gaussian_rate(torch.tensor(variances, dtype=torch.float64), share * sum(variances))
    more = gaussian_rate(torch.tensor(variances, dtype=torch.float64), factor * share * sum(variances))
    assert more.bits <= here.bits + 1e-9
    assert gaussian_rate(torch.tensor(variances), sum(variances) * 1.001).bits == 0.0


def test_ends():
    assert gaussian_rate(torch.tensor([1.0]), 0.0).bits == math.inf
    assert gaussian_rate(torch.zeros(3), 0.0).bits == 0.0


def test_a_scalar_quantiser_lies_above_it_and_the_mutants_do_not():
    """Uniform quantisation of a Gaussian with step 1/2: its entropy exceeds the rate at its distortion by 1/4 bit."""
    step, grid = 0.5, torch.linspace(-8.0, 8.0, 320_001, dtype=torch.float64)
    density = torch.exp(-grid.square() / 2.0)
    density /= density.sum()
    cell = torch.round(grid / step)
    distortion = float((density * (grid - cell * step).square()).sum())
    mass = torch.stack([density[cell == c].sum() for c in cell.unique()])
    entropy = -float((mass * mass.log2()).sum())
    rate = gaussian_rate(torch.ones(1), distortion).bits
    assert rate <= entropy <= rate + 0.3
    assert 2.0 * rate > entropy  # without the half
    assert 0.5 * math.log2(2.0 / distortion) > entropy  # with twice the variance


def test_attention_is_the_softmax_over_all_that_a_query_sees(draw):
    q, k, later = draw(7, 5), draw(9, 5), draw(7)
    for softcap in (None, 1.5):
        found = attention_matrix(q, k, scale=0.6, softcap=softcap, later_mass=later)
        torch.testing.assert_close(found, read_oracle.weights(q, k, 0.6, softcap, later))
    assert bool((found.sum(1) < 1.0).all())


@pytest.mark.parametrize(("m", "n"), [(4, 9), (9, 4), (5, 5), (1, 3)])
def test_singular_values_come_from_either_side(draw, m, n):
    a = draw(m, n)
    torch.testing.assert_close(squared_singular_values(a), torch.linalg.svdvals(a).square(), rtol=1e-9, atol=1e-12)
    equal_rows = torch.ones(m, n, dtype=torch.float64)
    assert int((squared_singular_values(equal_rows) > 0).sum()) == 1


def test_the_three_ways_to_say_the_error_agree(draw):
    a, values = attention_matrix(draw(6, 4), draw(20, 4)), draw(20, 3)
    power = float((a @ values).square().sum())
    by_relative = gaussian_reference(a, values, relative=0.3)
    assert by_relative.distortion == pytest.approx(0.09 * power)
    assert gaussian_reference(a, values, distortion=0.09 * power).bits == pytest.approx(by_relative.bits)
    assert gaussian_reference(a, values, mean_squared=0.09 * power / 18).bits == pytest.approx(by_relative.bits)
    spread = value_spread(values)
    assert gaussian_reference(a, spread=spread, distortion=0.09 * power).bits == pytest.approx(by_relative.bits)
    whole = gaussian_reference(a, spread=spread, relative=1.0)
    assert whole.bits == 0.0 and whole.variance == pytest.approx(whole.distortion)


def test_the_products_of_both_spectra_are_the_variances_of_the_answers(draw):
    """vec(A V) has covariance Sigma (x) A A^T: its eigenvalues are all products."""
    a, mix = draw(3, 8), draw(4, 4)
    sigma = mix @ mix.T
    direct = torch.linalg.eigvalsh(torch.kron(sigma, a @ a.T))
    expected = gaussian_rate(direct.clamp_min(0.0), 2.0)
    found = gaussian_reference(a, spread=torch.linalg.eigvalsh(sigma), distortion=2.0)
    assert found.bits == pytest.approx(expected.bits) and found.variance == pytest.approx(expected.variance)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({}, "give one of distortion, mean_squared, relative; got none"),
        ({"distortion": 1.0, "relative": 0.1}, "got distortion, relative"),
        ({"distortion": -1.0}, r"distortion must lie in \[0, inf\], got -1.0"),
        ({"relative": 0.0}, "relative must be a positive number"),
        ({"values": torch.ones(3, 2), "distortion": 1.0}, "values must have 5 rows, one per column of a, got 3"),
        ({"values": None, "distortion": 1.0}, "give either values or spread"),
        ({"spread": torch.ones(2), "distortion": 1.0}, "give either values or spread"),
    ],
)
def test_refusals_name_the_argument(changed, message):
    with pytest.raises(ValueError, match=message):
        gaussian_reference(**({"a": torch.ones(4, 5), "values": torch.ones(5, 2)} | changed))
