"""Leave out the cells that the model cannot do even with the exact cache, and write a report's sentences on cells.

A cell is a task at a context length under a protocol (question asked before or after the compression). It is left out
if the exact cache, which keeps every token, scores (share of right answers) too low on it: then no loss could be seen.
A sheet is a prompt with hidden facts; it is left out if the exact cache returns no more of them than guesses would. A
place is a text, a cell or a sheet; a measurement is a pair of place and setting (method with budget), and its result is
a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from kvfloor.audit.fact_rows import FactSheet, SheetRow
from kvfloor.audit.format import counted, percent_text
from kvfloor.audit.grid import EXACT, AnyRow, Pair
from kvfloor.audit.rows import Cell, Row


def left_out(rows: Mapping[Pair, AnyRow], least: float) -> dict[Cell, Row]:
    """Return the cells on which the exact cache scores below `least`, each with the exact cache's row.

    rows: the rows so far, by measurement. An audit with a time limit may measure a cell on several rounds of samples
    (the first n, the next n, ...); only the score of the first round counts here.
    """
    return {
        row.cell: row
        for (_, setting), row in rows.items()
        if setting == EXACT and isinstance(row, Row) and row.round == 1 and row.score < least
    }


def unreadable(rows: Mapping[Pair, AnyRow]) -> dict[FactSheet, SheetRow]:
    """Return the sheets of which the exact cache returns no more facts than guesses, each with the exact cache's row.

    rows: the rows so far, by measurement. On such a sheet nothing can be said about a cache: it is the model that
    cannot do the task.
    """
    exact = (row for (_, setting), row in rows.items() if setting == EXACT and isinstance(row, SheetRow))
    return {row.cell: row for row in exact if row.only_guesses}


def without_left_out(pairs: Iterable[Pair], rows: Mapping[Pair, AnyRow], least: float) -> list[Pair]:
    """Return the measurements `pairs`; of those on left-out places, only the exact cache's remain.

    A cell is left out if the exact cache's row, among the `rows` so far, has a score below `least`; a sheet, if the
    exact cache returns no more of its facts than guesses.
    """
    weak = left_out(rows, least).keys() | unreadable(rows).keys()
    return [pair for pair in pairs if pair[0] not in weak or pair[1] == EXACT]


@dataclass(frozen=True)
class Fixed:
    """Ask for a fixed list of measurements; of those on left-out cells, only for the exact cache's.

    pairs        the measurements
    least_exact  score of the exact cache below which a cell is left out
    """

    pairs: tuple[Pair, ...]
    least_exact: float

    def __call__(self, rows: Mapping[Pair, AnyRow], /) -> list[Pair]:
        """Return the measurements that are asked for, given the rows so far; those with a row are included."""
        return without_left_out(self.pairs, rows, self.least_exact)

    def hurry(self) -> None:
        """Do nothing: the list stays as it is when the time is too short for all of it.

        Whoever measures the list then leaves out each place that does not fit into the time.
        """


def left_out_notes(weak: Sequence[Row], least: float) -> tuple[str, ...]:
    """Return at most one sentence, in a tuple: it names the left-out cells, and says what to do about them.

    weak   the exact cache's row on each left-out cell
    least  score below which they were left out
    The tuple is empty if no cell was left out.
    """
    if not weak:
        return ()
    cells = "; ".join(f"{row.cell} ({percent_text(row.score)})" for row in weak)
    return (
        f"Left out, because exact itself scores below {percent_text(least)} there: {cells}. "
        "Give easier tasks or shorter contexts, or keep them with --least-exact 0.",
    )


def unreadable_note(weak: Sequence[SheetRow]) -> str:
    """Return a sentence that counts the sheets that the model cannot recall facts from; "" if there are none.

    weak: the exact cache's row on each of these sheets
    """
    if not weak:
        return ""
    facts, right = sum(row.facts for row in weak), sum(sum(row.right) for row in weak)
    return (
        f"With exact the model itself returns {right} of {counted(facts, 'fact')} on {counted(len(weak), 'sheet')}, "
        "no more than guesses would. It cannot do this task, whatever the cache, so no other setting was asked there."
    )


def chat_notes(tasks: Sequence[str]) -> tuple[str, ...]:
    """Return a tuple with one sentence that names `tasks`, whose samples were put into the model's chat template.

    The tuple is empty if there are no such tasks.
    """
    return (f"Asked in the model's chat template: {', '.join(tasks)}.",) if tasks else ()
