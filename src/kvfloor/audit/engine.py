"""Measure the settings of an audit on this machine, one text or cell after the other.

A setting is a method with its budget; a cell is a task at a context length under a protocol (question asked before or
after the compression). A place is a text or a cell. A measurement is a pair of place and setting, and its result is a
row, which is recorded in the journal (files in the audit's folder). The setting `exact` keeps every token; the others
are compared with its rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from kvfloor.audit.clock import Clock
from kvfloor.audit.closer import Closer
from kvfloor.audit.fact_rows import FactSheet
from kvfloor.audit.grid import EXACT, AnyRow, Asked, Grid, Place
from kvfloor.audit.journal import Journal
from kvfloor.audit.nats import TextCell, TextRow
from kvfloor.audit.ranks import Lead
from kvfloor.audit.recommend import Recommendation
from kvfloor.audit.request import AuditRequest
from kvfloor.audit.rows import Cell, Row
from kvfloor.audit.worker import Worker

_OPENS = {TextCell: "the exact predictions", Cell: "samples and traces", FactSheet: "its facts"}


class Engine(Protocol):
    """Define the interface of an engine: it makes an audit's measurements, and records each row at once."""

    @property
    def grid(self) -> Grid:
        """Return the places and settings of the audit."""
        ...

    def measure(self, asked: Asked, journal: Journal, clock: Clock, track: Callable[[str], None]) -> None:
        """Make every measurement that is asked for and not yet in the journal, and add its row to the journal.

        asked    function that returns the measurements to make, given the rows so far
        journal  the recorded rows
        clock    decides which places still fit into the time limit; the others are left out
        track    function that is called with a line of text before each measurement
        """
        ...

    def look_closer(
        self, rows: Sequence[Row], texts: Sequence[TextRow], answer: Recommendation, track: Callable[[str], None]
    ) -> Closer:
        """Measure errors of the attention output and floors by kv head, and example answers, and return them.

        A floor is a lower bound on the bytes that any method needs for the head. The example answers are those of
        `exact` and of the recommended setting to the same prompts.

        rows, texts  the measured rows of the cells, and those of the texts
        answer       the recommendation that follows from these rows
        track        function that is called with a line of text before each step
        """
        ...

    def close(self) -> None:
        """Free the model, or the processes that hold it."""
        ...


class Here:
    """Measure with one model in this process: all settings on one place, then the next place.

    If the model is sharded over several processes, this one leads the others (`audit/ranks.py`).
    """

    def __init__(self, question: AuditRequest, folder: Path, track: Callable[[str], None]) -> None:
        """Load the model in `folder`, and make the texts and samples that `question`, the audit's arguments, asks for.

        track: function that is called with a line of text before each long step.
        """
        self._worker = (Worker if question.tp is None else Lead)(question, folder, track)

    @property
    def grid(self) -> Grid:
        """Return the places and settings of the audit."""
        return self._worker.grid

    def measure(self, asked: Asked, journal: Journal, clock: Clock, track: Callable[[str], None]) -> None:
        """Make every measurement that is asked for and not yet in the journal, and add its row to the journal.

        asked    function that returns the measurements to make, given the rows so far. It is called again before each
                 place, as its result may depend on the rows of the places before
        journal  the recorded rows
        clock    decides which places still fit into the time limit; the others are left out
        track    function that is called with a line of text before each measurement
        """
        worker, count, is_first = self._worker, len(self.grid.settings), not journal.rows
        done: set[Place] = set()
        while left := [pair for pair in journal.missing(asked(journal.rows)) if pair[0] not in done]:
            rest = sum(worker.tokens(at) for at, _ in left if at not in self.grid.further) // count
            if not clock.has_room_for(rest):
                asked.hurry()
                left = [pair for pair in journal.missing(asked(journal.rows)) if pair[0] not in done]
            place = left[0][0]
            done.add(place)
            todo = [setting for at, setting in left if at == place]
            name = None if place in self.grid.further else str(place)
            tokens = worker.tokens(place) * len(todo) // count
            if not clock.fits(name, tokens):
                continue
            begin = time.perf_counter()
            is_text = isinstance(place, TextCell)
            track(f"{place}: {_OPENS[type(place)]}")
            worker.open(place)
            if is_text and clock.per_token is None:
                texts = len({at for at, _ in left if isinstance(at, TextCell)})
                seconds, must = time.perf_counter() - begin, is_first and len(todo) == count
                clock.expect(seconds, worker.tokens(place), count, texts, must=must)
                if not is_first and not clock.fits(name, tokens):
                    continue
            for setting in todo:
                if (place, setting) not in asked(journal.rows):  # exact cannot do this cell
                    break
                track(f"{place}: {setting}")
                journal.add(worker.measure(place, setting, exact_row(journal, place, setting)))
            clock.took(time.perf_counter() - begin, max(1, tokens))

    def look_closer(
        self, rows: Sequence[Row], texts: Sequence[TextRow], answer: Recommendation, track: Callable[[str], None]
    ) -> Closer:
        """Measure errors of the attention output and floors by kv head, and example answers, and return them.

        A floor is a lower bound on the bytes that any method needs for the head. The example answers are those of
        `exact` and of the recommended setting to the same prompts.

        rows, texts  the measured rows of the cells, and those of the texts
        answer       the recommendation that follows from these rows
        track        function that is called with a line of text before each step
        """
        return self._worker.look_closer(rows, texts, answer, track)

    def close(self) -> None:
        """Free the model."""
        del self._worker


def exact_row(journal: Journal, place: Place, setting: str) -> AnyRow | None:
    """Return the row of `exact` on a place, with which that of `setting` is compared; None if `setting` is `exact`."""
    return None if setting == EXACT else journal.rows[place, EXACT]
