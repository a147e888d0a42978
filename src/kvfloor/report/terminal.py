"""The audit as tables for the terminal; names from outside can neither colour nor steer it."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvfloor.audit.explain import cautions, what_breaks, why
from kvfloor.audit.recommend import Recommendation
from kvfloor.audit.rows import Row
from kvfloor.audit.words import bytes_text, percent_text, points_text, smaller_text
from kvfloor.report.tables import Score, scoreboard
from kvfloor.report.text import visible

_COLOURS = {"holds": "green", "open": "yellow", "falls": "red", None: "dim"}


def print_report(rows: Sequence[Row], answer: Recommendation, console: Console) -> None:
    """Print one table per context and protocol, then the recommendation with its reasons."""
    tables = sorted({(row.context, row.protocol) for row in rows}, key=lambda one: (one[0], one[1] != "visible"))
    for context, protocol in tables:
        some = [row for row in rows if (row.context, row.protocol) == (context, protocol)]
        console.print(_table(some, answer))
    margin = points_text(answer.standard.margin)
    console.print(
        Text(f"✓ loses less than {margin} to exact   ? not shown   ✗ loses, with 95 % confidence", style="dim")
    )
    console.print()
    console.print(_line("Use: ", answer.method or "nothing here", style="bold"))
    console.print(_line("", why(answer)))
    for sentence in (*what_breaks(answer), *cautions(answer)):
        console.print(_line("- ", sentence))


def _table(rows: Sequence[Row], answer: Recommendation) -> Table:
    cells, lines = scoreboard(rows, answer.standard)
    asked = "question visible" if cells[0].protocol == "visible" else "question after"
    samples = min(row.n for row in rows)
    title = Text(f"{asked}, {cells[0].context:,} tokens, n = {samples} per score")
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("setting", no_wrap=True)
    table.add_column("state", justify="right", no_wrap=True)
    table.add_column("smaller", justify="right", no_wrap=True)
    for cell in cells:
        table.add_column(Text(visible(cell.task)), justify="right", no_wrap=True)
    for line in lines:
        table.add_row(
            Text(visible(line.setting), style="dim" if line.baseline else ""),
            bytes_text(line.state_bytes),
            smaller_text(line.exact_bytes, line.state_bytes),
            *(_score(score) for score in line.scores),
        )
    return table


def _score(score: Score) -> Text:
    if score.row is None:
        return Text("-", style="dim")
    return Text(f"{percent_text(score.row.score)} {score.sign}", style=_COLOURS[score.verdict])


def _line(lead: str, words: str, style: str = "") -> Text:
    return Text(lead + visible(words), style=style)
