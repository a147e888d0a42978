"""Tabulate the parts of answers: the share that each setting met of each part, where a task's answers have several."""

from collections.abc import Sequence
from dataclasses import dataclass

from kvfloor.audit.rows import Cell, Row
from kvfloor.report.tables import ordered


@dataclass(frozen=True)
class PartTable:
    """Hold the table of one cell: the parts' names, and per setting (method with budget) a share of each, 0 to 1."""

    cell: Cell
    names: tuple[str, ...]
    lines: tuple[tuple[str, tuple[float, ...]], ...]


def part_tables(rows: Sequence[Row]) -> tuple[PartTable, ...]:
    """Return a table for each cell whose answers have several parts, or a part of several demands."""
    tables = []
    for cell in sorted({row.cell for row in rows}):
        some = [row for row in ordered(rows) if row.cell == cell]
        names = tuple(some[0].parts)
        if any(tuple(row.parts.values()) != (row.score,) for row in some):
            lines = tuple((row.method, tuple(row.parts[name] for name in names)) for row in some)
            tables.append(PartTable(cell, names, lines))
    return tuple(tables)
