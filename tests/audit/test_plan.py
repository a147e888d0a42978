"""What an audit runs: settings, samples, and the user's own prompts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvfloor.audit.plan import BASELINES, Item, prompt_work, settings, task_work
from kvfloor.audit.prompts import read_prompts
from kvfloor.audit.request import AuditRequest
from kvfloor.audit.rows import Cell
from kvfloor.audit.run import run
from kvfloor.audit.setting import BudgetedMethod
from kvfloor.methods.grammar import parse
from kvfloor.models import builtin_path
from kvfloor.tasks import BeginsWith, Part, Question


def words(text: str) -> int:
    return len(text.split())


def test_baselines_run_beside_the_methods_and_nothing_twice() -> None:
    found = [one.text for one in settings(["window", "h2o", "sinks(4)@16"], ["32", "64"])]
    assert found[0] == "exact"
    assert len(found) == len(set(found))
    assert {"exact", "quant", "quant(bits=4)", "random@32", "random@64", "window@32", "sinks@64"} <= set(found)
    assert {"h2o@32", "h2o@64", "sinks@16"} <= set(found)
    assert sum(name.startswith("exact") for name in found) == 1
    assert len(BASELINES) == 6


@pytest.mark.parametrize(
    ("methods", "budgets", "told"),
    [
        (["nonsense"], ["64"], "unknown policy or method 'nonsense'"),
        (["h2o"], ["sixty"], "not a budget"),
        (["h2o"], [], "at least one budget"),
        (["sinks(8)"], ["8"], "too small"),
    ],
)
def test_impossible_settings_are_refused(methods: list[str], budgets: list[str], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        settings(methods, budgets)


def test_protocols_share_their_samples() -> None:
    work = task_work(["recall"], [64], ["after", "visible"], 3, seed=5, count=words)
    assert [one.cell.protocol for one in work] == ["after", "visible"]
    assert work[0].items == work[1].items
    assert len({item.context for item in work[0].items}) == 3
    assert task_work(["recall"], [64], ["after"], 3, seed=6, count=words)[0].items != work[0].items


def test_unknown_task_is_named() -> None:
    with pytest.raises(ValueError, match="unknown task 'crosswords'"):
        task_work(["crosswords"], [64], ["after"], 3, 0, words)


PAIRED = """
from kvfloor.tasks import Plot, Question, Task, Woven

def plot(rng, n, lexicon):
    things = rng.sample(lexicon.things, 2 * n)
    pairs = list(zip(things[::2], things[1::2]))
    return Plot(
        [[f"{one} goes with {other}."] for one, other in pairs],
        [(Question(f"{one} goes with", other), i) for i, (one, other) in enumerate(pairs)],
    )

PAIRED = Task("couples", "words in pairs", "pairs", 1, 64, lambda length: 4, Woven(plot))
SAME_NAME = Task("couples", "another of that name", "pairs", 1, 64, lambda length: 4, Woven(plot))
BUILT_IN = Task("recall", "a built-in name", "pairs", 1, 64, lambda length: 4, Woven(plot))
"""


@pytest.fixture
def paired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "paired_task.py").write_text(PAIRED, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("paired")
def test_a_task_is_brought_as_module_and_name() -> None:
    work = task_work(["paired_task:PAIRED", "recall", "paired_task:PAIRED"], [64], ["after"], 3, 0, words)
    assert [one.cell.task for one in work] == ["couples", "recall"]
    assert all(f"{item.question} {item.answer}." in item.context for item in work[0].items)


@pytest.mark.usefixtures("paired")
def test_a_condition_names_a_brought_task_by_its_own_name(tmp_path: Path) -> None:
    asked = AuditRequest(tasks=("paired_task:PAIRED",), require="recall.score>=0.5", out=tmp_path)
    with pytest.raises(ValueError, match=r"is about no row: .*the tasks are couples;"):
        run(asked, lambda total, text: None)


@pytest.mark.usefixtures("paired")
@pytest.mark.parametrize(
    ("tasks", "told"),
    [
        ([], "at least one task"),
        (["recal"], "did you mean 'recall'"),
        (["paired_task:NOTHING"], "paired_task:NOTHING cannot be imported"),
        (["no_such_module:TASK"], "no_such_module:TASK cannot be imported"),
        ([":TASK"], ":TASK cannot be imported"),
        (["paired_task:plot"], "paired_task:plot is a function; give a kvfloor.tasks.Task"),
        (["paired_task:BUILT_IN"], "is a built-in task: give it another name"),
        (["paired_task:PAIRED", "paired_task:SAME_NAME"], "two of the tasks are named 'couples'"),
    ],
)
def test_what_is_no_task_is_refused(tasks: list[str], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        task_work(tasks, [64], ["after"], 3, 0, words)


def prompts(tmp_path: Path, lines: list[str]) -> Path:
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_bare_prompts_are_visible_only(tmp_path: Path) -> None:
    line = json.dumps({"prompt": "two and two is", "answer": "four"})
    (work,) = prompt_work("mine", read_prompts(prompts(tmp_path, [line] * 3), 3), ["after"], words)
    assert work.cell == Cell("mine", 4, "visible")
    assert work.items[0] == Item("two and two is", (Question("", "four", parts=(Part("answer", BeginsWith("four")),)),))


def test_prompts_with_a_question_follow_both_protocols(tmp_path: Path) -> None:
    line = json.dumps({"context": "a b c", "question": "d", "answer": "e"})
    work = prompt_work("mine", read_prompts(prompts(tmp_path, [line] * 2), 2), ["after", "visible"], words)
    assert [one.cell.protocol for one in work] == ["after", "visible"]


@pytest.mark.parametrize("broken", ["{", "[]", '{"prompt": "x"}', '{"prompt": "", "answer": "y"}', '{"answer": "y"}'])
def test_a_broken_line_is_named_by_its_number(tmp_path: Path, broken: str) -> None:
    good = json.dumps({"prompt": "x", "answer": "y"})
    with pytest.raises(ValueError, match=r"mine\.jsonl line 3 "):
        read_prompts(prompts(tmp_path, [good, "", broken, good]), 1)


def test_too_few_prompts_and_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 32"):
        read_prompts(prompts(tmp_path, [json.dumps({"prompt": "x", "answer": "y"})]), 32)
    with pytest.raises(ValueError, match="cannot read the prompts file"):
        read_prompts(tmp_path / "none.jsonl", 32)


def test_baselines_and_what_was_asked_for_are_told_apart() -> None:
    marks = {one.text: (one.baseline, one.asked) for one in settings(["window", "sinks(16)", "quant(bits=2)"], ["64"])}
    assert marks["window@64"] == (True, True)
    assert marks["sinks(count=16)@64"] == marks["quant(bits=2)"] == (False, True)
    assert marks["sinks@64"] == marks["quant"] == marks["quant(bits=4)"] == marks["exact"] == (True, False)


@pytest.mark.parametrize(
    ("text", "configuration", "name", "budget"),
    [
        ("h2o(recent=64)@256", "h2o(recent=64)", "h2o", "256"),
        ("sinks(4)+less(rank=3)@25%", "sinks+less(rank=3)", "sinks+less", "25%"),
        ("window+value_sum|top_k(k=4)@8:9", "window+value_sum|top_k(k=4)", "window+value_sum|top_k", "8:9"),
        ("window+less(kernels='x(y@1')@64MiB", "window+less(kernels='x(y@1')", "window+less", "64MiB"),
        ("quant(bits=4)", "quant(bits=4)", "quant", None),
        ("exact|hip(k=64)", "exact|hip(k=64)", "exact|hip", None),
        ("exact", "exact", "exact", None),
        ("subgen_sketch@64", "subgen_sketch", "subgen_sketch", "64"),
        ("tensor(store=sinks(4)@32)", "tensor(store=sinks)", "tensor", "32"),
    ],
)
def test_a_setting_tells_its_parts(
    text: str, configuration: str, name: str, budget: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x(y@1").write_bytes((builtin_path() / "less.safetensors").read_bytes())
    one = BudgetedMethod(parse(text))
    assert (one.configuration, one.name, one.budget) == (configuration, name, budget)
    assert one.text == (configuration if budget is None else f"{configuration}@{budget}")


def test_a_cell_named_twice_is_measured_once() -> None:
    work = task_work(["kv", "kv"], [64, 64], ["after", "after"], 2, seed=0, count=words)
    assert len(work) == 1
    items = (Item("a b", (Question("c", "d"),)),)
    assert len(prompt_work("mine", items, ["after", "after"], words)) == 1
