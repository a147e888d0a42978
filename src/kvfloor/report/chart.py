"""Quality against bytes for one cell, laid out: coordinates and words, which `chart.html` draws as SVG.

Drawn as plain SVG and not by a plotting library, so that every name passes the page's one escaping path, the
figure follows the reader's light or dark mode, and a point tells its exact figures without a script.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvfloor.audit.format import bytes_text, percent_text
from kvfloor.audit.rows import Cell, Row
from kvfloor.report.marks import Mark

WIDTH, HEIGHT = 480, 350
LEFT, RIGHT, TOP, BOTTOM = 52, 464, 78, 300
"""The plot area's edges within the figure."""

BELOW_FLOOR = "below the worst-case floor: this task's data is easier than the worst case"
BELOW_FLOOR_AND_FALLS = "below the worst-case floor, and it loses to exact here"


@dataclass(frozen=True)
class Point:
    """Hold one setting: its place, its error bar from `low` to `high`, and the words shown on pointing at it."""

    x: float
    y: float
    low: float
    high: float
    words: str
    below_floor: bool


@dataclass(frozen=True)
class Curve:
    """Hold one method's points, from the fewest bytes up; `path` joins them."""

    mark: Mark
    points: tuple[Point, ...]

    @property
    def path(self) -> str:
        return "M" + "L".join(f"{point.x:.1f} {point.y:.1f}" for point in self.points)


@dataclass(frozen=True)
class Bound:
    """Hold a vertical line: where it stands, the words beside it, and on which side they fit."""

    x: float
    lines: tuple[str, ...]
    anchor: str


@dataclass(frozen=True)
class Chart:
    """Everything `chart.html` draws for one cell."""

    cell: Cell
    curves: tuple[Curve, ...]
    exact: Point
    floor: Bound
    token_ids: Bound
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    notes: tuple[str, ...]


def chart(rows: Sequence[Row], marks: Mapping[str, Mark]) -> Chart:
    """Draw the chart of one cell's rows, exact among them. x is log2 of bytes, y the score."""
    exact = next(row for row in rows if row.method == "exact")
    sizes = [row.state_bytes for row in rows] + [exact.exact_bytes, exact.floor_bytes, exact.token_id_bytes]
    axis = _Axis(min(size for size in sizes if size > 0), max(sizes))
    curves: dict[str, list[Row]] = {method: [] for method in marks}
    for row in sorted(rows, key=lambda row: row.state_bytes):
        if row is not exact:
            curves[row.configuration].append(row)
    shifts = _shifts([row for row in rows if row is not exact], axis)
    return Chart(
        cell=exact.cell,
        curves=tuple(
            Curve(marks[method], tuple(_point(row, axis, shifts[row.method]) for row in settings))
            for method, settings in curves.items()
            if settings
        ),
        exact=_point(exact, axis, 0.0),
        floor=axis.bound(
            exact.floor_bytes,
            f"floor, {bytes_text(exact.floor_bytes)}: worst case over keys",
            "and values, attention as a data structure",
        ),
        token_ids=axis.bound(exact.token_id_bytes, f"token ids, {bytes_text(exact.token_id_bytes)}"),
        x_ticks=axis.ticks(),
        y_ticks=tuple((_height(share), percent_text(share)) for share in (0.0, 0.25, 0.5, 0.75, 1.0)),
        notes=_notes(rows),
    )


class _Axis:
    """Bytes on a log scale between the plot's edges."""

    def __init__(self, smallest: int, largest: int) -> None:
        room = 0.06 * max(1.0, math.log2(largest / smallest))
        self.low = math.log2(smallest) - room
        self.high = math.log2(largest) + room

    def place(self, size: float) -> float:
        share = (math.log2(max(size, 1)) - self.low) / (self.high - self.low)
        return LEFT + share * (RIGHT - LEFT)

    def ticks(self) -> tuple[tuple[float, str], ...]:
        """Powers of two, at most six."""
        first, last = math.ceil(self.low), math.floor(self.high)
        stride = max(1, math.ceil((last - first + 1) / 6))
        return tuple((self.place(2.0**k), _power_text(k)) for k in range(first, last + 1, stride))

    def bound(self, size: int, *lines: str) -> Bound:
        x = self.place(size)
        return Bound(x, lines, anchor="start" if x < (LEFT + RIGHT) / 2 else "end")


def _power_text(k: int) -> str:
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    step = min(k // 10, len(units) - 1)
    return f"{2 ** (k - 10 * step)} {units[step]}"


def _height(share: float) -> float:
    return BOTTOM - share * (BOTTOM - TOP)


def _shifts(rows: Sequence[Row], axis: _Axis) -> dict[str, float]:
    """Setting -> sideways shift, so that settings of almost equal bytes stand beside one another."""
    clusters: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: (row.state_bytes, row.method)):
        if clusters and axis.place(row.state_bytes) - axis.place(clusters[-1][0].state_bytes) < 8:
            clusters[-1].append(row)
        else:
            clusters.append([row])
    return {
        row.method: 6.0 * (index - (len(cluster) - 1) / 2) for cluster in clusters for index, row in enumerate(cluster)
    }


def _point(row: Row, axis: _Axis, shift: float) -> Point:
    return Point(
        x=axis.place(row.state_bytes) + shift,
        y=_height(row.score),
        low=_height(row.score_low),
        high=_height(row.score_high),
        words=(
            f"{row.method}: {percent_text(row.score)} ({percent_text(row.score_low)} to "
            f"{percent_text(row.score_high)}) in {row.state_bytes:,} bytes"
            + (f"; {note_below_floor(row)}" if row.below_floor else "")
        ),
        below_floor=row.below_floor,
    )


def note_below_floor(row: Row) -> str:
    """Return the note on a row left of the floor; it never calls the row impossible."""
    return BELOW_FLOOR_AND_FALLS if row.diff_high < 0 else BELOW_FLOOR


def _notes(rows: Sequence[Row]) -> tuple[str, ...]:
    """Return one line per kind of point left of the floor, naming the settings."""
    named: dict[str, list[str]] = {}
    for row in rows:
        if row.below_floor:
            named.setdefault(note_below_floor(row), []).append(row.method)
    return tuple(f"{', '.join(settings)}: {note}." for note, settings in sorted(named.items()))
