"""The examples in the docs give what they show, and every registered method has one."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest

from kvfloor.methods.registry import TABLE

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES = sorted(path.name for path in DOCS.glob("*.md") if re.search(r"(?m)^>>> ", path.read_text("utf-8")))


def failures(text: str) -> list[str]:
    """What the page's examples say that is not so; a fence ends what an example prints."""
    test = doctest.DocTestParser().get_doctest(re.sub(r"(?m)^```.*$", "", text), {}, "page", None, None)
    assert test.examples
    said: list[str] = []
    runner = doctest.DocTestRunner(verbose=False)
    runner.run(test, out=said.append)
    return [words for words in said if words.startswith("*" * 70)]


@pytest.fixture(autouse=True)
def no_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave hidden facts out of the pages' audits: they take as long as all else, and no page shows them."""
    monkeypatch.setattr("kvfloor.audit.request._USUAL_SHEETS", 0)


@pytest.mark.parametrize("page", PAGES)
def test_examples_give_what_they_show(page: str) -> None:
    assert failures((DOCS / page).read_text(encoding="utf-8")) == []


def test_every_part_has_an_example() -> None:
    shown = (DOCS / "examples.md").read_text(encoding="utf-8")
    defaults = {"drop", "everything"}  # what a method has that names neither
    assert [name for name in TABLE if name not in defaults and not re.search(rf"\b{name}\b", shown)] == []


def test_a_wrong_example_is_noticed() -> None:
    text = (DOCS / "examples.md").read_text(encoding="utf-8")
    assert len(failures(text.replace("\n(512, 64)\n", "\n(511, 64)\n"))) == 1
