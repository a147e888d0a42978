"""Reports show of a certified method its hot and cold bytes, its bounds, its errors and its violations."""

from __future__ import annotations

import io
from dataclasses import replace

from rich.console import Console

from kvfloor.audit.meta import Meta
from kvfloor.audit.recommend import recommend
from kvfloor.audit.rows import Row
from kvfloor.report.html import page
from kvfloor.report.terminal import bounds_text, print_report


def test_only_checked_rows_are_shown_with_their_figures(rows: list[Row], meta: Meta) -> None:
    at = next(i for i, one in enumerate(rows) if one.name == "quant")
    found = replace(rows[at], cold_bytes=3001, checked=481, largest_bound=0.0193, largest_error=0.00041, violations=2)
    shown = [*rows[:at], found, *rows[at + 1 :]]
    html = page(shown, recommend(shown), meta)
    table = html[html.index("<h2>Error bounds</h2>") :].partition("</table>")[0]
    assert table.count("<tr>") == 2
    for told in (f"{found.state_bytes:,}", "3,001", "481", "0.019", "0.00041", "2"):
        assert f"<td>{told}</td>" in table
    assert "Error bounds" not in page(rows, recommend(rows), meta)
    said = io.StringIO()
    print_report(shown, recommend(shown), Console(file=said, width=400))
    assert bounds_text(found) in said.getvalue() and said.getvalue().count("answers checked") == 1
    assert "481 answers checked, largest bound 0.019, largest error 0.00041, 2 violations" in bounds_text(found)
    assert "largest bound none" in bounds_text(replace(found, largest_bound=None))
