"""Messages that exist must not be forbidden: each law is played against protocols whose size and success are known."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfloor import floors


def test_entropy_by_hand():
    assert floors.H2(0.5) == 1.0
    assert floors.H2(0.0) == floors.H2(1.0) == 0.0
    assert math.isclose(floors.H2(0.25), 2.0 - 0.75 * math.log2(3.0))
    assert math.isclose(floors.H2(0.9), 0.4689955935892812, rel_tol=1e-12)


@pytest.mark.parametrize(
    ("p", "share"), [(2 / 3, 0.0817), (0.75, 0.1887), (0.9, 0.5310), (0.95, 0.7136), (0.99, 0.9192), (0.4, 0.0)]
)
def test_index_by_hand(p, share):
    assert floors.index_bits(10_000, p) / 10_000 == pytest.approx(share, abs=5e-5)


def index_protocols():
    """(N, message bits, exact success at a uniform bit): storing m of N bits, and the (7, 4) Hamming code."""
    for N, m in itertools.product((1, 5, 12), repeat=2):
        if m <= N:
            yield N, m, 0.5 * (1.0 + m / N)
    yield 7, 4, 1.0 - (7 / 8) / 7


def test_index_bound_forbids_no_protocol_and_its_mutant_does():
    assert all(floors.index_bits(N, p) <= S + 1e-12 for N, S, p in index_protocols())
    without_entropy = [N * p > S + 1e-12 for N, S, p in index_protocols()]
    assert any(without_entropy)


def row_protocols():
    """(n, dv, message bits, success): keep m whole rows and guess the rest, or keep s bits of every row."""
    for n, dv in ((4, 1), (6, 3), (8, 10)):
        for m in range(n + 1):
            yield n, dv, m * dv, m / n + (1 - m / n) * 2.0**-dv
        for s in range(dv + 1):
            yield n, dv, n * s, 2.0 ** (s - dv)


def test_row_bound_forbids_no_protocol_and_its_mutant_does():
    assert all(floors.row_bits(n, dv, p) <= S + 1e-9 for n, dv, S, p in row_protocols())
    assert any(n * p * dv > S + 1e-9 for n, dv, S, p in row_protocols())


@given(st.integers(1, 10**6), st.integers(1, 512), st.floats(0.01, 1.0), st.floats(0.01, 1.0))
def test_row_bound_is_monotone_in_success(n, dv, p, other):
    low, high = sorted((p, other))
    assert floors.row_bits(n, dv, low) <= floors.row_bits(n, dv, high) + 1e-6


def test_token_ids():
    assert floors.token_ids(1024, 32_768) == 1024 * 15
    with pytest.raises(ValueError, match=r"vocabulary must be a whole number >= 1, got 0"):
        floors.token_ids(1024, 0)
