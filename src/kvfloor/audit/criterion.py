"""Judge one row of an audit by a tolerated loss of score and a confidence."""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

from kvfloor.audit.rows import Row
from kvfloor.statistics import paired_difference_interval

Verdict = Literal["falls", "open", "holds"]
"""`holds`: a loss of `margin` is excluded. `falls`: a loss is certain (95 %). `open`: neither is shown."""

SEVERITY: dict[Verdict, int] = {"falls": 0, "open": 1, "holds": 2}
"""Verdicts from the worst up."""


@dataclass(frozen=True)
class Standard:
    """Hold the tolerated loss and the confidence by which an audit judges its rows.

    margin      largest tolerated loss of score to exact, a share in (0, 1)
    confidence  confidence of the whole recommendation, in (0.5, 1)
    methods     number of methods that share the allowed error 1 - confidence
    """

    margin: float
    confidence: float
    methods: int

    @property
    def cell_confidence(self) -> float:
        """Return the level of each row's two-sided interval: its lower end errs with 1/methods of the allowed error."""
        return 1 - 2 * (1 - self.confidence) / max(1, self.methods)

    def lower_end(self, row: Row) -> float:
        """Return the largest loss (a negative difference) that the row cannot exclude."""
        return paired_difference_interval(row.gained, row.lost, row.n, self.cell_confidence)[0]

    def verdict(self, row: Row) -> Verdict:
        """Judge one row by the interval of its loss; exact holds by definition."""
        if row.method == "exact" or self.lower_end(row) >= -self.margin:
            return "holds"
        return "falls" if row.diff_high < 0 else "open"

    def samples_needed(self, margin: float) -> int:
        """Return the samples per cell with which a setting that loses none of them passes the test at `margin`."""
        z = NormalDist().inv_cdf((1 + self.cell_confidence) / 2)
        return math.ceil(z * z * (1 - margin) / margin)
