"""The probing floor: the hard pair by softmax, every small algorithm enumerated, the protocols that reach it."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvfloor import floors


def attention(scores: torch.Tensor, values: torch.Tensor) -> float:
    return (torch.softmax(scores, dim=0) @ values).item()


@pytest.mark.parametrize("n", [4, 10, 1000])
def test_the_hard_pair_separates_up_to_its_limit(n):
    """q = 1 and a key 2 ln(n-1)/d 1, or 2 ln(n-1) e_j: the score is 2 ln(n-1) either way."""
    values = torch.zeros(n, dtype=torch.float64)
    values[0] = n
    found = torch.zeros(n, dtype=torch.float64)
    found[n // 2] = 2 * math.log(n - 1)
    sigma, spike = attention(torch.zeros_like(found), values), attention(found, values)
    assert sigma == pytest.approx(1.0)
    assert spike == pytest.approx(1 / (n - 1))
    limit = 1 - 2 / n
    for eta, separates in ((limit - 1e-9, True), (limit + 1e-9, False)):
        assert ((1 + eta) * spike < (1 - eta) * sigma) is separates
        assert (floors.time_probes(n, 0.9, eta=eta) > 0) is separates


def test_the_printed_values_separate_only_below_a_third():
    """Haris & Onak, Appendix G: values 1 on the first n - sqrt n tokens, sqrt n on the others; an early spike."""
    n = 10_000
    values = torch.ones(n, dtype=torch.float64)
    values[-100:] = 100.0
    scores = torch.zeros(n, dtype=torch.float64)
    sigma = attention(scores, values)
    scores[7] = 2 * math.log(n - 1)
    spike = attention(scores, values)
    assert sigma == pytest.approx(2 - 1 / 100)
    separated = [eta for eta in (0.30, 0.32, 0.34) if (1 + eta) * spike < (1 - eta) * sigma]
    assert separated == [0.30, 0.32]


@pytest.mark.parametrize("places", [3, 4, 5])
def test_no_small_algorithm_beats_the_success_of_uniform_probing(places):
    """Deterministic ones suffice: a probe set and an answer for each outcome; sigma and H uniform over the places."""
    n = places + 1
    for T in range(places + 1):
        best = 0.0
        for probed in itertools.combinations(range(places), T):
            for says_sigma, found in itertools.product((True, False), repeat=2):
                on_sigma = float(says_sigma)
                on_h = sum((found if i in probed else not says_sigma) for i in range(places)) / places
                best = max(best, 0.5 * on_sigma + 0.5 * on_h)
        assert best == pytest.approx(floors.probing_success(T, n))
    assert floors.probing_success(10 * places, n) == 1.0


def test_probing_is_simulated():
    generator, n, T, games = torch.Generator().manual_seed(0), 101, 40, 20_000
    is_spike = torch.rand(games, generator=generator) < 0.5
    place = torch.randint(0, n - 1, (games,), generator=generator)
    found = place < T  # a uniform place against a fixed set is a fixed place against a uniform set
    right = torch.where(is_spike, found, torch.ones_like(found)).double().mean().item()
    assert right == pytest.approx(floors.probing_success(T, n), abs=4 * 0.5 / math.sqrt(games))


@given(st.integers(3, 10**6), st.floats(0.501, 1.0))
def test_protocols_that_exist_are_not_forbidden_and_the_mutants_forbid_them(n, p):
    """Fixed T: probe T, and where nothing shows answer for sigma w.p. p. Expected T: probe all or nothing."""
    share = floors.time_probes(n, p) / (n - 1)
    on_sigma, on_h = p, share + (1 - share) * (1 - p)
    assert min(on_sigma, on_h) == pytest.approx(p, abs=1e-9)
    everything = floors.time_probes(n, p, expected=True) / (n - 1)  # with this chance probe all, else a fair guess
    assert everything + (1 - everything) * 0.5 == pytest.approx(p, abs=1e-9)
    if 0.51 < p < 0.99:
        assert p > share + 1e-6  # the mutant T >= p (n-1) would forbid the first protocol
        assert share > everything + 1e-6  # the fixed law is false for expected T: it would forbid the second


def test_numbers_by_hand():
    assert floors.time_probes(1001, 0.9) == pytest.approx(1000 * (2 - 1 / 0.9))
    assert floors.time_probes(1001, 0.9, expected=True) == pytest.approx(800.0)
    assert floors.time_operations(1001, 64, 0.9, expected=True) == pytest.approx(51_200.0)
    assert floors.time_operations(1001, 64, 1.0) == 64_000.0
    assert floors.time_probes(1001, 0.5) == 0.0
    assert floors.time_probes(1001, 0.9, eta=0.999) == 0.0
    assert floors.time_probes(2, 0.9) == floors.time_probes(1, 0.9) == 0.0
    assert floors.probing_success(250, 1001) == 0.625


@given(
    st.integers(1, 10**6), st.integers(1, 256), st.floats(0.01, 1.0), st.floats(0.01, 1.0), st.floats(0.0, 0.99),
    st.booleans(),
)  # fmt: skip
def test_monotone_in_every_argument(n, d, p, other, eta, expected):
    low, high = sorted((p, other))

    def reads(**changed):
        return floors.time_operations(**({"n": n, "d": d, "p": low, "eta": eta, "expected": expected} | changed))

    here = reads()
    assert reads(n=n + 1) >= here
    assert reads(d=d + 1) >= here
    assert reads(p=high) >= here
    assert reads(eta=eta / 2) >= here
    assert reads(expected=True) <= reads(expected=False) + 1e-9 * here
    assert reads(d=1) == floors.time_probes(n, low, eta=eta, expected=expected)
    assert floors.probing_success(d, n + 1) <= floors.probing_success(d + 1, n + 1)
    assert floors.probing_success(d, n + 1) >= floors.probing_success(d, n + 2)
