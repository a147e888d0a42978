"""Cells that exact itself cannot do are left out after its run alone, and everything says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvfloor.audit.clock import Clock
from kvfloor.audit.measure import run_cells
from kvfloor.audit.plan import Item, Work
from kvfloor.audit.rows import Cell
from tests.cli.running import kvfloor

RIDDLES = """
from kvfloor.tasks import Plot, Question, Task, Woven

def plot(rng, n, lexicon):
    fact, unsaid = rng.sample(lexicon.things, 2)
    return Plot([[f"{fact} is here."]], [(Question("what is not here?", unsaid), 0)])

RIDDLE = Task("riddle", "a word that the context does not hold", "facts", 1, 1, lambda length: 1, Woven(plot))
"""
QUICK = ("--methods", "window", "--budgets", "32", "--contexts", "64", "--n", "32", "--texts", "none")


@pytest.fixture
def riddles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "riddles.py").write_text(RIDDLES, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("riddles")
def test_a_hopeless_cell_is_left_out_of_rows_and_named(tmp_path: Path) -> None:
    out = tmp_path / "out"
    asked = ("--tasks", "recall,riddles:RIDDLE", "--require", "window@32:score>=0", "--out", str(out))
    run = kvfloor("audit", *QUICK, *asked, "--json")
    document = json.loads(run.stdout)
    assert {row["task"] for row in document["rows"]} == {"recall"}
    assert document["left_out"] == [{"task": "riddle", "context": 64, "protocol": "after", "exact_score": 0.0}]
    told = "Left out, because exact itself scores below 50 % there: riddle at 64 tokens, question after (0 %)."
    assert told in (out / "report.html").read_text(encoding="utf-8")
    # a condition is not met where nothing was measured
    assert run.returncode == 1
    missed = " ".join(run.stderr.split())
    assert missed.count("not met") == 1 and "riddle at 64 tokens, question after was left out" in missed
    shown = kvfloor("audit", *QUICK, "--tasks", "recall,riddles:RIDDLE", "--out", str(out))
    assert shown.returncode == 0 and told in " ".join(shown.stdout.split())


@pytest.mark.usefixtures("riddles")
def test_zero_keeps_every_cell_and_nothing_left_is_one_line(tmp_path: Path) -> None:
    asked = ("--tasks", "riddles:RIDDLE", "--out", str(tmp_path / "out"))
    run = kvfloor("audit", *QUICK, *asked)
    assert run.returncode == 2 and run.stdout == "" and len(run.stderr.strip().splitlines()) == 1
    assert "nothing is left to compare" in run.stderr and "riddle at 64 tokens" in run.stderr
    assert not (tmp_path / "out/rows.jsonl").exists()
    kept = kvfloor("audit", *QUICK, *asked, "--least-exact", "0", "--json")
    document = json.loads(kept.stdout)
    assert kept.returncode == 0 and {row["task"] for row in document["rows"]} == {"riddle"}
    assert document["left_out"] == [] and document["recommendation"]["method"] is None


def test_a_bar_outside_0_to_1_is_refused(tmp_path: Path) -> None:
    for bar in ("1.5", "-0.1"):
        run = kvfloor("audit", "--least-exact", bar, "--out", str(tmp_path / "out"))
        assert run.returncode == 2 and "give a score from 0 (keep all cells) to 1" in run.stderr


def test_a_left_out_cell_costs_the_exact_run_only() -> None:
    class Told:
        """A bench that only notes what it was asked to do; exact scores 0.4 on "hard"."""

        def __init__(self) -> None:
            self.ran: list[str] = []

        def prepare(self, work):
            self.task = work.cell.task
            return type("Prepared", (), {"traces": []})

        def run(self, method, prepared):
            self.ran.append(f"{self.task} {method}")

        def row(self, setting, prepared, outcome, exact):
            return type("Row", (), {"score": 0.4 if self.task == "hard" else 0.5})

    settings = [type("Setting", (), {"text": name, "method": name}) for name in ("exact", "window@8", "h2o@8")]
    work = [Work(Cell(task, 64, "after"), (Item("x", ()),)) for task in ("hard", "easy")]
    bench = Told()
    rows, _, weak = run_cells(bench, settings, work, lambda text: None, Clock(None, print), 0.5)  # type: ignore[arg-type]
    assert bench.ran == ["hard exact", "easy exact", "easy window@8", "easy h2o@8"]
    assert len(rows) == 3 and len(weak) == 1
