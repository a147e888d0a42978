"""The smallest setting that is shown to lose little on every cell, or a plain refusal with its reason."""

from __future__ import annotations

import pytest

from kvfloor.audit.explain import cautions, what_breaks, why
from kvfloor.audit.recommend import recommend


def exact(row, *tasks: str, right: int = 40):
    return [row("exact", right=right, exact_right=right, task=task, size=10_000) for task in tasks]


def test_the_smallest_safe_setting_is_chosen(row) -> None:
    rows = exact(row, "recall") + [row("quant(bits=4)", size=3000), row("h2o@64", size=2000), row("h2o@256", size=5000)]
    assert recommend(rows).method == "h2o@64"


def test_one_bad_cell_rules_a_setting_out(row) -> None:
    rows = exact(row, "recall", "kv")
    rows += [row("h2o@64", size=2000, task="recall"), row("h2o@64", right=20, size=2000, task="kv")]
    rows += [row("quant(bits=4)", size=3000, task=task) for task in ("recall", "kv")]
    answer = recommend(rows)
    assert answer.method == "quant(bits=4)"
    assert "h2o@64" in why(answer) and "kv" in why(answer)


def test_nothing_below_a_budget_that_fails_is_believed(row) -> None:
    rows = exact(row, "recall") + [row("h2o@256", right=10, size=5000), row("h2o@64", right=40, size=2000)]
    answer = recommend(rows)
    assert answer.method is None and "no setting here is safe" in why(answer).lower()


def test_no_safe_setting_is_said_plainly_and_what_breaks_is_named(row) -> None:
    rows = exact(row, "recall", "kv")
    rows += [row("window@64", right=2, task="recall"), row("window@64", right=40, task="kv")]
    answer = recommend(rows)
    assert answer.method is None
    assert "no setting here is safe" in why(answer).lower()
    assert what_breaks(answer)[0].startswith("recall breaks first")


def test_an_interval_that_is_too_wide_is_not_safety(row) -> None:
    rows = exact(row, "recall") + [row("h2o@64", right=36)]
    answer = recommend(rows)
    assert answer.method is None and answer.judged[0].verdict != "holds"


def test_exact_and_random_are_never_recommended(row) -> None:
    rows = exact(row, "recall") + [row("random@64", size=10)]
    assert recommend(rows).method is None


def test_a_setting_that_misses_a_cell_or_saves_nothing_is_no_candidate(row) -> None:
    rows = exact(row, "recall", "kv") + [row("h2o@64", task="recall", size=100)]
    rows += [row("window@512", task=task, size=20_000) for task in ("recall", "kv")]
    assert recommend(rows).judged == ()


def test_a_model_that_cannot_do_the_task_shows_no_loss(row) -> None:
    rows = exact(row, "recall", right=4) + [row("h2o@64", right=4, exact_right=4)]
    answer = recommend(rows)
    assert answer.method is None and "exact itself" in why(answer)
    assert any("Exact itself" in caution for caution in cautions(answer))


def test_more_methods_ask_for_more_evidence(row) -> None:
    few = exact(row, "recall") + [row("h2o@64", right=38, size=2000)]
    many = few + [row(f"sinks({i})@64", right=0, size=9000) for i in range(40)]
    assert recommend(few, margin=0.17).method == "h2o@64"
    assert recommend(many, margin=0.17).method is None


def test_impossible_questions_are_refused(row) -> None:
    with pytest.raises(ValueError, match="exact reference"):
        recommend([row("h2o@64")])
    with pytest.raises(ValueError, match="twice"):
        recommend(exact(row, "recall") + [row("h2o@64"), row("h2o@64")])
    with pytest.raises(ValueError, match="margin"):
        recommend(exact(row, "recall"), margin=0)
