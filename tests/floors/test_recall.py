"""The bound on recalled facts against the best of all protocols, on cases small enough to try them all."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfloor.floors import H2, fact_bits, most_facts, recall_bits


def best_share(facts: int, choices: int, bits: int) -> float:
    """Return the largest share of facts, averaged over all values, that any protocol of so many bits returns.

    A receiver answers each message with one list of values; the sender then sends the message whose list is nearest.
    """
    worlds = list(product(range(choices), repeat=facts))
    best = 0
    for lists in product(worlds, repeat=2**bits):
        score = sum(max(sum(a == b for a, b in zip(x, y, strict=True)) for y in lists) for x in worlds)
        best = max(best, score)
    return best / (len(worlds) * facts)


CASES = [(1, 2, 1), (1, 4, 2), (1, 8, 1), (1, 5, 2), (2, 2, 1), (2, 3, 1), (2, 4, 2), (3, 2, 2), (3, 3, 1)]


def exceeded(law: Callable[[int, float], float]) -> list[tuple[int, int, int]]:
    """Return the cases in which N times `law(V, p)` is more than the bits that some protocol with success p sends."""
    return [case for case in CASES if case[0] * law(case[1], best_share(*case)) > case[2] + 1e-9]


def test_no_protocol_sends_less_than_the_bound() -> None:
    assert exceeded(fact_bits) == []


@pytest.mark.parametrize(
    "mutant",
    [
        lambda choices, p: math.log2(choices) - H2(p),  # wrong answers tell everything
        lambda choices, p: p * math.log2(choices),  # no doubt about which facts are right
        lambda choices, p: fact_bits(choices, p) * 1.01,
    ],
)
def test_mutants_are_exceeded(mutant: Callable[[int, float], float]) -> None:
    assert exceeded(mutant)


@given(st.integers(2, 10**6), st.floats(0, 1))
def test_the_bound_is_above_the_short_form_and_reaches_all_bits(choices: int, p: float) -> None:
    each = fact_bits(choices, p)
    assert 0 <= each <= math.log2(choices) + 1e-12
    assert p * choices <= 1 or each >= p * math.log2(choices) - H2(p) - 1e-9
    assert fact_bits(choices, 1.0) == math.log2(choices)


@given(st.integers(2, 1000), st.floats(0, 1), st.floats(0, 1))
def test_more_success_costs_more_and_mixtures_gain_nothing(choices: int, p: float, q: float) -> None:
    low, high = sorted((p, q))
    assert fact_bits(choices, low) <= fact_bits(choices, high) + 1e-9
    middle = fact_bits(choices, (p + q) / 2)
    assert middle <= (fact_bits(choices, p) + fact_bits(choices, q)) / 2 + 1e-9


def test_the_most_facts_invert_the_bound() -> None:
    assert most_facts(recall_bits(57, 100, 0.8), 100, 0.8) == pytest.approx(57)
    assert most_facts(1000, 100, 1.0) == pytest.approx(1000 / math.log2(100))
    assert most_facts(0, 100, 0.01) == math.inf  # guessing needs no memory


@pytest.mark.parametrize("wrong", [(1, 0.5), (4, -0.1), (4, 1.1), (4, math.nan), (2.5, 0.5)])
def test_bad_arguments_are_refused(wrong: tuple[int, float]) -> None:
    with pytest.raises(ValueError, match=r"choices|p must"):
        fact_bits(*wrong)
