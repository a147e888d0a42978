"""Draw bytes against error: each setting is a point, and the floor, which falls as the error grows, is a line.

A setting is a method (KV-cache compressor) with its budget. Its error is the mean over layers and kv heads of the
relative L2 error of the attention output, on queries that were recorded. The floor at an error of eta is a lower bound
on the bytes of any method whose every answer is within a factor 1±eta, number by number, for worst-case keys and
values. So a setting below the line does not contradict it: its data is easier, or its error larger on other data.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from kvfloor.audit.format import bytes_text
from kvfloor.audit.nats import TextRow
from kvfloor.audit.output_errors import ErrorMap
from kvfloor.audit.rows import Row
from kvfloor.floors.levels import relative_levels
from kvfloor.report.chart import BOTTOM, LEFT, RIGHT, TOP, Axis, Chart, Datum, Series, number_text, power_text
from kvfloor.report.marks import Mark

VALUES = "fp16"
"""Number format of the floor's values: of the formats of 16 and 32 bits, the one with the fewest levels."""

LEAST, MOST = 1e-3, 0.99
"""Errors between which the floor is drawn; settings of smaller errors stand at the left edge."""

_CURVE = 40  # points of the line
_FLOOR = Mark(f"floor at this relative error, worst case, {VALUES}", "exact", "", baseline=False)


def floor_at(floor_bytes: float, eta: float) -> float:
    """Return a lower bound on bytes at a relative error of eta, from `floor_bytes`, the floor at any error below 1.

    Law: floor_bytes log2 L, with L = `relative_levels`(eta) values of fp16 that answers tell apart. It is at most the
    floor of `floors.space`, m (p dv log2 L - H2(p)) bits, as log2 L >= 1 and `floor_bytes` is that with L = 2.
    """
    return floor_bytes * math.log2(relative_levels(eta, VALUES))


def planes(
    rows: Sequence[Row], texts: Sequence[TextRow], error_maps: Sequence[ErrorMap], marks: Mapping[str, Mark]
) -> list[Chart]:
    """Return the figures of bytes against error: one for the text whose errors were measured, one for the tasks.

    rows        one per setting and cell; those of the longest context count
    texts       one row per setting and text
    error_maps  errors of the attention output of each setting on one text
    marks       maps each method (a setting without its budget) to its colour and shape
    A figure without any point is left out.
    """
    found = []
    read = {row.method: row for row in texts if row.text in {one.text for one in error_maps}}
    points = [(read[one.method], one.output_error, one.state_bytes) for one in error_maps if one.method in read]
    if points:
        one = max(read.values(), key=lambda row: row.floor_bytes)
        found.append(_plane(f"{one.text}: {one.context:,} tokens", points, one.floor_bytes, one.exact_bytes, marks))
    measured = [row for row in rows if row.output_error_by_head]
    longest = [row for row in measured if row.context == max(row.context for row in measured)]
    if longest:
        by_setting = {row.method: [other for other in longest if other.method == row.method] for row in longest}
        points = [
            (some[0], fmean(row.output_error for row in some), fmean(row.state_bytes for row in some))
            for some in by_setting.values()
        ]
        floor, exact = max(row.floor_bytes for row in longest), max(row.exact_bytes for row in longest)
        found.append(_plane(f"tasks: {longest[0].context:,} tokens", points, floor, exact, marks))
    return found


def _plane(
    title: str,
    points: Sequence[tuple[Row | TextRow, float, float]],
    floor_bytes: float,
    exact_bytes: float,
    marks: Mapping[str, Mark],
) -> Chart:
    """Make one figure from points (a row of the setting, its error, its bytes)."""
    curves: dict[str, list[Datum]] = {}
    for row, error, size in sorted(points, key=lambda point: point[1]):
        if row.method != "exact":
            words = f"{row.method}: error {number_text(error)}, {bytes_text(round(size))}"
            curves.setdefault(row.configuration, []).append(Datum(max(LEAST, error), size, words))
    etas = [LEAST * (MOST / LEAST) ** (i / (_CURVE - 1)) for i in range(_CURVE)]
    line = tuple(Datum(eta, floor_at(floor_bytes, eta), "") for eta in etas)
    shown = [one for data in curves.values() for one in data]
    return Chart(
        title=title,
        label=f"State bytes against the error of the attention output, {title}",
        x_name="relative error of the attention output (log scale)",
        across=Axis([one.x for one in (*shown, *line)], LEFT, RIGHT, log=True, base=10.0, room=0.03),
        up=Axis([exact_bytes, *(one.y for one in (*shown, *line))], BOTTOM, TOP, log=True, room=0.06, write=power_text),
        series=(
            Series(_FLOOR, line),
            *(Series(mark, tuple(curves[name])) for name, mark in marks.items() if name in curves),
        ),
        captions=("Bytes of state, log scale. Line: the floor at this error, worst case. Dotted: exact.",),
        level=Datum(LEAST, exact_bytes, "exact", (exact_bytes, exact_bytes)),
    )
