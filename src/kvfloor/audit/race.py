"""Spend an audit's minutes where they decide: clear losers stop early, and close calls read further texts.

A setting is a method with its budget. A place is a text, or a cell of the tasks (task, context length, protocol). A
measurement is a pair of place and setting; its result is a row. A setting's divergence is its mean KL to the exact
cache, which keeps every token. A verdict on a setting is "holds" (its divergence is shown to be below the limit and no
task shows a loss), "falls" (its divergence certainly exceeds the limit, or a loss on a task is certain) or "open".

A race is an audit with a time limit. It goes through the texts one by one. From the moment that the time is too short
for all settings on all of them, a setting whose divergence certainly exceeds the limit stops: it reads no further text
and runs no task. When all texts are read and all tasks run, further texts (more passages of the same texts) are read by
close calls only: settings whose verdict is open and could still change the recommendation. These decisions follow from
the rows alone, so an audit that was stopped and goes on decides alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from kvfloor.audit.criterion import Standard
from kvfloor.audit.format import counted
from kvfloor.audit.grid import EXACT, AnyRow, Grid, Pair, Place
from kvfloor.audit.limits import left_out
from kvfloor.audit.nats import TextCell, TextRow
from kvfloor.audit.recommend import CONFIDENCE, MARGIN, UNJUDGED, Judged, recommend
from kvfloor.audit.rows import Row

Rows = Mapping[Pair, AnyRow]


@dataclass
class Race:
    """Say which measurements a race asks for.

    grid         the places in order, the settings, and the further texts
    standard     the limit of the divergence and the confidence by which settings are judged
    least_exact  score of the exact cache below which a cell is left out, i.e. measured with the exact cache alone
    hurried      True if the time is too short for all settings on all places
    """

    grid: Grid
    standard: Standard
    least_exact: float = 0.0
    hurried: bool = False
    _close: dict[Place, frozenset[str]] = field(default_factory=dict)

    def hurry(self) -> None:
        """Stop from now on each setting whose divergence certainly exceeds the limit, as the time is too short."""
        self.hurried = True

    def __call__(self, rows: Rows, /) -> list[Pair]:
        """Return the measurements that the race asks for, given the rows so far, in the order of measuring.

        The result includes those that have a row already. It has a further text only if everything before that text is
        measured.
        """
        weak = left_out(rows, self.least_exact)
        pairs: list[Pair] = []
        read: dict[str, list[TextRow]] = {setting: [] for setting in self.grid.settings}
        stopped: set[str] = set()
        for place in self._places:
            if place in self.grid.further:
                if any(pair not in rows for pair in pairs):
                    break
                close = self._close_calls(place, {pair: row for pair, row in rows.items() if pair[0] not in weak})
                here = [setting for setting in self.grid.settings if close and setting in (*close, EXACT)]
            elif place in weak:
                here = [EXACT]
            else:
                here = [setting for setting in self.grid.settings if setting not in stopped]
            pairs += [(place, setting) for setting in here]
            if self.hurried and isinstance(place, TextCell):
                for setting in here:
                    if isinstance(row := rows.get((place, setting)), TextRow):
                        read[setting].append(row)
                stopped |= {s for s in here if s != EXACT and read[s] and self.standard.exceeds(read[s])}
        return pairs

    def note(self, rows: Iterable[Pair]) -> str:
        """Return a sentence on the settings that stopped early and those that read further texts; "" if none did.

        rows: the measurements that have a row.
        """
        texts = [(at, setting) for at, setting in rows if isinstance(at, TextCell)]
        count = Counter(setting for _, setting in texts)
        first = sum(setting == EXACT and at not in self.grid.further for at, setting in texts)
        early = [f"{setting} ({n})" for setting, n in count.items() if n < first]
        more = [f"{setting} ({n})" for setting, n in count.items() if n > first and setting != EXACT]
        told = []
        if early:
            told.append(f"{', '.join(early)} stopped early, as their divergence certainly exceeds the limit")
        if more:
            told.append(f"{', '.join(more)} read further passages, as close calls")
        return f"Of {counted(first, 'text')}, with the number read: {'; '.join(told)}." if told else ""

    @property
    def _places(self) -> tuple[Place, ...]:
        return (*self.grid.places, *self.grid.further)

    def _close_calls(self, place: Place, rows: Rows) -> frozenset[str]:
        """Return the close calls that read the further text `place`, given the rows of the places before it.

        The answer for a text is kept, so that it does not change while the text is read.
        """
        if place not in self._close:
            before = self._places[: self._places.index(place)]
            known = [rows[at, setting] for at in before for setting in self.grid.settings if (at, setting) in rows]
            self._close[place] = frozenset(close_calls(known, self.standard))
        return self._close[place]


def race(grid: Grid, configurations: Iterable[str], kl_limit: float, least_exact: float = 0.0) -> Race:
    """Return the race over the places and settings of `grid`.

    configurations  the settings without their budgets, e.g. `h2o(recent=64)`. The probability of a wrong verdict that
                    is allowed for the whole audit is divided by their number, not counting `exact` and `random`
    kl_limit        largest tolerated divergence, nats per token
    least_exact     score of the exact cache below which a cell is left out
    """
    methods = len({text for text in configurations if text not in UNJUDGED})
    return Race(grid, Standard(MARGIN, CONFIDENCE, methods, kl_limit, racing=True), least_exact)


def close_calls(rows: Sequence[AnyRow], standard: Standard) -> list[str]:
    """Return the close calls: the settings with an open verdict that could still change the recommendation.

    A setting can be recommended only if it and every larger budget of its method hold. So a method's hopeful settings
    are those above its largest budget that falls; all of them, if none falls. If one of these has fewer bytes than the
    recommended setting, or if none is recommended yet, the hopeful settings with an open verdict are close calls.

    rows      the measured rows of the texts and cells
    standard  holds the largest tolerated divergence; its other fields are not used
    """
    assert standard.kl_limit is not None
    tasks = [row for row in rows if isinstance(row, Row)]
    texts = [row for row in rows if isinstance(row, TextRow)]
    found = recommend(tasks, texts=texts, kl_limit=standard.kl_limit, racing=True)
    most = found.chosen.state_bytes if found.chosen else float("inf")
    close: list[str] = []
    for method in dict.fromkeys(one.method for one in found.judged):
        hopeful = _until_one_falls([one for one in reversed(found.judged) if one.method == method])
        if hopeful and hopeful[-1].state_bytes < most:
            close += [one.setting for one in hopeful if one.verdict == "open"]
    return close


def _until_one_falls(budgets: Sequence[Judged]) -> list[Judged]:
    """Return the settings before the first whose verdict is "falls".

    budgets: the verdicts on one method's settings, from the largest budget down.
    """
    falling = next((i for i, one in enumerate(budgets) if one.verdict == "falls"), len(budgets))
    return list(budgets[:falling])
