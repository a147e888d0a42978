"""Define a safe setting by a tolerated loss and a confidence, and judge one row by them."""

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
    """Hold the tolerated loss and the confidence that one audit judges by.

    margin      largest tolerated loss of score to exact, a share in (0, 1)
    confidence  of the whole recommendation, in (0.5, 1)
    methods     how many methods share the allowed error 1 - confidence
    """

    margin: float
    confidence: float
    methods: int

    @property
    def cell_confidence(self) -> float:
        """Return the level of the two-sided interval whose lower end errs with one method's share of the error."""
        return 1 - 2 * (1 - self.confidence) / max(1, self.methods)

    def lower_end(self, row: Row) -> float:
        """Return the largest loss (a negative difference) that the row cannot exclude."""
        return paired_difference_interval(row.gained, row.lost, row.n, self.cell_confidence)[0]

    def verdict(self, row: Row) -> Verdict:
        """Judge one row; exact holds by definition."""
        if row.method == "exact" or self.lower_end(row) >= -self.margin:
            return "holds"
        return "falls" if row.diff_high < 0 else "open"

    def samples_needed(self, margin: float) -> int:
        """Return the samples per cell at which a setting that loses none is shown to lose less than `margin`."""
        z = NormalDist().inv_cdf((1 + self.cell_confidence) / 2)
        return math.ceil(z * z * (1 - margin) / margin)
