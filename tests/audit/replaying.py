"""Small audits of the built-in model, whose measurements are made once and replayed with other times."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from kvfloor.audit.closer import Closer
from kvfloor.audit.fact_rows import SheetRow
from kvfloor.audit.grid import AnyRow, Place
from kvfloor.audit.journal import FACTS, FLOORS, ROWS, TEXTS, Measured
from kvfloor.audit.nats import TextRow
from kvfloor.audit.request import AuditRequest
from kvfloor.audit.worker import Worker

TIMES = ("seconds", "prefill_ms", "decode_ms_per_token")


def small(out: Path, **changes: Any) -> AuditRequest:
    """Return a request for 7 settings on two texts and one cell."""
    asked: dict[str, Any] = {
        "methods": ("h2o",),
        "budgets": ("16",),
        "texts": ("mixture-0", "mixture-1"),
        "tasks": ("kv",),
        "contexts": (64,),
        "continuation": 256,
        "facts": 0,
        "n": 32,
    }
    return AuditRequest(out=out, **asked | changes)


class Replaying(Worker):
    """Measure each pair of place and setting once per test session; another time, change the times of the row."""

    made: ClassVar[dict[Any, Worker]] = {}
    kept: ClassVar[dict[Any, Measured]] = {}
    closer: ClassVar[dict[Any, Closer]] = {}
    count = 0  # rows that were asked for

    def __init__(self, question: AuditRequest, folder: Path, track: Callable[[str], None]) -> None:
        key = repr(replace(question, out=Path(), fresh=False, minutes=None, shard=None, command=""))
        self._key = key
        if key not in Replaying.made:
            Replaying.made[key] = Worker(question, folder, track)
        self.__dict__.update(Replaying.made[key].__dict__)

    def measure(self, place: Place, setting: str, exact: AnyRow | None) -> Measured:
        key = (self._key, place, setting)
        if key not in Replaying.kept:
            Replaying.kept[key] = super().measure(place, setting, exact)
        Replaying.count += 1
        found, time = Replaying.kept[key], float(Replaying.count)
        if isinstance(found.row, SheetRow):
            return found
        changed = {"seconds": time} if isinstance(found.row, TextRow) else dict.fromkeys(TIMES[1:], time)
        return replace(found, row=replace(found.row, **changed))

    def look_closer(self, *given: Any) -> Closer:
        """Look closer once per test session and audit."""
        if self._key not in Replaying.closer:
            Replaying.closer[self._key] = super().look_closer(*given)
        return Replaying.closer[self._key]

    def open(self, place: Place) -> None:
        """Open a place only if it is measured anew."""
        if any((self._key, place, setting) not in Replaying.kept for setting in self.grid.settings):
            super().open(place)


def without_times(folder: Path) -> dict[str, list[str]]:
    """Return the lines of an audit's row files, with their times removed and their order kept."""
    found = {}
    for name in (TEXTS, ROWS, FACTS, FLOORS):
        lines = (folder / name).read_text(encoding="utf-8").splitlines()
        plain = [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]
        found[name] = [json.dumps(one) for one in plain]
    return found
