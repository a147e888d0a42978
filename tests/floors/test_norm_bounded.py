"""N(d, r, eta): against a scan over whole numbers, against keys that are really built, and as a monotone law."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvfloor import floors
from kvfloor.floors.spherical import log_cap_share
from kvfloor.game.keys.families import packing
from kvfloor.game.keys.gaps import one_sided_gaps
from kvfloor.game.keys.tori import torus_keys


def scanned(d: int, r: float, eta: float, most: int = 20_000) -> int:
    """The definition, number by number."""
    best = 1
    for m in range(1, most):
        gap = math.log(4 * m / (1 - eta)) / r
        if gap <= 1 and d >= 2 and math.log(m) <= floors.log_packing_count(d, gap):
            best = m
    axes = max((m for m in range(1, 2 * d + 1) if math.log(4 * m / (1 - eta)) <= r), default=1)
    return max(best, axes)


@pytest.mark.parametrize("d", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("r", [1.0, 3.0, 8.0, 16.0, 40.0])
@pytest.mark.parametrize("eta", [0.0, 0.5, 0.9])
def test_equals_the_scan(d, r, eta):
    if floors.N_dr(d, r, eta) < 20_000:
        assert floors.N_dr(d, r, eta) == scanned(d, r, eta)


@pytest.mark.parametrize(
    ("d", "r", "N"), [(4, 64, 160), (8, 64, 1608), (16, 64, 24379), (32, 16, 473), (64, 16, 1920), (128, 16, 7198)]
)
def test_values_that_the_pages_state(d, r, N):
    assert floors.N_dr(d, r, 0.5) == N


@given(st.integers(1, 64), st.floats(0.1, 300.0), st.floats(0.0, 0.99), st.floats(1.0, 3.0))
def test_monotone_in_every_argument(d, r, eta, factor):
    here = floors.N_dr(d, r, eta)
    assert floors.N_dr(d, r * factor, eta) >= here
    assert floors.N_dr(d + 1, r, eta) >= here
    assert floors.N_dr(d, r, eta / factor) >= here


@pytest.mark.parametrize(("d", "r"), [(4, 12.0), (8, 16.0), (16, 16.0), (8, 2.0)])
def test_so_many_keys_exist_and_a_query_of_that_length_separates_them(d, r):
    eta, m = 0.5, int(floors.N_dr(d, r, 0.5))
    families = [packing(max(m, 2), d, seed=3)[:m], torus_keys(max(m, 2), d)[:m]]
    keys = max(families, key=lambda one: one_sided_gaps(one).min().item())
    gap = one_sided_gaps(keys).min().item() if m > 1 else 1.0
    assert m == 1 or min(gap, 1.0) >= math.log(4 * m / (1 - eta)) / r
    with_own_token = torch.cat([r * keys @ keys.T, torch.zeros(m, 1, dtype=torch.float64)], dim=1)
    on_spike = torch.softmax(with_own_token, dim=1).diagonal().min().item()
    leak = 1 - on_spike if m > 1 else 0.0
    assert (1 + eta) * leak < (1 - eta) * (1 - leak)


def test_beyond_a_right_angle_the_mutant_claims_keys_that_cannot_be_separated():
    """Without theta <= pi/2 the cap formula grows again past it: at r = 3, d = 64 it would claim dozens of keys."""
    d, r, eta = 64, 3.0, 0.5
    mutant = max(
        m for m in range(1, 60) if (gap := math.log(4 * m / (1 - eta)) / r) < 2
        and m <= 2 / math.sin(math.acos(1 - gap)) ** (d - 1)
    )  # fmt: skip
    best_possible = torch.cat([r * torch.eye(mutant).double() - r * (1 - torch.eye(mutant)) / (mutant - 1)])
    leak = 1 - torch.softmax(best_possible, dim=1).diagonal().min().item()  # the simplex: no family spreads better
    assert mutant > floors.N_dr(d, r, eta)
    assert (1 + eta) * leak > (1 - eta) * (1 - leak)


def test_some_of_the_axes_serve_where_all_are_too_many():
    """At r = 10, eta = 0.9609375 there is room for 215 keys of gap 1: 200 axes in d = 100, 215 of 216 in d = 108.

    The mutant that takes all 2d axes or none has fewer keys in the larger space.
    """
    r, eta = 10.0, 0.9609375
    assert math.floor((1 - eta) * math.exp(r) / 4) == 215
    assert [floors.N_dr(d, r, eta) for d in (100, 107, 108, 120)] == [200, 214, 215, 215]
    all_or_none = -log_cap_share(108, math.log(4 * 200 / (1 - eta)) / r)
    assert math.log(216) + math.log(4 / (1 - eta)) > r and all_or_none < math.log(200)


@given(st.integers(1, 64), st.floats(0.1, 300.0), st.floats(0.001, 0.999), st.floats(1.0, 3.0))
def test_keys_by_ratio_are_the_same_law(d, r, ratio, factor):
    assert floors.N_dr(d, r, 0.5) == floors.separable_keys(d, r, 0.125)
    here = floors.separable_keys(d, r, ratio)
    assert floors.separable_keys(d, r, ratio / factor) <= here <= floors.separable_keys(d, r * factor, ratio)
    assert floors.separable_keys(d + 1, r, ratio) >= here >= 1


def test_far_beyond_floats_is_infinite():
    assert floors.N_dr(5000, 5000.0, 0.5) == math.inf
