"""Tabulate scores by part of the answer, for tasks whose answers consist of several parts.

A part is a named demand on an answer, such as "first word"; an answer meets a share of it, from 0 to 1. A setting is a
method (KV-cache compressor) with its budget. A cell is a task at a context length under a protocol (question asked
before or after the compression). A row is one setting measured on one cell.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from kvfloor.audit.rows import Cell, Row
from kvfloor.report.tables import ordered


@dataclass(frozen=True)
class PartTable:
    """Hold the table of one cell: the parts' names, and one line (setting, mean share met of each part) per setting."""

    cell: Cell
    names: tuple[str, ...]
    lines: tuple[tuple[str, tuple[float, ...]], ...]


def part_tables(rows: Sequence[Row]) -> tuple[PartTable, ...]:
    """Return one table per cell, sorted by cell, with the mean share met of each part by each setting.

    rows: all rows of the audit, on any number of cells. A cell gets no table if the table would only repeat the scores
    (shares of right answers): if its answers have a single part, and each setting's mean share of this part equals the
    setting's score.
    """
    tables = []
    for cell in sorted({row.cell for row in rows}):
        some = [row for row in ordered(rows) if row.cell == cell]
        names = tuple(some[0].parts)
        if any(tuple(row.parts.values()) != (row.score,) for row in some):
            lines = tuple((row.method, tuple(row.parts[name] for name in names)) for row in some)
            tables.append(PartTable(cell, names, lines))
    return tuple(tables)
