"""Levels that answers tell apart: against enumeration, against the worst answers, and against every small message."""

import functools
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfloor import floors
from kvfloor.floors import levels as counting
from kvfloor.floors.levels import VALUES, Format, number_format
from kvfloor.game.keys.tori import torus_keys

ETAS = [0.0, 1e-4, 0.003, 0.01, 0.1, 0.5, 0.9, 0.99]


def numbers(values: str) -> list[float]:
    """List all finite non-negative numbers of a 16-bit format, from their bit patterns."""
    patterns = np.arange(2**15, dtype=np.uint16)
    found = patterns.view(np.float16) if values == "fp16" else (patterns.astype(np.uint32) << 16).view(np.float32)
    return found[np.isfinite(found)].astype(float).tolist()


@pytest.mark.parametrize("values", ["fp16", "bf16"])
def test_formats_are_those_of_the_bit_patterns(values):
    every, kind = numbers(values), number_format(values)
    assert kind.top * kind.unit == every[-1] and kind.unit == every[1]
    assert len(every) == floors.relative_levels(0.0, values) == len(set(floors.level_values(0.0, values)))
    assert floors.level_values(0.0, values) == every
    assert floors.additive_levels(0.0, values) == 2 * len(every) - 1


def test_fp32_and_single_bits_by_hand():
    kind = VALUES["fp32"]
    assert kind.top * kind.unit == float(np.finfo(np.float32).max)
    assert floors.relative_levels(0.0, "fp32") == 255 * 2**23
    assert floors.level_values(0.3, "binary") == [0.0, 1.0]
    assert floors.relative_levels(0.999, "binary") == floors.additive_levels(0.999, "binary") == 2
    assert floors.additive_levels(1.0, "binary") == floors.additive_levels(1.0) == 1


@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize("values", ["fp16", "bf16"])
def test_no_choice_of_values_has_more_levels(values, eta):
    """Taking the next number that can be told apart, one by one, is best: exchange any other choice for it."""
    every, chosen, last = numbers(values), 1, 0.0
    least_ratio = (1 + eta) / (1 - eta)
    for number in every[1:]:
        if number > least_ratio * last * (1 + 1e-13):
            chosen, last = chosen + 1, number
    found = floors.level_values(eta, values)
    assert len(found) == floors.relative_levels(eta, values)
    assert abs(len(found) - chosen) <= (1 if 0.0 < eta < 0.01 else 0)  # ties that a float cannot decide
    assert set(found) <= set(every)


@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize("values", ["fp16", "bf16", "binary"])
def test_the_worst_answers_to_neighbouring_levels_stay_apart(values, eta):
    """Other tokens have leak times the mass, and their values are 0 or the largest; an answer errs by eta."""
    found, leak = np.array(floors.level_values(eta, values)), floors.levels_leak(eta, values)
    assert 0.0 < leak <= (1 - eta) / 4
    highest = (1 + eta) * (found[:-1] + leak * found[-1])
    lowest = (1 - eta) * found[1:]
    assert bool((highest <= lowest * (1 + 1e-14)).all())
    if values != "binary":
        too_much = (1 + eta) * (found[:-1] + 8 * leak * number_format(values).top * number_format(values).unit)
        assert eta > 0.9 or bool((too_much > lowest).any())  # a mutant that allows eight times the leak


def test_levels_of_fp32_are_numbers_of_it_counted_quickly_and_nearly_all():
    for eta, most in ((0.5, 176), (0.1, 952), (0.01, 9433), (0.001, 93_181)):
        found = np.array(floors.level_values(eta, "fp32"))
        assert 0.95 * most <= len(found) <= most
        assert bool((found.astype(np.float32).astype(float) == found).all()) and found[1] <= 2.0**-136
    counts = [floors.relative_levels(10.0 ** (-step / 8), "fp32") for step in range(1, 60)]
    assert counts == sorted(counts) and counts[-1] > 10**8 / 2


def test_the_closed_form_forgets_that_small_numbers_are_sparse():
    """2 + floor(ln(largest/least)/ln((1+eta)/(1-eta))) counts values that fp16 does not have."""
    for values, eta, levels, closed in (
        ("fp16", 0.5, 26, 27), ("fp16", 0.1, 133, 140), ("fp16", 0.01, 1202, 1388),
        ("bf16", 0.5, 165, 166), ("bf16", 0.1, 883, 903), ("bf16", 0.01, 7874, 9047),
    ):  # fmt: skip
        assert floors.relative_levels(eta, values) == levels
        assert 2 + math.floor(math.log(VALUES[values].top) / math.log((1 + eta) / (1 - eta))) == closed


@pytest.mark.parametrize(
    ("error", "levels"), [(0.99, 2), (0.5, 2), (0.49, 3), (0.4, 3), (0.34, 3), (0.25, 4), (0.1, 10), (0.0401, 25)]
)
def test_additive_levels_are_the_reciprocal_rounded_up(error, levels):
    assert levels == math.ceil(1 / error - 1e-9)
    assert floors.additive_levels(error, "fp32") == floors.additive_levels(error, "fp16") == levels


@pytest.mark.parametrize("values", ["fp16", "bf16"])
@pytest.mark.parametrize("error", [0.3, 0.04, 0.002, 1e-4])
@pytest.mark.parametrize("leak", [0.0, 0.01, 1e-5])
def test_additive_levels_by_enumeration(values, error, leak):
    every = numbers(values)
    gap = 2 * (error * (1 + leak) + leak) * every[-1]
    counts = []
    for first in (gap / 2, gap):
        count, last = 0, first - gap
        for number in every:
            if number > last + gap:
                count, last = count + 1, number
        counts.append(count)
    assert abs(floors.additive_levels(error, values, leak) - max(2 * counts[0], 1 + 2 * counts[1])) <= 2e-3 * counts[1]


@settings(max_examples=60, deadline=None)
@given(
    st.floats(0.0, 0.999),
    st.floats(0.0, 0.999),
    st.floats(0.0, 0.5),
    st.floats(0.0, 0.5),
    st.sampled_from(list(VALUES)),
)
def test_levels_fall_with_the_error_and_the_leak(eta, other, leak, more, values):
    if values == "fp32":
        eta, other = max(eta, 0.01), max(other, 0.01)
    low, high = sorted((eta, other))
    little, much = sorted((leak, more))
    for count in (floors.relative_levels, floors.additive_levels):
        assert count(low, values, little) >= count(high, values, little) >= 1
        assert count(low, values, little) >= count(low, values, much)
        assert count(low, "fp32", 0.5) >= count(low, "fp16", 0.5)
    assert floors.relative_levels(low, "fp16") <= floors.relative_levels(low, "bf16")


@pytest.mark.parametrize("eta", [0.003, 0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("values", ["fp16", "bf16"])
def test_a_code_of_as_many_words_answers_every_number_of_the_format(values, eta):
    """A logarithmic code: each word answers all numbers of an interval within 1±eta, and L words cover the format."""
    unit, ratio = number_format(values).unit, (1 + Fraction(eta)) / (1 - Fraction(eta))
    words, done = 0, Fraction(-1)
    for number in numbers(values):
        value = int(number / unit)
        if value > done:
            words, done = words + 1, value * ratio
    assert words == floors.relative_levels(eta, values)


# ---- no message is shorter -------------------------------------------------------------------------------------

TINY = Format(4, 1, 3, 1.0)  # 0, 1, 2, 3, 4, 6, 8, 12


@functools.cache
def streams(rows: int, dv: int) -> list[tuple[int, ...]]:
    return list(itertools.product([0, 1, 2, 3, 4, 6, 8, 12], repeat=rows * dv))


def best_message_count(rows: int, dv: int, eta: float) -> int:
    """Count the messages of the best encoder that answers every spike within 1±eta: a cover by boxes, coordinatewise.

    Attention with no leak is the row itself, so a message serves the streams of a box: every coordinate between
    answer/(1+eta) and answer/(1-eta). On a line, the fewest intervals that cover all numbers are taken from the left.
    """
    line, intervals, done = streams(1, 1), 0, Fraction(-1)
    for (number,) in line:
        if number > done:
            intervals, done = intervals + 1, number * (1 + Fraction(eta)) / (1 - Fraction(eta))
    return intervals ** (rows * dv)


def forget() -> None:
    counting._count.cache_clear()
    counting.levels_leak.cache_clear()


@pytest.mark.parametrize("eta", [0.0, 0.1, 0.2, 0.3, 0.5, 0.9])
@pytest.mark.parametrize(("rows", "dv"), [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (3, 2)])
def test_no_floor_exceeds_the_best_encoder_of_a_tiny_format(monkeypatch, rows, dv, eta):
    monkeypatch.setitem(VALUES, "fp16", TINY)
    forget()
    try:
        floor = floors.space(rows, 2, dv, eta=eta, p=1.0)
        best = math.log2(best_message_count(rows, dv, eta))
        assert floor.bits <= best + 1e-9
        assert floor.bits == pytest.approx(best)  # here packing and covering agree
    finally:
        forget()


@pytest.mark.parametrize("p", [0.5, 0.7, 0.9, 1.0])
@pytest.mark.parametrize("levels", [2, 3, 5])
@pytest.mark.parametrize(("rows", "dv"), [(1, 1), (2, 1), (1, 2), (3, 1)])
def test_no_floor_exceeds_the_best_message_found_by_enumeration(rows, dv, levels, p):
    """Every decoder of a message of k words: the best success of k words over L^(rows dv) strings, by rows.

    With k words a decoder answers k strings of rows at most; the success of a row is the share of strings whose row is
    one of the answers of the word that is sent. For one row, k words answer k of L^dv values right.
    """
    values = levels**dv
    for words in range(1, min(values, 40) + 1):
        success = min(1.0, words / values)
        if success >= p:
            assert floors.row_bits(1, dv, p, math.log2(levels)) <= math.log2(words) + 1e-9
            break
    if rows == 2 and values <= 3:  # all pairs of answer strings: the best of all codes with two words
        strings = list(itertools.product(range(values), repeat=rows))
        best = max(
            sum(max(sum(x == y for x, y in zip(word, string, strict=True)) for word in code) for string in strings)
            for code in itertools.combinations(strings, 2)
        ) / (len(strings) * rows)
        assert floors.row_bits(rows, dv, best, math.log2(levels)) <= 1.0 + 1e-9


def test_two_levels_are_todays_formula():
    single = floors.space(1024, 64, values="binary")
    assert single.bits == floors.row_bits(1024, 64, 0.9) == 58_502.148512164575
    assert single.upper_bits == 65_536
    for eta in ETAS[:-1]:
        assert floors.space(1024, 64, eta=eta, values="binary").bits == single.bits
        assert floors.space(1024, 64, eta=eta).bits > single.bits


@pytest.mark.parametrize(
    ("values", "eta", "share"),
    [("fp16", 0.5, 0.1320), ("fp16", 0.1, 0.1982), ("fp16", 0.01, 0.2875),
     ("bf16", 0.5, 0.2069), ("bf16", 0.1, 0.2750), ("bf16", 0.01, 0.3638)],
)  # fmt: skip
def test_shares_of_a_cache_of_16_bits(values, eta, share):
    floor = floors.space(1024, 64, eta=eta, values=values)
    assert floor.bits / (8 * floor.constants["exact_bytes_fp16"]) == pytest.approx(share, abs=5e-5)


# ---- the leak that a radius leaves -------------------------------------------------------------------------------


@pytest.mark.parametrize("values", ["fp16", "bf16"])
@pytest.mark.parametrize("radius", [6.0, 10.0, 40.0, 80.0, 200.0])
@pytest.mark.parametrize("eta", [0.0, 0.1, 0.5])
def test_levels_under_a_radius_stay_apart_at_its_leak(values, radius, eta):
    n, d = 3000, 16
    floor = floors.space(n, d, eta=eta, radius=radius, values=values)
    constants = floor.constants
    levels, leak = constants["levels"], constants["eps_s"]
    assert floors.relative_levels(eta, values, leak) >= levels
    assert constants["rows"] == 1 or constants["C"] <= radius * (1 + 1e-9)
    assert floor.bits >= floors.space(n, d, eta=eta, radius=radius, values="binary").bits
    assert floor.bits <= floors.space(n, d, eta=eta, values=values).bits
    if constants["rows"] > 1 and levels < floors.relative_levels(eta, values):
        assert floors.relative_levels(eta, values, 4096 * leak) < levels  # the leak counts


@pytest.mark.parametrize("eta", [0.0, 0.2, 0.6])
@pytest.mark.parametrize(("n", "radius"), [*itertools.product((1, 7, 16, 41), (5.0, 9.0, 14.0, 30.0)), (16, 60.0)])
def test_attention_under_a_radius_tells_the_levels_that_are_claimed(radius, eta, n):
    """Keys repeated unevenly, and the receiver's own token: the worst values of all others, the worst answers."""
    floor = floors.space(n, 8, 1, eta=eta, radius=radius)
    rows, levels = floor.constants["rows"], floor.constants["levels"]
    keys = torus_keys(rows, 8).numpy()
    token = np.arange(n) % rows
    logits = radius * keys[token] @ keys.T  # (n, rows): the query of each row is radius times its key
    mass = np.concatenate([np.exp(logits), np.ones((1, rows))])  # his own token has key 0 and value 0
    weights = mass / mass.sum(axis=0)
    chain = counting._relative_runs(eta, VALUES["fp16"], 2.0 * _ratio(floor) if rows > 1 else 0.0)
    numbers = [0] + [v for start, step, count in chain for v in range(start + step, start + step * count + 1, step)]
    assert len(numbers) >= levels
    own = np.array([weights[:n][token == row, row].sum() for row in range(rows)])
    others = np.array([weights[:n][token != row, row].sum() for row in range(rows)])
    for low, high in itertools.pairwise(numbers):
        highest = (1 + eta) * (own * low + others * VALUES["fp16"].top)
        assert bool((highest < (1 - eta) * own * high * (1 + 1e-12)).all())


def _ratio(floor: floors.Floor) -> float:
    """Return the leak for which keys were counted: half of that at which levels were."""
    n, rows = floor.constants["n"], floor.constants["rows"]
    return floor.constants["eps_s"] / (math.ceil(n / rows) / (n // rows) if rows < n else 1.0)


def test_additive_floor_by_hand_and_by_kind_of_values():
    floor = floors.additive_space(1000, 64, epsilon=0.1)
    assert floor.bits == pytest.approx(1000 * (0.9 * 64 * math.log2(10) - floors.H2(0.9)))
    single = floors.additive_space(1000, 64, epsilon=0.1, values="binary")
    assert single.bits == floors.row_bits(1000, 64, 0.9)
    assert floors.additive_space(1000, 64, epsilon=1.0).regime == "vacuous (near-orthogonal)"
    bounded = floors.additive_space(1000, 64, epsilon=0.1, radius=12.0)
    assert single.constants["rows"] >= bounded.constants["rows"] > 0
    assert bounded.bits < floor.bits


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 10**5), st.integers(1, 64), st.integers(1, 64), st.floats(0.0, 1.2), st.floats(0.01, 1.0),
    st.none() | st.floats(0.01, 100.0), st.sampled_from(["fp16", "bf16", "binary"]), st.integers(1, 1000),
)  # fmt: skip
def test_additive_floor_is_monotone(n, d, dv, epsilon, p, radius, values, more):
    def bits(**changed):
        asked = {"n": n, "d": d, "dv": dv, "epsilon": epsilon, "p": p, "radius": radius, "values": values}
        return floors.additive_space(**(asked | changed)).bits

    here, slack = bits(), 1 + 1e-9
    for changed in ({"n": n + more}, {"d": d + more}, {"dv": dv + more}, {"p": 1.0}, {"epsilon": epsilon / 2},
                    {"radius": None}, {"heads": 2}):  # fmt: skip
        assert bits(**changed) * slack >= here
    floor = floors.additive_space(n, d, dv, epsilon=epsilon, p=p, radius=radius, values=values)
    assert 0.0 <= floor.bits <= floor.upper_bits * slack
    assert (floor.bits == 0.0) == floor.regime.startswith("vacuous")
