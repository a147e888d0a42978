"""Describe the audit in a folder (`audit.json`): what its rows depend on, what is to be measured, and when it ran.

A setting is a method with its budget. A row is the result of one setting on one text or cell; a cell is a task at a
context length under a protocol. The exact cache keeps every token; the settings are compared with it. A start is one
run of the command: an audit that was stopped goes on in a later start. An audit with a time limit may read further
passages of the texts, and further rounds of samples of the cells: round 1 has the first n, round 2 the next n.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from kvfloor.audit.fact_rows import FactSheet
from kvfloor.audit.grid import Grid, Place
from kvfloor.audit.nats import TextCell
from kvfloor.audit.rows import Cell
from kvfloor.audit.setting import BudgetedMethod
from kvfloor.files import read_regular, replace_file
from kvfloor.methods.grammar import parse

NAME = "audit.json"
_SCHEMA = 1
_MOST_BYTES = 2**24


@dataclass(frozen=True)
class Header:
    """Hold what `audit.json` says about the rows beside it.

    model, seed   as the user gave them
    identity      all that the rows depend on, such as file digests and versions (`audit/identity.py`)
    settings      (text, True for a baseline, True if asked for) of each setting; every audit includes the baselines
    texts, cells  the texts and cells on which each setting is measured
    sheets        the prompts with hidden facts that each setting is asked for
    further       more passages of the texts and rounds of the cells' samples, for undecided settings alone
    least_exact   score of the exact cache on a cell below which no other setting is measured on that cell
    chat          names of the tasks whose samples are in the model's chat template
    versions      name -> version of each program
    machine       the machine in words
    hashes        file or text -> SHA-256 of what was measured: the model's weights, texts, prompts
    began         time at which the last start began, seconds since 1970
    seconds       time that earlier starts took
    racing        True if settings that clearly lose stop early, and undecided ones have further passages and samples
    minutes       time limit, in minutes, of the last start that came to its end; None: no limit
    ended         True if a start came to its end, instead of being stopped
    notes         sentences for the report, such as what was left out
    schema        version of the file's format
    """

    model: str
    seed: int
    identity: dict[str, Any]
    settings: Sequence[tuple[str, bool, bool]]
    texts: Sequence[TextCell]
    cells: Sequence[Cell]
    further: Sequence[Place]
    versions: dict[str, str]
    machine: str
    began: float
    seconds: float = 0.0
    sheets: Sequence[FactSheet] = ()
    hashes: dict[str, str] = field(default_factory=dict)
    minutes: float | None = None
    racing: bool = False
    least_exact: float = 0.0
    chat: Sequence[str] = ()
    ended: bool = False
    notes: Sequence[str] = ()
    schema: int = _SCHEMA

    @property
    def grid(self) -> Grid:
        """Return the texts, cells, sheets and settings that are to be measured, in the order of the rows."""
        settings = tuple(text for text, _, _ in self.settings)
        return Grid((*self.texts, *self.cells, *self.sheets), settings, tuple(self.further), tuple(self.chat))

    @property
    def methods(self) -> list[BudgetedMethod]:
        """Return the settings: each with its parsed method, and if it is a baseline and if it was asked for."""
        return [BudgetedMethod(parse(text), baseline, asked) for text, baseline, asked in self.settings]

    def write(self, folder: Path) -> None:
        """Write `audit.json` to a folder; a failed write leaves the file as it was."""
        replace_file(folder / NAME, json.dumps(asdict(self), indent=1) + "\n")


def read_header(folder: Path) -> Header | None:
    """Read the `audit.json` of a folder; None if there is none. Raises ValueError if it cannot be read.

    It cannot be read if another version of kvfloor wrote it in another format.
    """
    path = folder / NAME
    if not path.exists():
        return None
    try:
        plain = json.loads(read_regular(path, _MOST_BYTES, "description of an audit"))
        if set(plain) != {field.name for field in fields(Header)} or plain["schema"] != _SCHEMA:
            raise ValueError("written by another version of kvfloor")
        header = Header(**plain)
        places = {name: [_place(one) for one in plain[name]] for name in ("texts", "cells", "sheets", "further")}
        return Header(**plain | places | {"settings": [(t, bool(b), bool(a)) for t, b, a in header.settings]})
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"cannot read {str(path)!r}: {error}; choose another --out, or pass --fresh") from error


def _place(plain: Sequence[Any]) -> Place:
    """Convert a list that was read from JSON to a `TextCell`, a `Cell` or a `FactSheet`."""
    if isinstance(plain[0], int):
        return FactSheet(*plain)
    return TextCell(*plain) if isinstance(plain[2], int) else Cell(*plain)
