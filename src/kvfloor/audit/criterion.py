"""Judge a setting of an audit by its loss to the exact cache: in nats on texts, in right answers on tasks.

A setting is a method with its budget. The exact cache keeps every token. A row is the result of one setting on one
text, or on one cell: a task at a context length under a protocol (question asked before or after the compression). The
loss on a cell is the exact cache's score (share of right answers) minus the row's score. A setting's divergence is its
mean KL to the exact cache, in nats per token, over the scored tokens of all texts.

A verdict is "holds" (a loss or divergence above the tolerated one is excluded), "falls" (on a task: a loss is certain;
on texts: the divergence certainly exceeds the tolerated one) or "open" (neither is shown). `audit/recommend.py`
combines the verdicts on a setting, to decide if the setting is safe.

An audit with a time limit is a race: it judges a setting after each text and after each round of samples of a cell
(round 1 has the first n samples, round 2 the next n). Settings with an open verdict may have more of both. Each such
judgement is a look. A race's intervals are wide enough to hold after any number of looks. The looks at each cell are
counted by themselves. The allowed error is not divided among the cells either, as a setting must hold on every one of
them (`audit/recommend.py`).
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

_CERTAIN = 0.95  # level of the two-sided interval that shows a loss

SEVERITY: dict[Verdict, int] = {"falls": 0, "open": 1, "holds": 2}
"""Rank the verdicts, from the worst (0) up."""


@dataclass(frozen=True)
class Standard:
    """Hold the tolerated loss and the confidence by which one audit's rows are judged.

    margin      largest tolerated loss of score (share of right answers) against the exact cache, in (0, 1)
    confidence  probability with which the whole recommendation is right, in (0.5, 1)
    methods     number of methods that share the allowed error 1 - confidence
    kl_limit    largest tolerated divergence, nats per token; None if no text was read
    racing      True if the settings were judged after every text and round of samples, and undecided ones could be
                measured on more of both
    """

    margin: float
    confidence: float
    methods: int
    kl_limit: float | None = None
    racing: bool = False

    @property
    def cell_confidence(self) -> float:
        """Return the level of the two-sided confidence intervals by which one setting is judged.

        The level is 1 - 2 (1 - confidence) / methods. Only one end of an interval decides "holds": on a cell the lower
        end of (score - exact's score), on texts the upper end of the divergence. The allowed error 1 - confidence is
        divided equally among the methods, so this end may be wrong with probability (1 - confidence) / methods.
        Example: confidence 0.95 and 5 methods give the level 0.98.
        """
        return 1 - 2 * (1 - self.confidence) / max(1, self.methods)

    def lower_end(self, row: Row) -> float:
        """Return the lower confidence limit of the row's score minus the exact cache's score.

        A limit of -0.1 means that a loss of 10 points is not excluded, but any larger loss is. The interval's level is
        `cell_confidence`. In a race it is higher, as part of the allowed error is kept for later rounds of samples.
        """
        level = self._level(self.cell_confidence, row.rounds)
        return paired_difference_interval(row.gained, row.lost, row.n, level)[0]

    def verdict(self, row: Row) -> Verdict:
        """Judge one row of a cell: return "holds", "open" or "falls".

        "holds": a loss of more than `margin` to the exact cache is excluded, at `cell_confidence`. "falls": a loss is
        certain, as the 95 % interval of the score's difference lies below 0. "open": neither. A row of the exact cache
        holds by definition. In a race `row` has the samples of all rounds so far (`audit/rounds.py`), and the intervals
        hold after any number of rounds. If the true loss is `margin` or more, the probability that any round gives
        "holds" is at most (1 - confidence) / methods. If there is no loss, the probability that any round gives "falls"
        is at most 0.025.
        """
        if row.method == "exact" or self.lower_end(row) >= -self.margin:
            return "holds"
        high = paired_difference_interval(row.gained, row.lost, row.n, self._level(_CERTAIN, row.rounds))[1]
        return "falls" if high < 0 else "open"

    def shown_worse(self, row: Row) -> Verdict:
        """Judge one row of a cell in an audit that also read texts: return "falls" if a loss is certain, else "holds".

        Texts show small losses better than tasks do. So the texts decide if a setting is safe, and a row of a cell can
        only show that it is not.
        """
        return "falls" if self.verdict(row) == "falls" else "holds"

    def judge_texts(self, rows: Sequence[TextRow]) -> tuple[Divergence, Verdict]:
        """Return (divergence, verdict) of a setting: its mean KL with a confidence interval, and the verdict on it.

        "holds": the upper end of the interval is at most `kl_limit`. "falls": a test shows that the divergence exceeds
        `kl_limit`. "open": neither. The interval's level is `cell_confidence`. In a race it is higher, as part of the
        allowed error is kept for later looks. `rows` are the setting's rows of the texts, in the order of reading.
        """
        assert self.kl_limit is not None
        level = self.cell_confidence
        found = divergence(rows, self._level(level, looks(rows)))
        if self.exceeds(rows):
            return found, "falls"
        return found, "holds" if found.kl_high <= self.kl_limit else "open"

    def exceeds(self, rows: Sequence[TextRow]) -> bool:
        """Return True if a setting's rows of texts show that its divergence exceeds `kl_limit`.

        The probability that the answer is True although the divergence does not exceed the limit is at most
        (1 - confidence) / methods, even if the test is repeated after every text.
        """
        assert self.kl_limit is not None
        return mean_exceeds(block_means(rows), self.kl_limit, (1 - self.cell_confidence) / 2)

    def samples_needed(self, margin: float) -> int:
        """Return the smallest number of samples per row with which a loss of `margin` can be excluded.

        The number is enough in the best case only: the setting is right on the same samples as the exact cache. In a
        race it is the number for the first look.
        """
        z = NormalDist().inv_cdf((1 + self._level(self.cell_confidence, 1)) / 2)
        return math.ceil(z * z * (1 - margin) / margin)

    def _level(self, confidence: float, look: int) -> float:
        """Return the level of an interval at a look, numbered from 1: `confidence`, or more in a race.

        In a race it is higher, as part of the allowed error is kept for later looks.
        """
        return confidence_of_look(confidence, look) if self.racing else confidence
