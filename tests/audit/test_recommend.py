"""The smallest setting that is shown to lose little on every cell, or a plain refusal with its reason."""

from __future__ import annotations

import pytest

from kvfloor.audit.explain import cautions, what_breaks, why
from kvfloor.audit.nats import TextRow
from kvfloor.audit.recommend import recommend
from tests.audit.made_up import text_row


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


def texts(**nats: float) -> list[TextRow]:
    """Rows of exact and of these settings on two texts; `h2o_64` stands for h2o@64, whose bytes are 64 times 10."""
    found = [text_row("exact", text) for text in "ab"]
    for name, far in nats.items():
        setting, size = name.replace("_", "@"), 10 * int(name.rpartition("_")[2])
        found += [text_row(setting, text, seed=i, nats=far, state_bytes=size) for i, text in enumerate("ab")]
    return found


def test_where_texts_were_read_nats_decide() -> None:
    answer = recommend([], texts=texts(h2o_64=0.02, h2o_128=0.002, window_32=0.5))
    assert answer.method == "h2o@128"
    assert "within the limit of 0.01" in why(answer) and "3.1x smaller, and 3.3x in a 16-bit model" in why(answer)
    assert "The next smaller setting is h2o@64: it diverges by 0.0" in why(answer)
    assert [one.verdict for one in answer.judged] == ["falls", "falls", "holds"]
    assert any(line.startswith("h2o@128 holds; h2o@64: it diverges") for line in what_breaks(answer))
    assert any(line.startswith("No task was run") for line in cautions(answer))
    assert recommend([], texts=texts(h2o_64=0.02), kl_limit=0.1).method == "h2o@64"


def test_a_divergence_that_may_lie_above_the_limit_is_not_safe() -> None:
    answer = recommend([], texts=texts(h2o_64=0.0095))
    assert answer.method is None and answer.judged[0].verdict == "open"
    assert "no interval lies within 0.01 nats" in why(answer)


def test_nothing_below_a_budget_that_diverges_is_believed() -> None:
    answer = recommend([], texts=texts(h2o_64=0.002, h2o_128=0.02))
    assert answer.method is None and "not believed" in why(answer)


def test_a_task_that_shows_a_loss_rules_out_what_nats_allow(row) -> None:
    read = texts(h2o_64=0.002, h2o_128=0.002)
    tasks = exact(row, "recall") + [row("h2o@64", right=10, size=640), row("h2o@128", right=38, size=1280)]
    answer = recommend(tasks, texts=read)
    assert answer.method == "h2o@128"  # its interval is too wide to exclude 15 points, but it is not shown worse
    assert answer.judged[0].decided_by == "tasks" and "breaks on recall" in why(answer)
    assert "No task shows a loss." in why(answer)


def test_a_setting_must_have_read_every_text() -> None:
    read = texts(h2o_64=0.002)
    assert recommend([], texts=read[:-1]).judged == ()
    with pytest.raises(ValueError, match=r"'h2o@64' on b, .* twice"):
        recommend([], texts=[*read, read[-1]])
    with pytest.raises(ValueError, match="the limit 0 above 0"):
        recommend([], texts=read, kl_limit=0)
