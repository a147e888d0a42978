"""Draw score against bytes for one cell: each method's settings, the exact cache, the floor and the token ids.

A setting is a method (KV-cache compressor) with its budget. A cell is a task at a context length under a protocol
(question asked before or after the compression). A row is one setting measured on one cell; the exact cache, which
keeps every token, has a row too. A score is a share of right answers. The floor is a lower bound for the worst case:
every method takes at least that many bytes on some input. The token ids of the context are all that a model must store
if it recomputes the keys and values.
"""

from collections.abc import Mapping, Sequence

from kvfloor.audit.format import bytes_text, percent_text
from kvfloor.audit.rows import Row
from kvfloor.report.chart import BOTTOM, LEFT, RIGHT, TOP, Axis, Chart, Datum, Rule, Series, power_text
from kvfloor.report.marks import Mark

BELOW_FLOOR = "below the worst-case floor: this task's data is easier than the worst case"
BELOW_FLOOR_AND_FALLS = "below the worst-case floor, and it loses to exact here"
_EXACT = Mark("exact", "exact", "M-5.5-5.5H5.5V5.5H-5.5Z", baseline=False)
_PROTOCOLS = {"visible": "Question visible while compressing", "after": "Question asked afterwards"}


def decision_chart(rows: Sequence[Row], marks: Mapping[str, Mark]) -> Chart:
    """Make the figure of score (y) against bytes (x, log scale) for one task, context length and protocol.

    rows   all rows of one cell
    marks  maps each method (a setting without its budget) to its colour and shape; each method is one curve
    """
    exact = next(row for row in rows if row.method == "exact")
    others = sorted((row for row in rows if row is not exact), key=lambda row: (row.state_bytes, row.method))
    sizes = [row.state_bytes for row in rows] + [exact.exact_bytes, exact.floor_bytes, exact.token_id_bytes]
    across = Axis(sizes, LEFT, RIGHT, log=True, room=0.06, most_ticks=6, write=power_text)
    shifts = _shifts(others, across)
    curves: dict[str, list[Datum]] = {method: [] for method in marks}
    for row in others:
        curves[row.configuration].append(_datum(row, shifts[row.method]))
    level = _datum(exact, 0.0)
    return Chart(
        title=f"{_PROTOCOLS[exact.cell.protocol]}, {exact.context:,} tokens",
        label=f"Score against state bytes, {exact.cell}",
        x_name="bytes of state at the end of the context (log scale)",
        across=across,
        up=Axis([0.0, 1.0], BOTTOM, TOP, write=percent_text),
        series=(
            *(Series(marks[method], tuple(data)) for method, data in curves.items() if data),
            Series(_EXACT, (level,)),
        ),
        captions=_notes(rows),
        rules=(
            Rule(
                exact.floor_bytes,
                (
                    f"floor, {bytes_text(exact.floor_bytes)}: worst case",
                    "over keys and values, attention",
                    "as a data structure",
                ),
                "floor",
                top=16,
            ),
            Rule(exact.token_id_bytes, (f"token ids, {bytes_text(exact.token_id_bytes)}",), "tokenids", top=62),
        ),
        level=level,
    )


def note_below_floor(row: Row) -> str:
    """Return a sentence for a row that takes fewer bytes than the floor.

    The sentence says that this task's data is easier than the worst case, for which the floor holds. If the row's score
    is shown to be lower than the exact cache's, the sentence says this too.
    """
    return BELOW_FLOOR_AND_FALLS if row.diff_high < 0 else BELOW_FLOOR


def _shifts(rows: Sequence[Row], across: Axis) -> dict[str, float]:
    """Map each setting to its point's sideways shift, so that points of almost equal bytes stand side by side.

    Shifts are in page coordinates. `rows` are ordered from the fewest bytes up; `across` is the figure's axis of bytes.
    """
    clusters: list[list[Row]] = []
    for row in rows:
        if clusters and across.place(row.state_bytes) - across.place(clusters[-1][0].state_bytes) < 8:
            clusters[-1].append(row)
        else:
            clusters.append([row])
    return {
        row.method: 6.0 * (index - (len(cluster) - 1) / 2) for cluster in clusters for index, row in enumerate(cluster)
    }


def _datum(row: Row, shift: float) -> Datum:
    words = (
        f"{row.method}: {percent_text(row.score)} ({percent_text(row.score_low)} to "
        f"{percent_text(row.score_high)}) in {row.state_bytes:,} bytes"
    )
    if row.below_floor:
        words += f"; {note_below_floor(row)}"
    return Datum(row.state_bytes, row.score, words, (row.score_low, row.score_high), shift, row.below_floor)


def _notes(rows: Sequence[Row]) -> tuple[str, ...]:
    """Return the lines of text below the figure: they name the settings that take fewer bytes than the floor.

    rows: all rows of the figure's cell. One line is for the settings that are shown to score lower than exact, one for
    all others. A line without settings is left out.
    """
    named: dict[str, list[str]] = {}
    for row in rows:
        if row.below_floor:
            named.setdefault(note_below_floor(row), []).append(row.method)
    return tuple(f"◌ {', '.join(settings)}: {note}." for note, settings in sorted(named.items()))
