"""Keep the rows of an audit in its folder while it runs: each is on the disk before the next one is measured.

A place is a text, a cell of the tasks (task, context length, protocol), or a sheet of hidden facts. A setting is a
method with its budget. A row is the result of one setting on one place. The setting `exact` keeps every token. The
floor of a kv head is a lower bound on the bytes that any method needs for it. The folder has `audit.json` (description
of the audit), `nats.jsonl` (rows of texts), `rows.jsonl` (rows of cells), `facts.jsonl` (rows of sheets) and
`floors.jsonl` (floors of the kv heads). Rows are appended and flushed one by one, so a killed audit loses at most the
row that it was measuring. At the end the files are written anew in the order of the report.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvfloor.audit.fact_rows import SheetRow
from kvfloor.audit.grid import EXACT, AnyRow, Pair, pair_of
from kvfloor.audit.header import Header, read_header
from kvfloor.audit.heads import HeadFloor, with_cell
from kvfloor.audit.nats import MOST_BYTES as MOST_TEXT_BYTES
from kvfloor.audit.nats import TextRow
from kvfloor.audit.records import line_of, read_growing, write_records
from kvfloor.audit.rows import MOST_BYTES, Cell, Row
from kvfloor.files import FolderLock, append_to, cut_to

EXPLANATIONS = ("output_errors.jsonl", "text_floors.jsonl", "examples.jsonl")
"""Files that explain an audit's result: errors by head, floors on a text, example answers; written in this order."""

TEXTS, ROWS, FACTS, FLOORS = "nats.jsonl", "rows.jsonl", "facts.jsonl", "floors.jsonl"
_KINDS: dict[str, tuple[type, int, str]] = {
    TEXTS: (TextRow, MOST_TEXT_BYTES, "a row of an audit's texts"),
    ROWS: (Row, MOST_BYTES, "an audit row"),
    FACTS: (SheetRow, MOST_BYTES, "a row of a sheet of facts"),
    FLOORS: (HeadFloor, MOST_BYTES, "the floor of a kv head"),
}


@dataclass(frozen=True)
class Measured:
    """Hold one measured row, and the floors of the model's kv heads on its cell; only a row of `exact` has floors."""

    row: AnyRow
    floors: tuple[HeadFloor, ...] = ()


class Journal:
    """Hold the measured rows of an audit, in memory and in its folder, which no other audit may use meanwhile.

    rows    the row of each pair of place and setting
    floors  the floors of the kv heads on each cell that `exact` was measured on
    header  the description of the audit that the folder holds; None: it holds none, or was not read yet
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: dict[Pair, AnyRow] = {}
        self.floors: dict[Cell, list[HeadFloor]] = {}
        self.header: Header | None = None
        self._lock = FolderLock(folder)

    def __enter__(self) -> Journal:
        """Lock the folder. Raises ValueError if another process has locked it."""
        self._lock.take()
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def resume(self, identity: dict[str, Any]) -> bool:
        """Read the rows in the folder if they belong to the audit of this identity; return True if they do.

        identity: all that the audit's rows depend on, as plain JSON types. A line that was cut off while it was written
        is removed. Floors are written before the row of `exact` on their cell; those without this row are removed too.
        """
        self.header = read_header(self.folder)
        if self.header is None or self.header.identity != identity:
            return False
        for name in _KINDS:
            records, size = read_part(self.folder, name)
            cut_to(self.folder / name, size)
            self._take(records)
        kept = {cell: found for cell, found in self.floors.items() if (cell, EXACT) in self.rows}
        if kept != self.floors:  # the audit ended between floors and their row: both are measured again
            self.floors = kept
            self._write_floors()
        return True

    def begin(self, header: Header) -> None:
        """Write `header`, the description of the audit that starts or goes on now, to the folder.

        If the folder has rows of another audit, they are removed first.
        """
        if self.header is None or self.header.identity != header.identity or not self.rows:
            for name in (*_KINDS, *EXPLANATIONS):  # before the description: no row is taken for one of the new audit
                (self.folder / name).unlink(missing_ok=True)
            self.rows, self.floors = {}, {}
        header.write(self.folder)
        self.header = header

    def missing(self, pairs: Iterable[Pair]) -> list[Pair]:
        """Return those of the given pairs of place and setting that have no row yet."""
        return [pair for pair in pairs if pair not in self.rows]

    def add(self, measured: Measured) -> None:
        """Append a row to its file, after the floors that came with it, and flush both to the disk.

        Raises ValueError with one line if they cannot be written, e.g. on a full disk; the rows so far are kept.
        """
        row = measured.row
        try:
            if measured.floors:
                append_to(self.folder / FLOORS, "".join(map(line_of, measured.floors)).encode())
            append_to(self.folder / _file_of(row), line_of(row).encode())
        except ValueError as error:
            kept = f"{len(self.rows)} of {len(self.about.grid.pairs)} measurements are kept"
            raise ValueError(f"{error} ({kept}: the same command goes on from there)") from error
        self._take((*measured.floors, row))

    def finish(self, kept: Collection[Pair], minutes: float | None, notes: Sequence[str]) -> None:
        """Keep only the rows of the pairs `kept`, write the files anew, and note in `audit.json` that the audit ended.

        minutes  the audit's time limit; None: no limit
        notes    sentences for the report
        """
        self.rows = {pair: row for pair, row in self.rows.items() if pair in kept}
        self.sort(ended=True, minutes=minutes, notes=tuple(notes))

    def sort(self, **changes: Any) -> None:
        """Write the files anew in the order of the report; in `audit.json`, replace the fields that `changes` names."""
        header = replace(self.about, seconds=self.seconds, **changes)
        self.rows = {pair: self.rows[pair] for pair in header.grid.all_pairs if pair in self.rows}
        self.floors = {cell: self.floors.get(cell, []) for cell in header.cells if (cell, EXACT) in self.rows}
        write_records(self.folder / TEXTS, self.texts)
        write_records(self.folder / ROWS, self.tasks)
        write_records(self.folder / FACTS, self.facts)
        self._write_floors()
        self.header = replace(header, began=time.time())
        self.header.write(self.folder)

    @property
    def seconds(self) -> float:
        """Return the seconds that all runs of the audit's command took together.

        A run counts up to its last row, even if it was killed later.
        """
        last = [path.stat().st_mtime for path in map(self.folder.joinpath, (TEXTS, ROWS, FACTS)) if path.exists()]
        return self.about.seconds + max(0.0, max(last, default=0.0) - self.about.began)

    @property
    def texts(self) -> list[TextRow]:
        """Return the rows of the texts."""
        return [row for row in self.rows.values() if isinstance(row, TextRow)]

    @property
    def tasks(self) -> list[Row]:
        """Return the rows of the cells."""
        return [row for row in self.rows.values() if isinstance(row, Row)]

    @property
    def facts(self) -> list[SheetRow]:
        """Return the rows of the sheets of hidden facts."""
        return [row for row in self.rows.values() if isinstance(row, SheetRow)]

    @property
    def about(self) -> Header:
        """Return the description of the audit. Call `resume` or `begin` first."""
        assert self.header is not None
        return self.header

    def _write_floors(self) -> None:
        write_records(self.folder / FLOORS, [floor for found in self.floors.values() for floor in found])

    def _take(self, records: Iterable[Any]) -> None:
        for record in records:
            if isinstance(record, HeadFloor):
                assert isinstance(record.cell, Cell)
                self.floors.setdefault(record.cell, []).append(record)
            else:
                self.rows[pair_of(record)] = record


def _file_of(row: AnyRow) -> str:
    """Return the name of the file that a row belongs to."""
    return next(name for name, (kind, _, _) in _KINDS.items() if isinstance(row, kind))


def is_explained(folder: Path) -> bool:
    """Return True if an audit's folder has the files of EXPLANATIONS: errors by head, floors and example answers."""
    return (folder / EXPLANATIONS[-1]).exists()


def read_part(folder: Path, name: str) -> tuple[list[Any], int]:
    """Read the records of one of a journal's files, and return (records, size of its complete lines in bytes).

    name: `nats.jsonl`, `rows.jsonl`, `facts.jsonl` or `floors.jsonl`. A last line that was cut off while it was written
    is left out. Raises ValueError for any other line that is not a record, and for a file that is larger than an
    audit's can be.
    """
    kind, most, what = _KINDS[name]
    records, size = read_growing(folder / name, kind, most, name, what)
    if kind is HeadFloor:
        records = [with_cell(one) for one in records]
    return records, size
