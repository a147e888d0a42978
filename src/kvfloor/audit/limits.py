"""Leave out the cells that the model itself cannot do, and write the notes of a report about its cells.

A cell is a task at a context length under a protocol.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from kvfloor.audit.format import percent_text
from kvfloor.audit.grid import EXACT, AnyRow, Pair
from kvfloor.audit.rows import Cell, Row


def left_out(rows: Mapping[Pair, AnyRow], least: float) -> dict[Cell, Row]:
    """Return the cells where exact scores below `least`, each with exact's row."""
    return {
        row.cell: row
        for (_, setting), row in rows.items()
        if setting == EXACT and isinstance(row, Row) and row.score < least
    }


def without_left_out(pairs: Iterable[Pair], rows: Mapping[Pair, AnyRow], least: float) -> list[Pair]:
    """Return the measurements without those on left-out cells; `exact` alone is measured there."""
    weak = left_out(rows, least)
    return [pair for pair in pairs if pair[0] not in weak or pair[1] == EXACT]


@dataclass(frozen=True)
class Fixed:
    """Ask for fixed measurements, but for those on left-out cells (`without_left_out`)."""

    pairs: tuple[Pair, ...]
    least_exact: float

    def __call__(self, rows: Mapping[Pair, AnyRow], /) -> list[Pair]:
        """Return the measurements that are asked for, given the rows so far."""
        return without_left_out(self.pairs, rows, self.least_exact)

    def hurry(self) -> None:
        """Do nothing: what does not fit is left out place by place."""


def left_out_notes(weak: Sequence[Row], least: float) -> tuple[str, ...]:
    """Return at most one sentence: the cells where exact scores below `least`, from their rows, and what to do."""
    if not weak:
        return ()
    cells = "; ".join(f"{row.cell} ({percent_text(row.score)})" for row in weak)
    return (
        f"Left out, because exact itself scores below {percent_text(least)} there: {cells}. "
        "Give easier tasks or shorter contexts, or keep them with --least-exact 0.",
    )


def chat_notes(tasks: Sequence[str]) -> tuple[str, ...]:
    """Return at most one sentence: the tasks whose samples are in the model's chat template."""
    return (f"Asked in the model's chat template: {', '.join(tasks)}.",) if tasks else ()
