"""SubGen's constants against its estimators, simulated; lazy Gumbel against its own count."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvfloor import floors


@pytest.mark.parametrize("norm", ["operator", "frobenius"])
def test_numerator_errs_as_rarely_as_promised(norm):
    """z = mean of s draws, pair i with probability |v_i|^2/mu, of mu/|v_i|^2 exp(q.k_i) v_i."""
    generator, n, d, dv, epsilon, failure = torch.Generator().manual_seed(0), 400, 4, 6, 0.6, 0.2
    keys = torch.randn(n, d, generator=generator, dtype=torch.float64) / d**0.5
    values = torch.randn(n, dv, generator=generator, dtype=torch.float64)
    mass = torch.exp(keys @ torch.randn(d, generator=generator, dtype=torch.float64))
    mu = values.square().sum()
    share = values.square().sum(dim=1) / mu
    terms = (mass / share).unsqueeze(1) * values
    exact = mass @ values
    size = torch.linalg.matrix_norm(values, 2) if norm == "operator" else values.norm()

    second_moment = (share.unsqueeze(1) * terms.square()).sum()
    assert second_moment == pytest.approx((mu * mass.square().sum()).item())  # ||V||_F^2 |e^Kq|^2, before the mean
    assert mu <= dv * torch.linalg.matrix_norm(values, 2) ** 2

    s = math.ceil(floors.subgen_s(dv, epsilon, failure, norm=norm))
    draws = torch.multinomial(share.expand(400, n), s, replacement=True, generator=generator)
    errors = (terms[draws].mean(dim=1) - exact).norm(dim=1) / (mass.norm() * size)
    assert (errors > epsilon / 3).double().mean() <= failure
    few = torch.multinomial(share.expand(400, n), max(1, s // 200), replacement=True, generator=generator)
    too_few = (terms[few].mean(dim=1) - exact).norm(dim=1) / (mass.norm() * size)
    assert (too_few > epsilon / 3).double().mean() > failure  # the mutant that forgets the constants' 9/failure


def test_variance_of_a_cluster_is_attained_by_two_extremes():
    """Samples a and R a with mean 2 R a/(1 + R) have variance mean^2 (R-1)^2/(4R); no other mean has more."""
    R = 7.0
    shares = torch.linspace(0, 1, 10_001, dtype=torch.float64)
    mean = 1 + shares * (R - 1)
    relative = shares * (1 - shares) * (R - 1) ** 2 / mean**2
    assert relative.max() == pytest.approx((R - 1) ** 2 / (4 * R), rel=1e-6)
    assert relative.max() > (R - 1) ** 2 / (4 * R**2)  # the mutant that divides by R twice


@pytest.mark.parametrize("chernoff", [False, True])
def test_denominator_errs_as_rarely_as_promised(chernoff):
    """tau = sum over clusters of n'/t times the sum of t uniform samples; each cluster at its two extremes."""
    generator, games, centres, epsilon, failure = torch.Generator().manual_seed(1), 1000, 3, 0.6, 0.2
    delta, r = 0.5, 1.5
    R = math.exp(2 * delta * r)
    t = math.ceil(floors.subgen_t(delta, r, epsilon, failure, centres=centres if chernoff else None))
    sizes = torch.tensor([1.0, 1000.0, 1.0]).double()  # one cluster has nearly everything
    high = torch.rand(games, centres, t, generator=generator) < 1 / (1 + R)
    estimate = ((1 + high.double() * (R - 1)).mean(dim=2) * sizes).sum(dim=1)
    exact = (1 + (R - 1) / (1 + R)) * sizes.sum()
    assert ((estimate - exact).abs() > epsilon / 3 * exact).double().mean() <= failure


def test_both_halves_give_the_guarantee():
    """|z/tau - z*/tau*| <= (2 eps/3)/(1 - eps/3) at the corners of what the two halves allow; at most eps up to 1."""
    for epsilon in (0.05, 0.5, 1.0):
        worst = (2 * epsilon / 3) / (1 - epsilon / 3)
        assert worst <= epsilon + 1e-12
        corner = (1 + epsilon / 3) / (1 - epsilon / 3) - 1  # |z*| = 1 is |softmax|_2 ||V||: the two errors add up
        assert corner == pytest.approx(worst)
    assert (2 * 1.1 / 3) / (1 - 1.1 / 3) > 1.1  # beyond 1 it fails, which is why epsilon > 1 is refused


def test_numbers_by_hand():
    assert floors.subgen_s(64, 0.5, 0.05) == pytest.approx(46_080)
    assert floors.subgen_s(64, 0.5, 0.05, norm="frobenius") == pytest.approx(720)
    R = math.exp(2)
    assert floors.subgen_t(1.0, 1.0, 0.5, 0.1) == pytest.approx(9 * (R - 1) ** 2 / (4 * R * 0.25 * 0.1))
    assert floors.subgen_t(1.0, 1.0, 0.5, 0.1, centres=50) == pytest.approx(27 * R * math.log(1000) / 0.25)
    assert floors.subgen_t(100.0, 100.0, 0.5, 0.1) == math.inf
    assert floors.subgen_numbers(8, 4, 10, 3, 5) == 10 * 12 + 5 * (8 + 24 + 1) + 1
    assert floors.lazy_gumbel_tokens(10_000) == 200 + 9900 / 100
    assert floors.lazy_gumbel_tokens(1) == 1.0


def test_the_plan_is_the_cheapest_delta_and_a_single_cluster_where_queries_are_short():
    n, d, dv, epsilon, failure = 10**6, 64, 64, 0.5, 0.1
    delta, s, t, centres = floors.subgen_plan(n, d, dv, epsilon, 1.0, failure)
    assert (delta, centres, s) == (2.0, 1, math.ceil(floors.subgen_s(dv, epsilon, 0.05)))
    chebyshev, chernoff = floors.subgen_t(2.0, 1.0, epsilon, 0.05), floors.subgen_t(2.0, 1.0, epsilon, 0.05, centres=1)
    assert t == math.ceil(min(chebyshev, chernoff))
    for other in (0.25, 0.5, 1.0):
        clusters = int(min(n, floors.greedy_centres(other, d)))
        samples = math.ceil(floors.subgen_t(other, 1.0, epsilon, 0.05))
        assert floors.subgen_numbers(d, dv, s, t, centres) <= floors.subgen_numbers(d, dv, s, samples, clusters)
    assert floors.subgen_plan(n, d, dv, 1e-200, 1.0, failure) is None


def test_lazy_gumbel_samples_no_more_than_its_bound():
    """(n - k)(1 - exp(-e^-B)) on average over the Gumbels, B = max(Z + G) - min Z over the k largest Z."""
    generator = torch.Generator().manual_seed(2)
    for n, spread in ((400, 0.0), (400, 1.0), (2500, 3.0)):
        k = math.isqrt(n - 1) + 1
        scores = spread * torch.randn(n, generator=generator, dtype=torch.float64)
        top = scores.topk(k).values
        gumbel = -torch.log(torch.empty(4000, k, dtype=torch.float64).exponential_(generator=generator))
        B = (top + gumbel).max(dim=1).values - top.min()
        sampled = (n - k) * (1 - torch.exp(-torch.exp(-B))).mean().item()
        assert 2 * k + sampled <= floors.lazy_gumbel_tokens(n)
        if spread == 0.0:  # equal keys come within a factor 1.1 of the bound: a mutant without the 1/k is far off
            assert sampled > 0.85 * (n - k) / k


@given(
    st.integers(1, 128), st.floats(0.01, 1.0), st.floats(0.01, 0.9), st.floats(0.01, 2.0), st.floats(0.01, 20.0),
    st.floats(1.0, 3.0), st.integers(1, 10**6),
)  # fmt: skip
def test_monotone_in_every_argument(dv, epsilon, failure, delta, r, factor, n):
    s, t = floors.subgen_s(dv, epsilon, failure), floors.subgen_t(delta, r, epsilon, failure)
    chernoff = floors.subgen_t(delta, r, epsilon, failure, centres=n)
    assert floors.subgen_s(dv + 1, epsilon, failure) > s >= floors.subgen_s(dv, epsilon, failure, norm="frobenius")
    assert floors.subgen_s(dv, epsilon / factor, failure) >= s
    assert floors.subgen_s(dv, epsilon, failure / factor) >= s
    slack = 1 + 1e-12
    for changed in ((delta * factor, r, epsilon, failure), (delta, r * factor, epsilon, failure),
                    (delta, r, epsilon / factor, failure), (delta, r, epsilon, failure / factor)):  # fmt: skip
        assert floors.subgen_t(*changed) * slack >= t
        assert floors.subgen_t(*changed, centres=n) * slack >= chernoff
    assert floors.subgen_t(delta, r, epsilon, failure, centres=n + 1) >= chernoff
    assert floors.lazy_gumbel_tokens(n + 1) >= floors.lazy_gumbel_tokens(n) - 1.0  # k jumps at the squares
    here = floors.subgen_numbers(3, 4, dv, 5, 6)
    assert min(floors.subgen_numbers(4, 4, dv, 5, 6), floors.subgen_numbers(3, 5, dv, 5, 6),
               floors.subgen_numbers(3, 4, dv + 1, 5, 6), floors.subgen_numbers(3, 4, dv, 6, 6),
               floors.subgen_numbers(3, 4, dv, 5, 7)) > here  # fmt: skip
