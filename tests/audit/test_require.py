"""Requirements: their grammar, what they are about, and that they are never met by being about nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvfloor.audit.plan import settings
from kvfloor.audit.require import conditions, shortfalls
from kvfloor.models import builtin_path

TASKS = ("recall", "kv")


def about(text: str, methods: list[str], budgets: tuple[str, ...] = ("64",)) -> set[str]:
    """The settings that a requirement is about."""
    found = conditions(text, settings(methods, budgets), TASKS)
    return set().union(*(one.methods for one in found))


@pytest.fixture
def rows(row) -> list:
    return [row("exact", size=10_000), row("h2o@64", right=36, size=2048), row("window@64", right=4)]


def missed(text: str, rows: list) -> list[str]:
    return shortfalls(conditions(text, settings(["h2o"], ["64"]), TASKS), rows)


@pytest.mark.parametrize(
    "text",
    [
        "score>=0.9",
        "score>=90%",
        "h2o@64:score>=0.9",
        "h2o:recall.score>0.89",
        "state_bytes<=2KiB",
        "score<1 and n>=32",
        "kv.score>=1",
    ],
)
def test_conditions_that_hold(rows: list, text: str) -> None:
    assert missed(text, rows) == []


@pytest.mark.parametrize("text", ["score>0.9", "window:score>=0.9", "score>=0.9 and state_bytes<2KiB"])
def test_conditions_that_do_not(rows: list, text: str) -> None:
    assert len(missed(text, rows)) == 1


@pytest.mark.parametrize(
    ("methods", "asked"),
    [
        (["h2o"], {"h2o@64"}),
        (["sinks(16)"], {"sinks(count=16)@64"}),
        (["quant(bits=2)"], {"quant(bits=2)"}),
        (["window(block=1)@64"], {"window(block=1)@64"}),
        (["random(sinks=4,recent=16)@64"], {"random(sinks=4,recent=16)@64"}),
        (["sinks", "h2o"], {"sinks@64", "h2o@64"}),
        (["quant(bits=8)"], {"quant"}),
        (["window@32"], {"window@32"}),
        (["window+value_sum"], {"window+value_sum@64"}),
    ],
)
def test_without_a_method_it_is_about_what_was_asked_for(methods: list[str], asked: set[str]) -> None:
    assert about("score>=0.9", methods) == asked


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        ("h2o", {"h2o@64", "h2o@25%", "h2o(recent=8)@64", "h2o(recent=8)@25%"}),
        ("heavy_hitters@64", {"h2o@64", "h2o(recent=8)@64"}),
        ("h2o()@64", {"h2o@64"}),
        ("h2o( recent = 8 )", {"h2o(recent=8)@64", "h2o(recent=8)@25%"}),
        ("h2o@25%", {"h2o@25%", "h2o(recent=8)@25%"}),
        ("quant", {"quant", "quant(bits=4)", "quant(bits=2)"}),
        ("kivi(bits=8)", {"quant"}),
        ("quant(bits=4)", {"quant(bits=4)"}),
        ("sinks+less(kernels='a:b and c.d')@64", {"sinks+less(kernels='a:b and c.d')@64"}),
        ("sinks+less", {"sinks+less(kernels='a:b and c.d')@64"}),
        ("exact|pages", {"exact|pages(pages=4)"}),
        ("exact", {"exact"}),
    ],
)
def test_a_method_is_named_in_any_spelling(
    pattern: str, named: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a:b and c.d").write_bytes((builtin_path() / "less.safetensors").read_bytes())
    methods = ["h2o", "h2o(recent=8)", "quant(bits=2)", "sinks+less(kernels='a:b and c.d')@64", "exact|pages(pages=4)"]
    assert about(f"{pattern}:recall.score>=0.9", methods, ("64", "25%")) == named


@pytest.mark.parametrize(
    "text", ["", "score", "score=>1", "beauty>=1", "score>=x", "score>=1 and", "name>=1", "score<=1e999", "baseline>=1"]
)
def test_text_that_is_no_condition_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no condition"):
        about(text, ["h2o"])


@pytest.mark.parametrize(
    ("text", "methods"),
    [
        ("h2o@128:score>=0", ["h2o"]),
        ("chess.score>=0", ["h2o"]),
        ("score>=0", []),
        ("snapkv:score>=0", ["h2o"]),
        ("sinks(8):score>=0", ["h2o"]),
        ("score>=0 and sinks(8):score>=0", ["h2o"]),
    ],
)
def test_a_condition_about_nothing_is_refused(text: str, methods: list[str]) -> None:
    with pytest.raises(ValueError, match="about no row"):
        about(text, methods)


def test_a_condition_on_an_unknown_method_names_it() -> None:
    with pytest.raises(ValueError, match="did you mean 'window'"):
        about("windw@64:score>=0", ["h2o"])
