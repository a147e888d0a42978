"""Compute exactly how often a race of tasks ever claims something wrong, with and without an allowance for its looks.

    python -m characterize.race_looks

A race judges a setting after each round of n samples of a cell (look 1, 2, ...), so a wrong claim has several chances.
A sample is gained if only the setting answers it right, lost if only the exact cache does; the true loss is the share
of lost samples minus that of gained ones. At a true loss of the margin, "holds" (a loss of the margin is excluded) is
wrong; without a loss, "falls" (a loss is certain) is. The columns:

claim, methods        the claim, and the number of methods that share the error
gained, lost          true shares of gained and of lost samples
allowed               largest probability with which the claim may ever be made
ever, ever_unwidened  probability that it is made at any of the looks; with intervals that allow for the looks, and with
                      those of an audit without a time limit
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import NamedTuple, cast

import numpy as np

from characterize.lib.table import save
from kvfloor.audit.criterion import Standard, Verdict
from kvfloor.audit.recommend import CONFIDENCE, MARGIN
from kvfloor.audit.request import DEFAULT_SAMPLES
from kvfloor.audit.rounds import MOST_ROUNDS
from kvfloor.audit.rows import Row

FIELDS = ("claim", "methods", "gained", "lost", "allowed", "ever", "ever_unwidened")
GAINED = (0.0, 0.05, 0.2)
METHODS = (1, 6)
_LEAST = 1e-10  # probability of a pair of counts below which it is not judged
CERTAIN = 0.025
"""Largest probability with which a setting without a loss may be said to lose on a cell."""


class Counts(NamedTuple):
    """Hold what a verdict on a cell depends on, named as in a `Row`."""

    gained: int
    lost: int
    n: int
    rounds: int
    method: str = "window@64"


def ever_claimed(
    standard: Standard, claim: Verdict, gained: float, lost: float, n: int = DEFAULT_SAMPLES, rounds: int = MOST_ROUNDS
) -> float:
    """Return the probability that `standard` makes the claim at any look at a cell, by exact enumeration.

    claim         the verdict
    gained, lost  true shares of samples that only the setting, and that only the exact cache answers right
    n, rounds     samples of a round, and number of rounds
    """
    most, claimed = n * rounds, 0.0
    mass = np.zeros((most + 1, most + 1))  # of (gained, lost) among the runs without a claim so far
    mass[0, 0] = 1.0
    for done in range(1, most + 1):
        moved = (1 - gained - lost) * mass
        moved[1:] += gained * mass[:-1]
        moved[:, 1:] += lost * mass[:, :-1]
        mass = moved
        if done % n == 0:
            for more, fewer in np.argwhere(mass > _LEAST).tolist():
                if _verdict(standard, Counts(more, fewer, done, done // n)) == claim:
                    claimed += mass[more, fewer]
                    mass[more, fewer] = 0.0
    return float(claimed)


@cache
def _verdict(standard: Standard, counts: Counts) -> Verdict:
    return standard.verdict(cast("Row", counts))


def main() -> None:
    rows = []
    for methods in METHODS:
        racing = Standard(MARGIN, CONFIDENCE, methods, racing=True)
        fixed = replace(racing, racing=False)
        for gained in GAINED:
            cases: tuple[tuple[Verdict, float, float], ...] = (
                ("holds", gained + MARGIN, (1 - CONFIDENCE) / methods),
                ("falls", gained, CERTAIN),
            )
            for claim, lost, allowed in cases:
                if lost and (claim == "holds" or methods == METHODS[0]):
                    found = [ever_claimed(one, claim, gained, lost) for one in (racing, fixed)]
                    rows.append((claim, methods, gained, lost, allowed, *found))
                    print(*rows[-1], flush=True)
    save(__file__, FIELDS, rows)


if __name__ == "__main__":
    main()
