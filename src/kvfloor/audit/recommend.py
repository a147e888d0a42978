"""Recommend the setting of fewest bytes whose loss of quality stays below a margin, from the audit's rows alone.

A setting is one method under one budget. A cell is one task at one context length under one protocol (question asked
before or after the compression), and a row is one setting measured on one cell. `exact` is the cache that keeps every
token. A recommendation claims non-inferiority: *with 95 % confidence, the recommended setting loses fewer than `margin`
points to exact on every audited cell*. Many cells and settings are tested, and three rules keep the probability of a
wrong claim at 5 %:

- **Cells.** A setting must pass its test on every cell, each at the full level. Several tests that must all reject need
  no correction (intersection-union test: Berger, Technometrics 24 (1982)).
- **Budgets.** A method's budgets are tested from the largest down. After the first budget that fails, no smaller one is
  accepted. Bytes alone fix this order, before any score is known, so a method's budgets share one level
  (fixed-sequence test: Maurer, Hothorn and Lehmacher, 1995).
- **Methods.** The 5 % are divided by the number of tested methods (Bonferroni).

`exact` is the reference and `random` the control; neither is recommended. A candidate must be measured on every cell
and must save bytes.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from kvfloor.audit.criterion import SEVERITY, Standard, Verdict
from kvfloor.audit.rows import Cell, Row

WEAK_EXACT_SCORE = 0.5
"""Score of exact below which a cell is called weak: little is left there for a method to lose."""


@dataclass(frozen=True)
class Judged:
    """Record the verdict on one candidate setting over all cells.

    A setting is a method with its budget; a cell is a task at a context length under a protocol.

    verdict                    the worst verdict over the cells: "holds" (a loss of the margin is excluded), "falls" (a
                               loss is certain) or "open" (neither is shown)
    weakest                    the row (setting measured on one cell) that has the worst verdict
    believed                   True if the setting and every larger budget of its method hold
    state_bytes, exact_bytes   means over the cells
    peak_state_bytes           maximum over the cells
    """

    setting: str
    verdict: Verdict
    believed: bool
    state_bytes: float
    peak_state_bytes: int
    exact_bytes: float
    weakest: Row

    @property
    def method(self) -> str:
        return self.weakest.configuration


@dataclass(frozen=True)
class Recommendation:
    """Hold the recommended setting of an audit, and all candidates with their verdicts.

    A candidate is a setting (method with budget) that was measured on every cell and saves bytes.

    method    text of the recommended setting, or None if no setting is safe
    judged    the verdict on every candidate, from the fewest bytes up
    exact     the rows of the exact cache, one per cell (task, context length, protocol)
    standard  margin and confidence that every candidate was judged by
    """

    method: str | None
    judged: tuple[Judged, ...]
    exact: tuple[Row, ...]
    standard: Standard

    @property
    def weak(self) -> tuple[Row, ...]:
        """Return the exact rows of the weak cells, where exact itself scores below WEAK_EXACT_SCORE."""
        return tuple(row for row in self.exact if row.score < WEAK_EXACT_SCORE)

    @property
    def chosen(self) -> Judged | None:
        """Return the verdict on the recommended setting, or None if none is recommended."""
        return next((one for one in self.judged if one.setting == self.method), None)


def recommend(rows: Sequence[Row], margin: float = 0.15, confidence: float = 0.95) -> Recommendation:
    """Return the safe setting of fewest bytes, with the verdict on every candidate.

    A setting (method with budget) is safe if it and every larger budget of its method are shown to lose less than
    `margin` on every cell, at the given confidence. No setting is recommended if every cell is weak, i.e. if exact
    itself scores below WEAK_EXACT_SCORE on each. The default margin of 15 points suits a short audit: with n = 40
    samples per cell and eight methods, a setting that loses no sample to exact is shown to lose less than 14 points. A
    tighter margin needs more samples.

    Raises ValueError if the rows hold no exact reference or a setting twice on one cell, or if margin or confidence is
    out of range.
    """
    if not 0 < margin < 1 or not 0.5 < confidence < 1:
        raise ValueError(f"margin {margin} must lie in (0, 1) and confidence {confidence} in (0.5, 1)")
    exact = {row.cell: row for row in rows if row.method == "exact"}
    if not exact:
        raise ValueError("the rows hold no exact reference: audit with the method 'exact' too")
    candidates = _candidates(rows, exact)
    standard = Standard(margin, confidence, methods=len({of_one[0].configuration for of_one in candidates.values()}))
    judged = _judge(candidates, standard)
    safe = [one for one in judged if one.believed]
    answer = Recommendation(
        method=safe[0].setting if safe else None,
        judged=judged,
        exact=tuple(exact.values()),
        standard=standard,
    )
    if len(answer.weak) == len(answer.exact):
        return Recommendation(None, judged, answer.exact, standard)
    return answer


def _candidates(rows: Sequence[Row], exact: dict[Cell, Row]) -> dict[str, list[Row]]:
    """Map each setting that may be recommended to its rows, one per cell.

    Such a setting (method with budget) is measured on every cell (task, context length, protocol), takes fewer bytes
    than exact, and is neither `exact` nor `random`. Raises ValueError for a setting with two rows on one cell.
    """
    settings: dict[str, dict[Cell, Row]] = defaultdict(dict)
    for row in rows:
        if row.cell in settings[row.method]:
            raise ValueError(f"the rows hold {row.method!r} on {row.cell} twice: give each cell once")
        settings[row.method][row.cell] = row
    return {
        setting: list(cells.values())
        for setting, cells in settings.items()
        if next(iter(cells.values())).name not in ("exact", "random")
        and cells.keys() == exact.keys()
        and sum(row.state_bytes for row in cells.values()) < sum(row.exact_bytes for row in cells.values())
    }


def _judge(candidates: dict[str, list[Row]], standard: Standard) -> tuple[Judged, ...]:
    """Judge every candidate, each method's budgets from the largest down; return the verdicts by rising bytes.

    `candidates` maps settings (methods with budgets) to their rows, one row per cell (task, context length, protocol).
    """

    def strength(row: Row) -> tuple[int, float, float, Cell]:
        lower_end = standard.lower_end(row)
        return SEVERITY[standard.verdict(row)], row.score - row.exact_score, lower_end, row.cell

    judged: list[Judged] = []
    stopped: set[str] = set()
    for setting, rows in sorted(candidates.items(), key=lambda item: (-_mean_bytes(item[1]), item[0])):
        weakest = min(rows, key=strength)
        verdict = standard.verdict(weakest)
        method = weakest.configuration
        if verdict != "holds":
            stopped.add(method)
        judged.append(
            Judged(
                setting=setting,
                verdict=verdict,
                believed=method not in stopped,
                state_bytes=_mean_bytes(rows),
                peak_state_bytes=max(row.peak_state_bytes for row in rows),
                exact_bytes=sum(row.exact_bytes for row in rows) / len(rows),
                weakest=weakest,
            )
        )
    return tuple(sorted(judged, key=lambda one: (one.state_bytes, one.peak_state_bytes, one.setting)))


def _mean_bytes(rows: Sequence[Row]) -> float:
    return sum(row.state_bytes for row in rows) / len(rows)
