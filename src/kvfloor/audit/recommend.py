"""Choose the setting of fewest bytes that is shown not to lose quality, from the rows alone.

The claim behind a recommendation is non-inferiority: *with 95 % confidence, the recommended setting loses
fewer than `margin` points to exact on every audited cell*. How the error stays at 5 % over many cells and
settings:

- **Cells.** A setting must hold on every cell, each at full level. Requiring all of several tests to reject
  needs no correction (intersection-union test: Berger, Technometrics 24 (1982)).
- **Budgets.** A method's budgets are judged from the largest down, and none below the first that does not
  hold is believed. The order is fixed by bytes before any score is seen, so they share one level
  (fixed-sequence test: Maurer, Hothorn and Lehmacher, 1995).
- **Methods.** The 5 % are divided by the number of methods judged (Bonferroni).

`exact` is the reference and `random` the control; neither is recommended. A setting that was not measured on
every cell, or does not save bytes, is no candidate.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from kvfloor.audit.criterion import SEVERITY, Standard, Verdict
from kvfloor.audit.rows import Cell, Row

WEAK_EXACT_SCORE = 0.5
"""A cell on which exact scores less cannot show much of a loss, and is called weak."""


@dataclass(frozen=True)
class Judged:
    """Record the verdict on one candidate setting over all cells.

    verdict                    the worst over its cells, found on `weakest`
    believed                   it holds, and so does every larger budget of its method
    state_bytes, exact_bytes   means over the cells; `peak_state_bytes` is the highest
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
    """Hold the recommended setting of an audit and all that it was chosen from.

    method    the setting to use, as text; None where no setting is safe
    judged    every candidate, from the fewest bytes up
    exact     the reference's rows, one per cell
    standard  what was asked of them
    """

    method: str | None
    judged: tuple[Judged, ...]
    exact: tuple[Row, ...]
    standard: Standard

    @property
    def weak(self) -> tuple[Row, ...]:
        """Return the exact rows of the cells that cannot show much of a loss."""
        return tuple(row for row in self.exact if row.score < WEAK_EXACT_SCORE)

    @property
    def chosen(self) -> Judged | None:
        """Return the verdict on the recommended setting."""
        return next((one for one in self.judged if one.setting == self.method), None)


def recommend(rows: Sequence[Row], margin: float = 0.15, confidence: float = 0.95) -> Recommendation:
    """Return the smallest safe setting of an audit, if there is one.

    The default margin of 15 points is what a short audit can show: at n = 40 and eight methods, a setting
    that loses no sample is shown to lose less than 14 points. A tighter margin needs more samples.
    Raises ValueError where the rows hold no exact reference or one cell twice, or margin or confidence is
    impossible.
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
    """Map each setting to its rows, one per cell, for the settings that may be recommended."""
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
    """Judge every candidate, from the largest of its method down, in order of rising bytes."""

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
