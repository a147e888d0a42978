"""Draw one small figure of score against bytes per cell, all on the same axes, to be compared side by side.

A cell is a task at a context length under a protocol (question asked before or after the compression). A setting is a
method (KV-cache compressor) with its budget. A row is one setting measured on one cell. A score is a share of right
answers. The setting `exact` keeps every token. The floor is a lower bound for the worst case: every method takes at
least that many bytes on some input.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvfloor.audit.format import percent_text
from kvfloor.audit.rows import Cell, Row
from kvfloor.report.chart import Axis, Datum, Series, power_text
from kvfloor.report.marks import Mark

WIDTH, HEIGHT = 250, 176
LEFT, RIGHT, TOP, BOTTOM = 42, 240, 12, 148
"""The plot area's edges within a small figure."""


@dataclass(frozen=True)
class Multiple:
    """Hold all that the template `multiples.html` draws for one cell.

    label       text in place of the figure, for screen readers
    across, up  horizontal axis (bytes) and vertical axis (score)
    series      one curve per method; its points are the settings
    exact       the score of `exact`, with its confidence interval
    floor       x coordinate of the floor on the page
    """

    title: str
    subtitle: str
    label: str
    across: Axis
    up: Axis
    series: tuple[Series, ...]
    exact: Datum
    floor: float

    def path(self, series: Series) -> str:
        """Return the SVG path that joins the points of a series."""
        points = (f"{self.across.place(one.x):.1f} {self.up.place(one.y):.1f}" for one in series.data)
        return "M" + "L".join(points)


def multiples(rows: Sequence[Row], marks: Mapping[str, Mark]) -> tuple[Multiple, ...]:
    """Return one small figure per cell, ordered by task. All have the same axis of bytes, and scores from 0 to 100 %.

    rows: all rows of the audit; without any, the result is (). marks: maps each method (a setting without its budget)
    to the colour and shape of its curve.
    """
    if not rows:
        return ()
    sizes = [size for row in rows for size in (row.state_bytes, row.exact_bytes, row.floor_bytes)]
    across = Axis(sizes, LEFT, RIGHT, log=True, room=0.04, most_ticks=4, write=power_text)
    up = Axis([0.0, 1.0], BOTTOM, TOP, write=percent_text)
    cells = sorted({row.cell for row in rows}, key=lambda cell: (cell.task, cell.context, cell.protocol != "visible"))
    return tuple(_multiple(cell, [row for row in rows if row.cell == cell], marks, across, up) for cell in cells)


def _multiple(cell: Cell, rows: Sequence[Row], marks: Mapping[str, Mark], across: Axis, up: Axis) -> Multiple:
    exact = next(row for row in rows if row.method == "exact")
    curves: dict[str, list[Datum]] = {}
    for row in sorted(rows, key=lambda row: row.state_bytes):
        if row is not exact:
            curves.setdefault(row.configuration, []).append(_datum(row))
    when = "question visible" if cell.protocol == "visible" else "question after"
    return Multiple(
        title=cell.task,
        subtitle=f"{when}, {cell.context:,} tokens",
        label=f"Score against state bytes, {cell}",
        across=across,
        up=up,
        series=tuple(Series(mark, tuple(curves[name])) for name, mark in marks.items() if name in curves),
        exact=_datum(exact),
        floor=across.place(exact.floor_bytes),
    )


def _datum(row: Row) -> Datum:
    low, high = row.score_low, row.score_high
    words = f"{row.method}: {percent_text(row.score)} ({percent_text(low)} to {percent_text(high)})"
    return Datum(row.state_bytes, row.score, words, (low, high))
