"""Define a safe setting (a method with its budget) by a tolerated loss and a confidence, and judge one row by them.

A row is one setting measured on one cell: a task at a context length under a protocol.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

from kvfloor.audit.rows import Row
from kvfloor.statistics import paired_difference_interval

Verdict = Literal["falls", "open", "holds"]
"""`holds`: a loss of `margin` to exact is excluded. `falls`: a loss is certain (95 %). `open`: neither is shown."""

SEVERITY: dict[Verdict, int] = {"falls": 0, "open": 1, "holds": 2}
"""Rank the verdicts, from the worst (0) up."""


@dataclass(frozen=True)
class Standard:
    """Hold the tolerated loss and the confidence that one audit judges its rows by.

    margin      largest tolerated loss of score (share of right answers) to the exact cache, in (0, 1)
    confidence  of the whole recommendation, in (0.5, 1)
    methods     how many methods share the allowed error 1 - confidence
    """

    margin: float
    confidence: float
    methods: int

    @property
    def cell_confidence(self) -> float:
        """Return the confidence level of the two-sided interval that judges one row.

        The interval's lower end errs with one method's share of the allowed error.
        """
        return 1 - 2 * (1 - self.confidence) / max(1, self.methods)

    def lower_end(self, row: Row) -> float:
        """Return the largest loss of score to exact that the row cannot exclude, as a negative difference."""
        return paired_difference_interval(row.gained, row.lost, row.n, self.cell_confidence)[0]

    def verdict(self, row: Row) -> Verdict:
        """Judge one row: "holds", "open" or "falls"; a row of the exact cache holds by definition."""
        if row.method == "exact" or self.lower_end(row) >= -self.margin:
            return "holds"
        return "falls" if row.diff_high < 0 else "open"

    def samples_needed(self, margin: float) -> int:
        """Return the number of samples per row that show a loss below `margin` for a setting that loses no sample."""
        z = NormalDist().inv_cdf((1 + self.cell_confidence) / 2)
        return math.ceil(z * z * (1 - margin) / margin)
