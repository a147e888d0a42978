"""Judge a setting of an audit by its loss to the exact cache: in nats on texts, in right answers on tasks.

A setting is a method with its budget. The exact cache keeps every token. A row is one setting measured on one cell: a
task at a context length under a protocol (question asked before or after the compression). Its loss is the exact
cache's score minus the row's score. A setting's divergence is its mean KL to the exact cache over the scored tokens of
all texts. A verdict is "holds" (the tolerated loss or divergence is excluded), "falls" (on a task: a loss is certain;
on texts: the divergence certainly exceeds the limit) or "open" (neither is shown). `audit/recommend.py` combines the
verdicts on a setting, to decide if the setting is safe.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

from kvfloor.audit.nats import Divergence, TextRow, block_means, divergence, looks
from kvfloor.audit.rows import Row
from kvfloor.statistics import confidence_of_look, mean_exceeds, paired_difference_interval

Verdict = Literal["falls", "open", "holds"]
"""`holds`: too large a loss is excluded. `falls`: a loss, or too large a divergence, is certain. `open`: neither."""

SEVERITY: dict[Verdict, int] = {"falls": 0, "open": 1, "holds": 2}
"""Rank the verdicts, from the worst (0) up."""


@dataclass(frozen=True)
class Standard:
    """Hold the tolerated loss and the confidence by which one audit's rows are judged.

    margin      largest tolerated loss of score (share of right answers) against the exact cache, in (0, 1)
    confidence  of the whole recommendation, in (0.5, 1)
    methods     number of methods that share the allowed error 1 - confidence
    kl_limit    largest tolerated divergence, nats per token; None if no text was read
    racing      True if the audit judged its settings after every text, and read on for close calls
    """

    margin: float
    confidence: float
    methods: int
    kl_limit: float | None = None
    racing: bool = False

    @property
    def cell_confidence(self) -> float:
        """Return the confidence level of the two-sided intervals that decide the verdict "holds".

        On a row, the interval is that of the row's score minus the exact cache's score, and its lower end alone decides
        the verdict. On texts, it is that of a setting's divergence, and its upper end alone decides. The allowed error
        1 - confidence is divided equally among the methods, so each of these ends is wrong with the probability
        (1 - confidence) / methods.
        """
        return 1 - 2 * (1 - self.confidence) / max(1, self.methods)

    def lower_end(self, row: Row) -> float:
        """Return the lower confidence limit of the row's score minus the exact cache's score.

        A row is one setting (method with budget) measured on one cell (task, context length, protocol). A limit of -0.1
        means that a loss of 10 points is not excluded, but any larger loss is.
        """
        return paired_difference_interval(row.gained, row.lost, row.n, self.cell_confidence)[0]

    def verdict(self, row: Row) -> Verdict:
        """Judge one row: return "holds", "open" or "falls".

        "holds" means that a loss of `margin` to the exact cache is excluded, "falls" that a loss is certain (95 %), and
        "open" that neither is shown. A row of the exact cache holds by definition.
        """
        if row.method == "exact" or self.lower_end(row) >= -self.margin:
            return "holds"
        return "falls" if row.diff_high < 0 else "open"

    def shown_worse(self, row: Row) -> Verdict:
        """Judge one row where texts were read too: return "falls" if a loss is certain, else "holds".

        The texts show that a setting is safe; a row can only show that it is not.
        """
        return "falls" if self.verdict(row) == "falls" else "holds"

    def judge_texts(self, rows: Sequence[TextRow]) -> tuple[Divergence, Verdict]:
        """Return a setting's divergence, given its rows in the order of reading, and the verdict on it.

        "holds": the interval lies below `kl_limit`. "falls": the mean of the blocks is shown to exceed `kl_limit`, by a
        test that allows for any number of looks (`mean_exceeds`). "open": neither. The interval has `cell_confidence`;
        in a race, a share of its error is left for later looks (`confidence_of_look`).
        """
        assert self.kl_limit is not None
        level = self.cell_confidence
        found = divergence(rows, confidence_of_look(level, looks(rows)) if self.racing else level)
        if self.exceeds(rows):
            return found, "falls"
        return found, "holds" if found.kl_high <= self.kl_limit else "open"

    def exceeds(self, rows: Sequence[TextRow]) -> bool:
        """Return True if a setting's rows show that its divergence exceeds the limit, whenever one looks."""
        assert self.kl_limit is not None
        return mean_exceeds(block_means(rows), self.kl_limit, (1 - self.cell_confidence) / 2)

    def samples_needed(self, margin: float) -> int:
        """Return the smallest number of samples per row with which a loss of `margin` can be excluded.

        The number is enough in the best case only: the setting is right on the same samples as the exact cache.
        """
        z = NormalDist().inv_cdf((1 + self.cell_confidence) / 2)
        return math.ceil(z * z * (1 - margin) / margin)
