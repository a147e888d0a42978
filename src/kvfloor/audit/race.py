"""Choose the measurements of an audit with a time limit: stop settings that clearly lose, measure undecided ones more.

A setting is a method with its budget. A place is a text, a cell of the tasks (task, context length, protocol), or a
sheet of hidden facts, whose rows decide nothing. A measurement is a pair of place and setting; its result is a row. A
setting's divergence is its mean KL to the exact cache, which keeps every token. A loss on a cell is the exact cache's
score (share of right answers) minus the setting's. The margin is the largest tolerated loss, the limit the largest
tolerated divergence.

A verdict on a setting is one of three:

- "holds": if the audit reads texts, the divergence is shown to be at most the limit, and no cell shows a certain loss.
  If it reads none, the loss is shown to be at most the margin on every cell.
- "falls": the divergence is certain to exceed the limit, or a loss on a cell is certain.
- "open": neither.

A race is an audit with a time limit. It goes through the texts and cells one by one. Once the time is found to be too
short for all settings on all of them, a setting whose verdict is "falls" stops: it reads no further text and runs no
further cell. Only the exact cache never stops.

When all texts and cells are measured, further places follow: the second passages of the texts, then the second rounds
of samples of the cells, then the third of both, and so on. Round 1 of a cell has its first n samples, round 2 the next
n. Only close calls are measured there. A close call is a setting that could still change the recommendation, and

- on a text, its verdict is open;
- on a cell, its samples so far allow both no loss and a loss above the margin. If the audit also reads texts, the
  setting must have lost more answers on the cell than it gained, because texts show small losses better than cells do.

These decisions follow from the rows alone, so an audit that was stopped and resumed decides alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from kvfloor.audit.criterion import Standard
from kvfloor.audit.fact_rows import SheetRow
from kvfloor.audit.format import counted
from kvfloor.audit.grid import EXACT, AnyRow, Grid, Pair, Place
from kvfloor.audit.limits import left_out, unreadable
from kvfloor.audit.nats import TextCell, TextRow
from kvfloor.audit.recommend import CONFIDENCE, MARGIN, UNJUDGED, Judged, Recommendation, recommend
from kvfloor.audit.rounds import joined
from kvfloor.audit.rows import Cell, Row

Rows = Mapping[Pair, AnyRow]


@dataclass
class Race:
    """Choose the measurements of a race, given the rows measured so far.

    grid         the places in order, the settings, and the further places
    standard     the margin, the limit and the confidence by which settings are judged
    least_exact  score of the exact cache below which a cell is left out, i.e. measured with the exact cache alone
    hurried      True if the time is too short for all settings on all places
    """

    grid: Grid
    standard: Standard
    least_exact: float = 0.0
    hurried: bool = False
    _close: dict[Place, frozenset[str]] = field(default_factory=dict)

    def hurry(self) -> None:
        """Note that the time is too short for all settings: from now on each one whose verdict is "falls" stops."""
        self.hurried = True

    def __call__(self, rows: Rows, /) -> list[Pair]:
        """Return all measurements of the race that the rows so far call for, in the order of measuring.

        Those that have a row already are included. Measurements on a further place are included only once all those
        before them have a row.
        """
        weak = left_out(rows, self.least_exact)
        alone = weak.keys() | unreadable(rows).keys()
        pairs: list[Pair] = []
        read: dict[str, list[TextRow]] = {setting: [] for setting in self.grid.settings}
        stopped: set[str] = set()
        for place in self.grid.places:
            here = [EXACT] if place in alone else [setting for setting in self.grid.settings if setting not in stopped]
            pairs += [(place, setting) for setting in here]
            if self.hurried and place not in alone:
                known = {setting: rows[place, setting] for setting in here if (place, setting) in rows}
                stopped |= {s for s, row in known.items() if s != EXACT and self._falls(row, read[s])}
        for place in self.grid.further:
            if any(pair not in rows for pair in pairs):
                break
            if isinstance(place, Cell) and place.first in weak:
                continue
            close = self._close_calls(place, rows, weak)
            pairs += [(place, setting) for setting in self.grid.settings if close and setting in (*close, EXACT)]
        return pairs

    def note(self, rows: Rows) -> str:
        """Name the settings that stopped early and those that were measured on further places, in a few sentences.

        The result is "" if there are none. `rows` are the measured rows.
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
        said = [f"Of {counted(first, 'text')}, with the number read: {'; '.join(told)}."] if told else []
        return " ".join([*said, *self._task_notes(rows, {s for s, n in count.items() if n < first})])

    def _task_notes(self, rows: Rows, out: set[str]) -> list[str]:
        """Return at most two sentences: one on settings that stopped early on a task, one on those with more rounds.

        out: settings that stopped on a text already; they are not named again.
        """
        weak = left_out(rows, self.least_exact)
        cells = [(at, setting) for at, setting in rows if isinstance(at, Cell) and at.first not in weak]
        count = Counter(setting for at, setting in cells if at.round == 1)
        rounds: dict[str, Counter[Cell]] = {}
        for at, setting in cells:
            rounds.setdefault(setting, Counter())[at.first] += 1
        most = {setting: max(found.values()) for setting, found in rounds.items() if setting != EXACT}
        early = [f"{setting} ({n})" for setting, n in count.items() if n < count[EXACT] and setting not in out]
        more = [f"{setting} ({n})" for setting, n in most.items() if n > 1]
        said = []
        if early:
            told = f"Of {counted(count[EXACT], 'cell')} of the tasks, with the number run"
            said.append(f"{told}: {', '.join(early)} stopped early, as a loss on a task is certain.")
        if more:
            told = f"{counted(len(more), 'setting')} had further samples, as close calls"
            said.append(f"{told}, with the most rounds on a cell: {', '.join(more)}.")
        return said

    def _falls(self, row: AnyRow, read: list[TextRow]) -> bool:
        """Return True if a setting's row on a place, with those in `read`, gives the verdict "falls".

        Facts that do not come back give no verdict.

        read: the setting's rows on the texts before. If `row` is of a text, it is appended to this list.
        """
        if isinstance(row, Row):
            return self.standard.verdict(row) == "falls"
        if isinstance(row, SheetRow):
            return False
        read.append(row)
        return self.standard.exceeds(read)

    def _close_calls(self, place: Place, rows: Rows, weak: Mapping[Cell, Row]) -> frozenset[str]:
        """Return the settings to measure on a further place: the close calls that follow from the rows before it.

        rows  the measured rows; those on `place` and on later places are not used
        weak  the left-out cells, whose rows are not used either
        The answer for a place is stored, so that it does not change while the place is measured.
        """
        if place not in self._close:
            further = self.grid.further
            before = (*self.grid.places, *further[: further.index(place)])
            among = [at for at in before if not isinstance(at, Cell) or at.first not in weak]
            known = [rows[at, setting] for at in among for setting in self.grid.settings if (at, setting) in rows]
            if isinstance(place, Cell):
                self._close[place] = frozenset(close_calls_on(place, known, self.standard))
            else:
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
    """Return the close calls on texts: settings with an open verdict that could still change the recommendation.

    rows      the measured rows of the texts and cells
    standard  holds the largest tolerated divergence; its other fields are not used
    """
    return [one.setting for one in _contenders(_recommended(rows, standard)) if one.verdict == "open"]


def close_calls_on(cell: Cell, rows: Sequence[AnyRow], standard: Standard) -> list[str]:
    """Return the close calls on a cell: settings in doubt there that could still change the recommendation.

    A setting is in doubt on a cell if its samples so far allow both no loss and a loss above the margin. If texts were
    read, it must also have lost more answers on the cell than it gained. Then more samples may make a loss certain,
    which rules the setting out.

    cell      the cell, with the samples of any round
    rows      the measured rows of the texts and cells, one per setting, cell and round
    standard  holds the largest tolerated divergence; its other fields are not used
    """
    found = _recommended(rows, standard)
    known = {row.method: row for row in _joined_tasks(rows) if row.cell == cell.first}
    close = []
    for one in _contenders(found):
        row = known.get(one.setting)
        if row is not None and found.standard.verdict(row) == "open" and (not found.texts or row.lost > row.gained):
            close.append(one.setting)
    return close


def _recommended(rows: Sequence[AnyRow], standard: Standard) -> Recommendation:
    """Return the recommendation that follows from the rows so far, with the divergence limit of `standard`."""
    assert standard.kl_limit is not None
    texts = [row for row in rows if isinstance(row, TextRow)]
    return recommend(_joined_tasks(rows), texts=texts, kl_limit=standard.kl_limit, racing=True)


def _joined_tasks(rows: Sequence[AnyRow]) -> list[Row]:
    return joined([row for row in rows if isinstance(row, Row)], racing=True)


def _contenders(found: Recommendation) -> list[Judged]:
    """Return the verdicts on the settings that could still change the recommendation `found`.

    A setting can be recommended only if it and every larger budget of its method hold. So the hopeful settings of a
    method are those with a larger budget than the largest that falls; all of them, if none falls. They are returned if
    one of them has fewer bytes than the recommended setting, if one of them is that setting, or if none is recommended.
    """
    most = found.chosen.state_bytes if found.chosen else float("inf")
    contenders: list[Judged] = []
    for method in dict.fromkeys(one.method for one in found.judged):
        hopeful = _until_one_falls([one for one in reversed(found.judged) if one.method == method])
        if hopeful and (hopeful[-1].state_bytes < most or any(one.setting == found.method for one in hopeful)):
            contenders += hopeful
    return contenders


def _until_one_falls(budgets: Sequence[Judged]) -> list[Judged]:
    """Return the verdicts that come before the first "falls"; all of them if there is none.

    budgets: the verdicts on one method's settings, from the largest budget down.
    """
    falling = next((i for i, one in enumerate(budgets) if one.verdict == "falls"), len(budgets))
    return list(budgets[:falling])
