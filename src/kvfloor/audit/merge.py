"""Merge the parts of an audit, each measured in its own folder, into one audit with a recommendation.

A part is what one call of `kvfloor audit --shard I/N` measured. A setting is a method with its budget. A place is a
text, a cell of the tasks (task, context length, protocol), or a sheet of hidden facts. A measurement is a pair of place
and setting, and its result is a row. A floor is a lower bound on the bytes that any method needs for a kv head. The
exact cache keeps every token.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from kvfloor.audit.grid import EXACT, AnyRow, Pair, Place, pair_of
from kvfloor.audit.header import Header, read_header
from kvfloor.audit.heads import HeadFloor
from kvfloor.audit.identity import differences
from kvfloor.audit.journal import FACTS, FLOORS, ROWS, TEXTS, Journal, read_part
from kvfloor.audit.limits import without_left_out
from kvfloor.audit.recommend import KL_LIMIT
from kvfloor.audit.require import conditions
from kvfloor.audit.rows import Cell
from kvfloor.audit.run import Answer, answer
from kvfloor.files import open_folder

TIMES = frozenset({"seconds", "prefill_ms", "decode_ms_per_token"})
"""Fields of rows that differ from one measurement to the next."""

_RELATIVE, _ABSOLUTE = 1e-3, 1e-5  # rounding differs between processors
_NAMED = 4  # places that an error names


def merge(
    folders: Sequence[Path],
    out: Path,
    *,
    kl_limit: float = KL_LIMIT,
    require: str | None = None,
    command: str = "kvfloor merge",
    announce: Callable[[str], None] = print,
) -> Answer:
    """Merge the rows of an audit's parts into the folder `out`, and return the results of the merged audit.

    folders   the `--out` folders of the parts
    kl_limit  largest tolerated divergence from the exact cache, nats per token
    require   conditions on the rows, as in `kvfloor audit --require`; None: no conditions
    command   command line that the report shows
    announce  function that is called with a line of text if rows of another audit are removed from `out`
    Raises ValueError with one line if a folder holds no audit or a part of another one, if a measurement is missing, or
    if two folders have different figures for one measurement.
    """
    if not kl_limit > 0:
        raise ValueError(f"--kl-limit {kl_limit}: give a number of nats above 0, such as {KL_LIMIT}")
    headers = [_header(folder) for folder in folders]
    for folder, header in zip(folders, headers, strict=True):
        names = differences(headers[0].identity, header.identity)
        if names or header.grid != headers[0].grid:
            raise ValueError(
                f"{str(folder)!r} and {str(folders[0])!r} are parts of different audits "
                f"(another {', '.join(names) or 'order'}): measure them with the same command but for --shard and --out"
            )
    whole = headers[0]
    tasks = tuple(dict.fromkeys(cell.task for cell in whole.cells))
    texts = tuple(dict.fromkeys(cell.text for cell in whole.texts))
    required = () if require is None else conditions(require, whole.methods, tasks, texts)
    rows, floors = _rows(folders), _floors(folders)
    _require_all(whole, rows)
    with Journal(open_folder(out)) as journal:
        if not journal.resume(whole.identity) and journal.header is not None:
            names = ", ".join(differences(journal.header.identity, whole.identity))
            announce(f"{str(out)!r} has another audit (another {names}): its rows are removed")
        machines = "; ".join(dict.fromkeys(header.machine for header in headers))
        seconds = sum(header.seconds for header in headers)
        journal.begin(replace(whole, machine=machines, seconds=seconds, began=time.time()))
        journal.rows, journal.floors = rows, floors
        journal.finish(rows, None, (f"Measured in {len(folders)} parts; the duration is the sum of theirs.",))
        return answer(journal, kl_limit, required, command)


def _header(folder: Path) -> Header:
    header = read_header(folder)
    if header is None:
        raise ValueError(f"{str(folder)!r} holds no audit: give the --out folders of `kvfloor audit --shard I/N`")
    return header


def _rows(folders: Sequence[Path]) -> dict[Pair, AnyRow]:
    """Return the rows of all parts, by measurement.

    Raises ValueError if two parts have different figures for one measurement.
    """
    found: dict[Pair, AnyRow] = {}
    origin: dict[Pair, Path] = {}
    for folder in folders:
        for row in (record for name in (TEXTS, ROWS, FACTS) for record in read_part(folder, name)[0]):
            pair = pair_of(row)
            name = unlike(found.setdefault(pair, row), row)
            if name is not None:
                raise ValueError(
                    f"{str(origin[pair])!r} and {str(folder)!r} measured different figures ({name}) for {pair[1]} on "
                    f"{pair[0]}: measure one of them again with --fresh"
                )
            origin.setdefault(pair, folder)
    return found


def _floors(folders: Sequence[Path]) -> dict[Cell, list[HeadFloor]]:
    """Return the kv heads' floors of all parts, by cell.

    The floors of a cell are taken from the first folder that has them and the exact cache's row on that cell.
    """
    found: dict[Cell, list[HeadFloor]] = {}
    for folder in folders:
        measured = {pair_of(row) for row in read_part(folder, ROWS)[0]}
        here: dict[Cell, list[HeadFloor]] = {}
        for floor in read_part(folder, FLOORS)[0]:
            if (floor.cell, EXACT) in measured:
                here.setdefault(floor.cell, []).append(floor)
        found = here | found
    return found


def _require_all(whole: Header, rows: dict[Pair, AnyRow]) -> None:
    """Raise ValueError, naming the missing measurements, unless every measurement of the audit has a row.

    whole  the audit's description, which lists its places and settings
    rows   the rows of all parts
    On a cell on which the exact cache scores too low, only the exact cache's row is required.
    """
    pairs = without_left_out(whole.grid.pairs, rows, whole.least_exact)
    missing = [pair for pair in pairs if pair not in rows]
    if missing:
        by_place: dict[Place, list[str]] = {}
        for place, setting in missing:
            by_place.setdefault(place, []).append(setting)
        named = [f"{', '.join(settings)} on {place}" for place, settings in list(by_place.items())[:_NAMED]]
        more = f" and others on {len(by_place) - _NAMED:,} more" if len(by_place) > _NAMED else ""
        raise ValueError(
            f"{len(missing):,} of {len(pairs):,} measurements are missing: {'; '.join(named)}{more}; give the folders "
            "of all parts, and run again the parts that were stopped"
        )


def unlike(one: AnyRow, other: AnyRow) -> str | None:
    """Return the name of the first field in which two rows differ by more than rounding; None if they do not.

    `one` and `other` are rows of the same measurement. Measured times are not compared.
    """
    for field in fields(one):
        if field.name not in TIMES and not _alike(getattr(one, field.name), getattr(other, field.name, None)):
            return field.name
    return None


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=_RELATIVE, abs_tol=_ABSOLUTE)
    return one == other
