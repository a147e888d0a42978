"""Cells that exact itself cannot do are left out after its run alone, and everything says so."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from kvfloor.audit import engine
from kvfloor.audit.clock import Clock
from kvfloor.audit.grid import AnyRow, Grid, Pair
from kvfloor.audit.header import Header
from kvfloor.audit.journal import Journal, Measured
from kvfloor.audit.limits import left_out, without_left_out
from kvfloor.audit.request import AuditRequest
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
    rows = (tmp_path / "out/rows.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["method"] for line in rows] == ["exact"]  # not measured again with another bar
    kept = kvfloor("audit", *QUICK, *asked, "--least-exact", "0", "--json")
    document = json.loads(kept.stdout)
    assert kept.returncode == 0 and {row["task"] for row in document["rows"]} == {"riddle"}
    assert document["left_out"] == [] and document["recommendation"]["method"] is None


def test_a_bar_outside_0_to_1_is_refused(tmp_path: Path) -> None:
    for bar in ("1.5", "-0.1"):
        run = kvfloor("audit", "--least-exact", bar, "--out", str(tmp_path / "out"))
        assert run.returncode == 2 and "give a score from 0 (keep all cells) to 1" in run.stderr


def test_a_left_out_cell_costs_the_exact_run_only(row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []
    cells = [Cell(task, 512, "after") for task in ("hard", "easy")]
    settings = ("exact", "window@16", "h2o@16")

    class Told:
        """Notes what it is asked to measure; exact has 16 of 40 samples right on "hard"."""

        grid = Grid(tuple(cells), settings)

        def __init__(self, *given: object) -> None:
            pass

        def tokens(self, place: Cell) -> int:
            return 1

        def open(self, place: Cell) -> None:
            pass

        def measure(self, place: Cell, setting: str, exact: object) -> Measured:
            measured.append(f"{place.task} {setting}")
            right = 16 if place.task == "hard" else 40
            return Measured(row(setting, right, place.task, exact_right=right))

    monkeypatch.setattr(engine, "Worker", Told)
    identity: dict[str, object] = {}
    header = Header("m", 0, identity, [(one, False, False) for one in settings], [], cells, [], {}, "", 0.0)
    with Journal(tmp_path) as journal:
        journal.begin(header)

        def asked(rows: Mapping[Pair, AnyRow]) -> list[Pair]:
            return without_left_out(header.grid.pairs, rows, 0.5)

        engine.Here(AuditRequest(), tmp_path, print).measure(asked, journal, Clock(None, print), lambda text: None)
        assert measured == ["hard exact", "easy exact", "easy window@16", "easy h2o@16"]
        assert list(left_out(journal.rows, 0.5)) == cells[:1] and journal.missing(asked(journal.rows)) == []
