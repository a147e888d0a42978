"""Requirements: their grammar, what they are about, and that they are never met by being about nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvfloor.audit.nats import TextSummary, summaries
from kvfloor.audit.plan import settings
from kvfloor.audit.require import conditions, shortfalls
from kvfloor.models import builtin_path
from tests.audit.made_up import text_row

TASKS = ("recall", "kv")
TEXTS = ("speech", "novel")


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


@pytest.fixture
def texts() -> list[TextSummary]:
    return summaries([text_row("exact"), *(text_row("h2o@64", text, seed) for seed, text in enumerate(TEXTS))])


def missed_with_texts(text: str, rows: list, texts: list[TextSummary]) -> list[str]:
    found = conditions(text, settings(["h2o"], ["64"]), TASKS, TEXTS)
    return shortfalls(found, rows, texts)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("kl<=0.02", 0),
        ("h2o@64:kl_high<=0.02 and same_top>=50%", 0),
        ("kl<=0.001", 1),
        ("exact:kl<=0", 0),
        ("perplexity_ratio<=1.001", 1),
        ("kl<=0.001 and score>=0.95", 2),
        ("state_bytes<=1500", 1),  # the row has 2,048 bytes, the texts 1,000
        ("state_bytes<=500", 2),
        ("recall.state_bytes<=500", 1),
        ("random:kl<=1", 1),  # a baseline that read no text
    ],
)
def test_figures_of_the_texts_are_required_too(rows: list, texts: list[TextSummary], text: str, count: int) -> None:
    assert len(missed_with_texts(text, rows, texts)) == count


def test_a_figure_of_texts_needs_texts_and_no_task() -> None:
    for texts, text in (((), "kl<=1"), (TEXTS, "recall.kl<=1")):
        with pytest.raises(ValueError, match="about no row"):
            conditions(text, settings(["h2o"], ["64"]), TASKS, texts)


def test_an_audit_of_texts_alone_can_be_required_about_bytes(texts: list[TextSummary]) -> None:
    found = conditions("state_bytes<=1000", settings(["h2o"], ["64"]), (), TEXTS)
    assert shortfalls(found, [], texts) == []
