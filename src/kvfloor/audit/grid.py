"""List what an audit measures: every setting (method with budget) on every text and every cell of the tasks.

A cell is a task at a context length under a protocol (question asked before or after the compression). A sheet is a
prompt with hidden facts. A place is a text, a cell or a sheet. A measurement is a pair of place and setting; its result
is a row. The setting `exact` keeps every token; the others are compared with it. An audit with a time limit is a race:
settings that clearly lose stop early, and undecided ones are measured on further places: more passages of the same
texts, and more rounds of samples of the same tasks. Round 1 of a cell has its first n samples, round 2 the next n, and
so on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from kvfloor.audit.fact_rows import FactSheet, SheetRow
from kvfloor.audit.nats import TextCell, TextRow
from kvfloor.audit.rows import Cell, Row

Place: TypeAlias = TextCell | Cell | FactSheet
AnyRow: TypeAlias = TextRow | Row | SheetRow
Pair: TypeAlias = tuple[Place, str]


class Asked(Protocol):
    """Define the interface of a rule that chooses the measurements of an audit, given the rows so far."""

    def __call__(self, rows: Mapping[Pair, AnyRow], /) -> Sequence[Pair]:
        """Return all measurements that the audit should make, given the rows so far, in the order of measuring.

        Those that have a row already are included.
        """
        ...

    def hurry(self) -> None:
        """Tell the rule that the time is too short for all measurements. In a race it returns fewer from now on."""
        ...


EXACT = "exact"
"""The setting that keeps every token. The others are compared with it, so it is measured first on every place."""


def pair_of(row: AnyRow) -> Pair:
    """Return the place (text, cell or sheet) and the setting of a measured row."""
    return row.cell, row.method


@dataclass(frozen=True)
class Grid:
    """Hold the places and settings of an audit, in the order of its rows.

    places    the texts, then the cells of the tasks, then the sheets of hidden facts
    settings  the settings as text, e.g. `h2o@256`; `exact` first
    further   further passages of the texts and further rounds of the cells, on which a race measures undecided
              settings; in the order of measuring
    chat      names of the tasks whose samples are in the model's chat template
    notes     sentences for the report, on what cannot be measured
    """

    places: tuple[Place, ...]
    settings: tuple[str, ...]
    further: tuple[Place, ...] = ()
    chat: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """Return every measurement, place by place, but none on further places."""
        return tuple((place, setting) for place in self.places for setting in self.settings)

    @property
    def all_pairs(self) -> tuple[Pair, ...]:
        """Return every measurement, place by place; those on further places come last."""
        return self.pairs + tuple((place, setting) for place in self.further for setting in self.settings)

    def part(self, shard: tuple[int, int] | None) -> tuple[Pair, ...]:
        """Return the i-th of n parts of the measurements for shard (i, n), i from 1; all measurements for None.

        The measurements are those of `pairs`. A part is a run of consecutive ones, about 1/n of all. It also has the
        measurement of `exact` on each of its places, as the other rows of the place are compared with that row.
        """
        if shard is None:
            return self.pairs
        i, n = shard
        count = len(self.pairs)
        own = self.pairs[count * (i - 1) // n : count * i // n]
        needed = {(place, EXACT) for place, _ in own}.union(own)
        return tuple(pair for pair in self.pairs if pair in needed)
