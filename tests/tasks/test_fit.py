"""The search for the number of units that fit: as many as possible, after few counts of long texts."""

from __future__ import annotations

import pytest

from kvfloor.tasks import Question
from kvfloor.tasks.fit import fitting, reserved


@pytest.mark.parametrize("length", [1, 7, 99, 100, 101, 149, 150, 1000, 99_999])
@pytest.mark.parametrize("tail", [1, 7, 50])
def test_no_more_units_would_fit(length: int, tail: int) -> None:
    """The first 100 units have a token each, later ones `tail` tokens."""
    calls = []

    def build(n: int) -> str:
        return "x" * (min(n, 100) + tail * max(0, n - 100))

    def count(text: str) -> int:
        calls.append(len(text))
        return len(text)

    found = fitting(build, length, count, 1, "units")
    used = len(build(found))
    assert used <= length
    assert len(build(found + 1)) > length or length - used <= max(tail, 0.003 * length)
    assert len(calls) <= 16


def test_units_without_room_are_refused() -> None:
    with pytest.raises(ValueError, match="units need at least 3 tokens more"):
        fitting(lambda n: "x" * n, 5, len, 8, "units")


def test_turns_reserve_their_questions_openings_answers_and_the_template() -> None:
    def count(text: str) -> int:
        return 10 + len(text)

    one, two = Question("abc", "d", opening="e", most=5), Question("\nf", "g", most=7)
    assert reserved((one,), count) == len(" abc e") + 5
    assert reserved((one, two), count) == len(" abc e") + 5 + len("\nf") + 7 + 10
