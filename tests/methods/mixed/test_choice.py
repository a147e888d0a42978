"""The choice of one option per unit is the best of all choices: compared with a search through all of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfloor.methods.mixed.choice import CacheOption, OptionChoice, by_price, cheapest, smallest

Units = list[list[CacheOption]]
Solver = Callable[[Sequence[Sequence[CacheOption]], int], OptionChoice]


def option(nbytes: int, nats: float) -> CacheOption:
    return CacheOption(f"{nbytes} bytes", nbytes, nats)


# Few distinct values: ties and equal options are frequent. The nats are not dyadic, so sums of floats would round.
UNITS = st.lists(
    st.lists(
        st.builds(option, st.integers(0, 12), st.sampled_from([0.0, 0.1, 0.2, 0.3, 0.7, 1e-9, -0.1])),
        min_size=1,
        max_size=4,
    ),
    min_size=1,
    max_size=5,
)


def best(units: Units, most_bytes: int) -> tuple[Fraction, int] | None:
    """Return the least total nats, and the fewest bytes with which it is reached, of all choices; None if none fits."""
    totals = [
        (sum((Fraction(one.nats) for one in picked), Fraction(0)), sum(one.nbytes for one in picked))
        for picked in product(*units)
    ]
    return min((total for total in totals if total[1] <= most_bytes), default=None)


def is_best(solve: Solver, units: Units, most_bytes: int) -> bool:
    wanted = best(units, most_bytes)
    try:
        found = solve(units, most_bytes)
    except ValueError:
        return wanted is None
    picked = [unit[index] for unit, index in zip(units, found.picks, strict=True)]
    exact = sum(Fraction(one.nats) for one in picked), sum(one.nbytes for one in picked)
    return exact == wanted and found.nbytes == exact[1] and found.nats == pytest.approx(float(exact[0]), abs=1e-12)


@given(UNITS, st.integers(0, 50))
def test_the_choice_is_the_best_of_all(units: Units, most_bytes: int) -> None:
    assert is_best(cheapest, units, most_bytes)


@given(UNITS, st.sampled_from([-0.2, 0.0, 0.15, 0.3, 0.65, 1.0, 3.0]))
def test_the_smallest_choice_within_a_cost_is_the_smallest_of_all(units: Units, most_nats: float) -> None:
    totals = [
        (sum(one.nbytes for one in picked), sum((Fraction(one.nats) for one in picked), Fraction(0)))
        for picked in product(*units)
    ]
    wanted = min((total for total in totals if float(total[1]) <= most_nats), default=None)
    if wanted is None:
        with pytest.raises(ValueError, match="too few"):
            smallest(units, most_nats)
        return
    found = smallest(units, most_nats)
    picked = [unit[index] for unit, index in zip(units, found.picks, strict=True)]
    assert (sum(one.nbytes for one in picked), sum(Fraction(one.nats) for one in picked)) == wanted
    assert found.nbytes == wanted[0]


def one_byte_less(units: Sequence[Sequence[CacheOption]], most_bytes: int) -> OptionChoice:
    return cheapest(units, most_bytes - 1)


def by_the_first_unit(units: Sequence[Sequence[CacheOption]], most_bytes: int) -> OptionChoice:
    """Give the units what they like best in turn."""
    picks: list[int] = []
    left = most_bytes
    for i, unit in enumerate(units):
        rest = sum(min(one.nbytes for one in later) for later in units[i + 1 :])
        fitting = [j for j, one in enumerate(unit) if one.nbytes + rest <= left]
        picks.append(min(fitting, key=lambda j: (unit[j].nats, unit[j].nbytes)))
        left -= unit[picks[-1]].nbytes
    chosen = [unit[j] for unit, j in zip(units, picks, strict=True)]
    return OptionChoice(tuple(picks), sum(one.nbytes for one in chosen), sum(one.nats for one in chosen), 0.0)


CASES: list[tuple[Units, int]] = [
    ([[option(1, 0.9), option(5, 0.0)], [option(1, 0.8), option(4, 0.3)]], 6),
    ([[option(1, 0.9), option(3, 0.6), option(9, 0.0)], [option(1, 0.7), option(8, 0.0)]], 10),
    ([[option(2, 0.5), option(4, 0.1)], [option(2, 0.5), option(4, 0.1)], [option(2, 0.9), option(7, 0.0)]], 11),
]


@pytest.mark.parametrize("mutant", [one_byte_less, by_the_first_unit, by_price])
def test_each_mutant_is_refused(mutant: Solver) -> None:
    assert all(is_best(cheapest, *case) for case in CASES)
    assert not all(is_best(mutant, *case) for case in CASES)


@given(UNITS, st.integers(0, 50))
def test_no_choice_is_below_the_bound_and_prices_lose_less_than_one_step(units: Units, most_bytes: int) -> None:
    wanted = best(units, most_bytes)
    if wanted is None:
        return
    found, quick = cheapest(units, most_bytes), by_price(units, most_bytes)
    assert found.bound == quick.bound <= found.nats + 1e-12
    assert found.nats <= quick.nats + 1e-12 and quick.nbytes <= most_bytes
    step = max(one.nats for unit in units for one in unit) - min(one.nats for unit in units for one in unit)
    assert quick.nats <= found.bound + step + 1e-12


@given(UNITS, st.integers(0, 50))
def test_the_bound_is_what_splitting_one_unit_would_reach(units: Units, most_bytes: int) -> None:
    """The oracle is the relaxation's dual: the largest, over prices of a byte, of the cheapest choice at that price."""
    if best(units, most_bytes) is None:
        return
    prices = {Fraction(0)}
    for unit in units:
        for one, other in product(unit, unit):
            if one.nbytes > other.nbytes and one.nats < other.nats:
                prices.add((Fraction(other.nats) - Fraction(one.nats)) / (one.nbytes - other.nbytes))
    dual = max(
        sum(min(Fraction(one.nats) + price * one.nbytes for one in unit) for unit in units) - price * most_bytes
        for price in prices
    )
    if sum(min(one.nbytes for one in unit) for unit in units) < most_bytes:
        assert cheapest(units, most_bytes).bound == pytest.approx(float(dual), abs=1e-12)
    else:
        assert cheapest(units, most_bytes).bound >= float(dual) - 1e-12


def test_equal_nats_take_the_fewest_bytes() -> None:
    assert cheapest([[option(5, 0.1), option(3, 0.1), option(9, 0.1)]], 9).nbytes == 3


def test_too_few_bytes_are_refused_with_the_least_that_would_do() -> None:
    units = [[option(1000, 0.5), option(4000, 0.0)], [option(2500, 0.2)]]
    for solve in (cheapest, by_price):
        with pytest.raises(ValueError, match=r"3,499 bytes are too few.*need 3,500 bytes"):
            solve(units, 3499)
        assert solve(units, 3500).picks == (0, 0)
    with pytest.raises(ValueError, match="at least one unit"):
        cheapest([], 10)
    with pytest.raises(ValueError, match="at least one option"):
        cheapest([[option(1, 0.0)], []], 10)


@pytest.mark.parametrize(("nbytes", "nats"), [(-1, 0.0), (1.5, 0.0), (True, 0.0), (1, float("nan")), (1, float("inf"))])
def test_an_option_without_a_size_or_a_cost_is_refused(nbytes: int, nats: float) -> None:
    with pytest.raises(ValueError, match="bytes" if nats == 0 else "nats"):
        option(nbytes, nats)


def test_a_large_model_takes_a_moment() -> None:
    """80 layers with 14 options of their own sizes: the bound leaves few choices to extend."""
    draw = random.Random(0)
    units = [
        [option(size, draw.lognormvariate(-6, 1) * (1e6 / size) ** 2) for size in draw.sample(range(10**5, 10**6), 14)]
        for _ in range(80)
    ]
    found = cheapest(units, 80 * 250_000)
    assert found.bound <= found.nats <= by_price(units, 80 * 250_000).nats
    assert found.nbytes <= 80 * 250_000
