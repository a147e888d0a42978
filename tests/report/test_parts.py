"""The parts of answers in the report: shown where an answer has several, and nowhere else."""

from __future__ import annotations

import io
from dataclasses import replace

from rich.console import Console

from kvfloor.audit.recommend import recommend
from kvfloor.audit.rows import Row
from kvfloor.report.html import page
from kvfloor.report.parts import part_tables
from kvfloor.report.terminal import print_report
from tests.report.conftest import synthetic_meta


def test_only_cells_with_several_parts_have_a_table(rows: list[Row]) -> None:
    assert part_tables(rows) == ()
    task = rows[0].task
    turned = [replace(row, parts={"turn <1>": 1.0, "turn 2": row.score}) if row.task == task else row for row in rows]
    tables = part_tables(turned)
    assert {table.cell for table in tables} == {row.cell for row in rows if row.task == task}
    first = tables[0]
    assert first.names == ("turn <1>", "turn 2") and first.lines[0][0] == "exact"
    wanted = {row.method: (1.0, row.score) for row in turned if row.cell == first.cell}
    assert dict(first.lines) == wanted
    shown = page(turned, recommend(turned), synthetic_meta())
    assert "<th>turn &lt;1&gt;</th>" in shown and f"{first.cell}: parts of the answers" in shown
    assert "parts of the answers" not in page(rows, recommend(rows), synthetic_meta())
    console = Console(file=io.StringIO(), width=200)
    print_report(turned, recommend(turned), console)
    assert f"{first.cell}: mean share of each part" in " ".join(console.file.getvalue().split())  # type: ignore


def test_a_share_of_references_is_shown_where_it_is_not_the_score(rows: list[Row]) -> None:
    several = [replace(row, parts={"references": (1 + row.score) / 2}) for row in rows]
    assert part_tables(several)[0].names == ("references",)
