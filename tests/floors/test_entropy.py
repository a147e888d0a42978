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


def test_row_bound_is_met_by_rows_that_are_stored_or_guessed_from_a_list():
    """Its exact form leaves nothing: one bit of 1,000 rows at success 0.9 takes what INDEX says, two bits 1,372."""
    assert floors.row_bits(1000, 1, 0.9) == pytest.approx(floors.index_bits(1000, 0.9))
    assert floors.row_bits(1000, 2, 0.9) == pytest.approx(1372.5, abs=0.1)
    assert floors.row_bits(1024, 64, 0.9) == 58_502.148512164575
    assert floors.row_bits(10, 3, 1.0, told=8.0) == pytest.approx(240.0)
    assert floors.row_bits(10, 3, 0.125) == floors.row_bits(10, 4, 1.0, told=0.0) == 0.0


def least_information(levels, serves, p):
    """Return the least I(X; Z), X uniform levels, such that the answer Z serves X with probability p: Blahut-Arimoto.

    serves (levels, answers) is 1 where an answer is right for a level. The least is over all random answers.
    """
    low, high = 0.0, 60.0
    for _ in range(60):
        slope = 0.5 * (low + high)
        weight, output = [[2.0 ** (slope * s) for s in row] for row in serves], None
        output = [1.0 / len(serves[0])] * len(serves[0])
        for _ in range(400):
            joint = [[q * w for q, w in zip(output, row, strict=True)] for row in weight]
            given = [[x / sum(row) for x in row] for row in joint]
            output = [sum(row[z] for row in given) / levels for z in range(len(output))]
        served = sum(x * s for row, line in zip(given, serves, strict=True) for x, s in zip(row, line, strict=True))
        low, high = (slope, high) if served / levels < p else (low, slope)
    return sum(x / levels * math.log2(x / q) for row in given for x, q in zip(row, output, strict=True) if x > 1e-300)


@pytest.mark.parametrize("p", [0.6, 0.9, 0.99])
def test_the_bound_for_coarse_answers_is_below_what_the_best_coarse_answers_carry(p):
    """Twelve levels; answer z serves z and up to half of z below it, so that lists grow as they do in the game."""
    levels = 12
    serves = [[float(z // 2 <= x <= z) for z in range(levels)] for x in range(levels)]
    most = [max(sum(serves[y][z] for y in range(levels)) for z in range(levels) if serves[x][z]) for x in range(levels)]
    logs = [math.log2(s) for s in most]
    mean = sum(logs) / levels
    spread = math.sqrt(sum((x - mean) ** 2 for x in logs) / levels)
    told, best = math.log2(levels) - mean, least_information(levels, serves, p)
    assert floors.row_bits(1, 1, p, told, spread) <= best + 1e-6
    assert floors.row_bits(1, 1, p, math.log2(levels)) > best  # as if answers told the level: too much


@given(st.integers(1, 10**6), st.integers(1, 512), st.floats(0.01, 1.0), st.floats(0.01, 1.0))
def test_row_bound_is_monotone_in_success(n, dv, p, other):
    low, high = sorted((p, other))
    assert floors.row_bits(n, dv, low) <= floors.row_bits(n, dv, high) + 1e-6


def test_token_ids():
    assert floors.token_ids(1024, 32_768) == 1024 * 15
    with pytest.raises(ValueError, match=r"vocabulary must be a whole number >= 1, got 0"):
        floors.token_ids(1024, 0)
