"""Requirements: their grammar, what they are about, and that they are never met by being about nothing."""

from __future__ import annotations

import pytest

from kvfloor.audit.require import parse_requirement, shortfalls


def missed(text: str, rows: list, asked: tuple[str, ...] = ("h2o@64",)) -> list[str]:
    return shortfalls(parse_requirement(text), rows, asked)


@pytest.fixture
def rows(row) -> list:
    return [row("exact", size=10_000), row("h2o@64", right=36, size=2048), row("window@64", right=4)]


@pytest.mark.parametrize(
    "text",
    [
        "score>=0.9",
        "score>=90%",
        "h2o@64:score>=0.9",
        "h2o:recall.score>0.89",
        "state_bytes<=2KiB",
        "score<1 and n>=32",
    ],
)
def test_conditions_that_hold(rows: list, text: str) -> None:
    assert missed(text, rows) == []


@pytest.mark.parametrize("text", ["score>0.9", "window:score>=0.9", "score>=0.9 and state_bytes<2KiB"])
def test_conditions_that_do_not(rows: list, text: str) -> None:
    assert len(missed(text, rows)) == 1


def test_without_a_method_it_is_about_what_was_asked_for(rows: list) -> None:
    assert missed("score>=0.9", rows) == []
    assert len(missed("score>=0.9", rows, asked=("h2o@64", "window@64"))) == 1


@pytest.mark.parametrize("text", ["", "score", "score=>1", "beauty>=1", "score>=x", "score>=1 and"])
def test_text_that_is_no_condition_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no condition"):
        parse_requirement(text)


@pytest.mark.parametrize("text", ["h2o@128:score>=0", "chess.score>=0"])
def test_a_condition_about_nothing_is_refused(rows: list, text: str) -> None:
    with pytest.raises(ValueError, match="about no row"):
        missed(text, rows)
