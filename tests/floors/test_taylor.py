"""Taylor moments: attention from sums of monomials, against the softmax."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvfloor import floors


def truncated(x: float, g: int) -> float:
    return math.fsum(x**j / math.factorial(j) for j in range(g + 1))


@given(st.floats(0.01, 12.0), st.floats(0.001, 2.0))
def test_every_weight_is_within_its_factor(r, error):
    g, b = floors.taylor_degree(r, error), error / (2 + error)
    for x in (-r, -r / 2, -1e-3 * r, 0.0, r / 3, r):
        assert abs(truncated(x, g) / math.exp(x) - 1) <= b + 1e-9
    assert (1 + b) / (1 - b) == pytest.approx(1 + error)


def test_a_degree_without_the_worst_sign_is_too_low():
    """The mutant r^(g+1)/(g+1)! <= b forgets that e^-r is small."""
    r, error = 5.0, 0.5
    b = error / (2 + error)
    mutant = next(g for g in range(100) if r ** (g + 1) / math.factorial(g + 1) <= b)
    assert mutant < floors.taylor_degree(r, error)
    assert abs(truncated(-r, mutant) / math.exp(-r) - 1) > b


@given(st.floats(0.01, 30.0), st.floats(0.001, 2.0))
def test_it_is_the_least_degree(r, error):
    g, goal = floors.taylor_degree(r, error), math.log(error / (2 + error)) - r
    assert (g + 1) * math.log(r) - math.lgamma(g + 2) <= goal
    assert g == 0 or g * math.log(r) - math.lgamma(g + 1) > goal


def features(x: torch.Tensor, g: int) -> torch.Tensor:
    """(m, count): every monomial of degree <= g, over the square root of its multinomial weight."""
    columns = []
    for powers in itertools.product(range(g + 1), repeat=x.shape[1]):
        if sum(powers) <= g:
            weight = math.prod(math.factorial(power) for power in powers)
            columns.append(torch.stack([x[:, i] ** power for i, power in enumerate(powers)]).prod(dim=0) / weight**0.5)
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize(("d", "r", "error"), [(1, 4.0, 0.1), (2, 3.0, 0.1), (3, 1.5, 0.5)])
def test_attention_from_the_moments_alone(d, r, error):
    generator, n, dv = torch.Generator().manual_seed(d), 200, 5
    keys = torch.nn.functional.normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=1)
    queries = r * torch.nn.functional.normalize(torch.randn(50, d, generator=generator, dtype=torch.float64), dim=1)
    values = torch.rand(n, dv, generator=generator, dtype=torch.float64)
    g = floors.taylor_degree(r, error)
    moments = features(keys, g).T @ torch.cat([values, torch.ones(n, 1, dtype=torch.float64)], dim=1)
    assert moments.numel() == floors.taylor_numbers(d, dv, g)
    read = features(queries, g) @ moments
    answer, exact = read[:, :dv] / read[:, dv:], torch.softmax(queries @ keys.T, dim=1) @ values
    assert ((answer - exact).abs() <= error * exact).all()
    signed = values * 2 - 1
    moments = features(keys, g).T @ torch.cat([signed, torch.ones(n, 1, dtype=torch.float64)], dim=1)
    read, weights = features(queries, g) @ moments, torch.softmax(queries @ keys.T, dim=1)
    off = (read[:, :dv] / read[:, dv:] - weights @ signed).norm(dim=1)
    assert (off <= error * weights.norm(dim=1) * torch.linalg.matrix_norm(signed, 2)).all()
    assert (off <= error * signed.norm(dim=1).max()).all()


def test_numbers_by_hand():
    assert floors.taylor_numbers(1, 64, 9) == 10 * 65
    assert floors.taylor_numbers(3, 1, 2) == 10 * 2  # 1, x, y, z, xx, xy, xz, yy, yz, zz
    assert floors.taylor_degree(0.01, 1.0) == 0  # e^0.01 x 0.01 <= 1/3
    assert floors.taylor_degree(1.0, 2.0) == 2  # e/2! = 1.36 > 1/2 >= e/3! = 0.45
    assert floors.taylor_degree(1e6, 0.5) > 10**6


@given(st.floats(0.01, 1e4), st.floats(1e-6, 10.0), st.floats(1.0, 3.0), st.integers(1, 50), st.integers(1, 50))
def test_monotone_in_every_argument(r, error, factor, d, dv):
    g = floors.taylor_degree(r, error)
    assert floors.taylor_degree(r * factor, error) >= g
    assert floors.taylor_degree(r, error * factor) <= g
    few = floors.taylor_numbers(d, dv, g % 20)
    assert few < floors.taylor_numbers(d + 1, dv, g % 20 + 1)
    assert few < floors.taylor_numbers(d, dv + 1, g % 20)
