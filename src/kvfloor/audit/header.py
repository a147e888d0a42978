"""Describe the audit in a folder (`audit.json`): what its rows depend on, what is to be measured, and when it ran."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from kvfloor.audit.grid import Grid
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

    model, seed  as the user gave them
    identity     all that the rows depend on (`audit/identity.py`)
    settings     (text, True for a baseline, True if asked for) of each method with its budget
    texts, cells  the places where each setting is measured
    further      more texts, which close calls alone read
    least_exact  score of exact below which a cell is left out; its row of exact is the only one then
    chat         names of the tasks whose samples are in the model's chat template
    versions     name -> version of each program
    machine      the machine in words
    hashes       file or text -> SHA-256 of what was measured: the model's weights, texts, prompts
    began        time at which the last start of the audit began, seconds since 1970
    seconds      time that earlier starts took
    racing       True if clear losers stopped early, and close calls read on (`audit/race.py`)
    minutes      time limit of the last start that ended by itself; None: no limit
    ended        True if a start ended by itself; notes: sentences for the report, such as what was left out
    """

    model: str
    seed: int
    identity: dict[str, Any]
    settings: Sequence[tuple[str, bool, bool]]
    texts: Sequence[TextCell]
    cells: Sequence[Cell]
    further: Sequence[TextCell]
    versions: dict[str, str]
    machine: str
    began: float
    seconds: float = 0.0
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
        """Return the places and settings of the audit."""
        settings = tuple(text for text, _, _ in self.settings)
        return Grid((*self.texts, *self.cells), settings, tuple(self.further), tuple(self.chat))

    @property
    def methods(self) -> list[BudgetedMethod]:
        """Return the settings with their parsed methods."""
        return [BudgetedMethod(parse(text), baseline, asked) for text, baseline, asked in self.settings]

    def write(self, folder: Path) -> None:
        """Write `audit.json` in a folder, whole or not at all."""
        replace_file(folder / NAME, json.dumps(asdict(self), indent=1) + "\n")


def read_header(folder: Path) -> Header | None:
    """Read the `audit.json` of a folder; None where there is none. Raises ValueError for one that cannot be read."""
    path = folder / NAME
    if not path.exists():
        return None
    try:
        plain = json.loads(read_regular(path, _MOST_BYTES, "description of an audit"))
        if set(plain) != {field.name for field in fields(Header)} or plain["schema"] != _SCHEMA:
            raise ValueError("written by another version of kvfloor")
        header = Header(**plain)
        cells = {name: [TextCell(*one) for one in plain[name]] for name in ("texts", "further")}
        cells |= {"cells": [Cell(*one) for one in header.cells]}
        return Header(**plain | cells | {"settings": [(t, bool(b), bool(a)) for t, b, a in header.settings]})
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"cannot read {str(path)!r}: {error}; choose another --out, or pass --fresh") from error
