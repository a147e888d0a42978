"""Medians, ratios and their intervals: against binomial sums, by coverage, and on versions of known cost."""

from __future__ import annotations

import math
import random
import statistics
import time

import pytest

from kvfloor.bench.records import BenchRow
from kvfloor.bench.timing import Timed, interleaved
from kvfloor.statistics import LEAST_FOR_MEDIAN, median_interval

FIELDS = {"part": "read", "model": "m", "context": 8, "dtype": "float32"}


def by_counting(n: int, confidence: float) -> int:
    """The largest k whose order statistics cover, from whole binomial coefficients."""
    return max(k for k in range(n // 2 + 1) if 2 * sum(math.comb(n, i) for i in range(k)) <= (1 - confidence) * 2**n)


@pytest.mark.parametrize("n", [*range(LEAST_FOR_MEDIAN, 40), 60, 200])
@pytest.mark.parametrize("confidence", [0.5, 0.95])
def test_the_interval_is_that_of_the_binomial(n: int, confidence: float) -> None:
    k = by_counting(n, confidence)
    values = random.Random(n).sample(range(1, n + 1), n)
    assert median_interval(values, confidence) == (k, n + 1 - k)


def test_the_table_of_a_textbook() -> None:
    """n: ranks of the 95 % interval, from tables of the sign test."""
    for n, ranks in {6: (1, 6), 8: (1, 8), 9: (2, 8), 10: (2, 9), 12: (3, 10), 20: (6, 15), 25: (8, 18)}.items():
        assert median_interval(range(1, n + 1)) == ranks


@pytest.mark.parametrize("n", [1, LEAST_FOR_MEDIAN - 1])
def test_too_few_values_have_no_interval(n: int) -> None:
    with pytest.raises(ValueError, match=f"{n} values are too few"):
        median_interval([1.0] * n)


@pytest.mark.parametrize("n", [6, 20, 33])
def test_paired_ratios_of_drifting_times_are_covered(n: int) -> None:
    """The machine's drift multiplies both times of a turn, so a paired ratio does not see it, and two medians do."""
    source, covered, unpaired = random.Random(n), 0, 0
    for _ in range(2000):
        drift = [math.exp(source.gauss(0, 1)) for _ in range(n)]
        noise = [math.exp(source.gauss(0, 0.05)) for _ in range(n)]
        timed = Timed({"a": tuple(drift), "b": tuple(2 * x * y for x, y in zip(drift, noise, strict=True))}, 1, 1.0)
        row = BenchRow.timed(timed, "a", baseline="b", **FIELDS)
        assert row.ratio_interval is not None and row.ms_interval is not None and row.ratio is not None
        covered += row.ratio_interval[0] <= 2.0 <= row.ratio_interval[1]
        unpaired += row.ratio_interval[1] - row.ratio_interval[0] > row.ms_interval[1] - row.ms_interval[0]
    assert covered / 2000 >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / 2000)
    assert unpaired < 20


def test_the_ratio_is_of_turns_and_not_of_medians() -> None:
    timed = Timed({"a": (1.0, 1.0, 9.0, 9.0, 9.0, 1.0, 1.0), "b": (9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 1.0)}, 1, 1.0)
    row = BenchRow.timed(timed, "a", baseline="b", **FIELDS)
    assert row.ratio == 1.0 and timed.ratios("a", "b")[0] == 9.0
    assert row.ms == 1.0 and statistics.median(timed.ms["b"]) == 9.0


def test_versions_take_turns_and_the_first_calls_do_not_count() -> None:
    calls: list[str] = []

    def version(name: str, first: float) -> object:
        calls.append(name)
        if calls.count(name) == 1:
            time.sleep(first)
        return None

    timed = interleaved({name: lambda name=name: version(name, 0.05) for name in "abc"}, 9, 1.0)
    assert [len(ms) for ms in timed.ms.values()] == [9, 9, 9]
    assert max(max(ms) for ms in timed.ms.values()) < 40
    assert "".join(calls) == "abc" + "abcbcacab" * 3


def test_no_turn_begins_after_the_seconds_but_the_fewest_are_made() -> None:
    timed = interleaved({"a": lambda: time.sleep(0.02)}, 1000, 0.0)
    assert len(timed.ms["a"]) == LEAST_FOR_MEDIAN


@pytest.mark.parametrize(("share", "crowded"), [(0.79, True), (0.81, False), (1.0, False)])
def test_a_row_says_that_other_work_ran(share: float, crowded: bool) -> None:
    assert BenchRow.timed(Timed({"a": (1.0,) * 6}, 2, share), "a", **FIELDS).crowded is crowded
