"""Measure the share of right answers of readers that look up scores q.k one by one, counting each look-up (probe).

A reader is a rule that chooses which scores to look up. The streams are those of the time game (docs/floors.md,
"Time"). Token 0 of n tokens has value n, all others 0. In one case all keys are zero, and attention is 1. In the other
case one further token has a heavy key, which takes nearly all softmax mass, and attention is 1/(n-1). Scores are the
logits q.k of one fixed query q. The reader answers which case it is: "heavy key" if one of the scores that it has
looked up is above 0. A run is one such stream, with a heavy key at even odds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvfloor.game.engine.secret import Hidden
from kvfloor.statistics import wilson_interval


class ScoreOracle:
    """Return scores q.k_l of `runs` streams of n tokens on request, and count the look-ups (`probes`) per stream.

    A stream has at most one heavy key, which takes nearly all softmax mass. The score of a heavy key is 2 ln(n-1), all
    other scores are 0.
    """

    def __init__(self, n: int, place: Tensor, planted: Tensor) -> None:
        """Store the position of the heavy key of each stream.

        place (runs,) is the position, in 1..n-1; planted (runs,), bool, is False where a stream has no heavy key.
        """
        self._n, self._place, self._planted = n, place, planted
        self.probes = torch.zeros(len(place), dtype=torch.int64)

    def score(self, index: Tensor) -> Tensor:
        """Return the scores (runs, t) of the tokens `index` (runs, t) in [0, n); every entry counts as one probe."""
        self.probes += index.shape[1]
        heavy = (index == self._place.unsqueeze(1)) & self._planted.unsqueeze(1)
        return torch.where(heavy, 2.0 * math.log(self._n - 1), 0.0)


def uniform(n: int, probes: int, runs: int, generator: torch.Generator) -> Tensor:
    """Choose `probes` distinct random tokens of 1..n-1 to look up in each run: (runs, probes) int64.

    Every token is equally likely. No choice finds the heavy key more often, because it is equally likely at each of
    these tokens. To save time, all runs share one random order of the tokens, and each run takes consecutive tokens of
    it from its own random start; `generator` draws both.
    """
    order = 1 + torch.randperm(n - 1, generator=generator)
    start = torch.randint(n - 1, (runs, 1), generator=generator)
    return order[(start + torch.arange(probes)) % (n - 1)]


def recent(n: int, probes: int, runs: int, generator: torch.Generator) -> Tensor:
    """Choose the newest `probes` of n tokens to look up in each run, as a sliding window does: (runs, probes) int64.

    The choice is not random; `generator` is not used.
    """
    del generator
    return torch.arange(n - probes, n).expand(runs, -1)


def strided(n: int, probes: int, runs: int, generator: torch.Generator) -> Tensor:
    """Choose `probes` evenly spaced tokens of 1..n-1 to look up in each run: (runs, probes) int64.

    The choice is not random; `generator` is not used.
    """
    del generator
    return (1 + torch.arange(probes) * (n - 1) // max(1, probes)).expand(runs, -1)


NON_ADAPTIVE = {"uniform": uniform, "recent": recent, "strided": strided}
_SCORES_AT_ONCE = 2**22


@dataclasses.dataclass(frozen=True)
class ReaderSuccess:
    """Record the share `success` of runs (streams) in which a reader answered right, with its 95 % interval low..high.

    reader  name of the rule that chooses the scores to look up
    probes  number of scores that the reader looked up per run
    bound   largest expected success, with so many probes, of any reader that has not read the keys on arrival
    """

    reader: str
    probes: int
    runs: int
    success: float
    low: float
    high: float
    bound: float


def success_bound(n: int, probes: float) -> float:
    """Return the largest chance of a right answer of a reader that looks up `probes` scores and reads no arriving key.

    With even odds, one of n tokens has a heavy key, which takes nearly all softmax mass, or none has. The reader says
    which of the two it is.
    Law: (1 + T/(n-1))/2 for T probes, at most 1.
    """
    return (1.0 + min(1.0, probes / (n - 1))) / 2.0


def curve(n: int, probes: Sequence[int], runs: int, hidden: Hidden, seed: int) -> list[ReaderSuccess]:
    """Measure the success of every reader at each number of `probes`, on `runs` streams with a heavy key at even odds.

    A reader says whether a stream of n tokens has a heavy key, which takes nearly all softmax mass. Its success is the
    share of streams for which it is right. Returns one record per reader and number of probes. `hidden` draws the
    streams, `seed` the readers' choices. One more record, the last, is of a reader that reads the keys as they arrive:
    it remembers the position of the longest key, and needs one probe.
    """
    place, planted = 1 + hidden.places(n - 1, runs), hidden.levels(runs, 1, 1)[:, 0] == 0
    points = []
    for name, commit in NON_ADAPTIVE.items():
        for t in probes:
            generator, found, told = torch.Generator().manual_seed(seed), [], []
            for part in torch.arange(runs).split(max(1, _SCORES_AT_ONCE // t)):
                index = commit(n, t, len(part), generator)  # before the data is there
                oracle = ScoreOracle(n, place[part], planted[part])
                found.append(oracle.score(index).amax(dim=1) > 0.0)
                told.append(oracle.probes)
            points.append(_scored(name, n, torch.cat(told), torch.cat(found), planted))
    oracle = ScoreOracle(n, place, planted)
    # A reader that may read keys as they arrive keeps the place of the longest key, and probes only that place.
    longest = torch.where(planted, place, 1).unsqueeze(1)
    found = oracle.score(longest)[:, 0] > 0.0
    points.append(_scored("index made on arrival", n, oracle.probes, found, planted))
    return points


def _scored(name: str, n: int, told: Tensor, found: Tensor, planted: Tensor) -> ReaderSuccess:
    right, runs, probes = int((found == planted).sum()), len(planted), int(told.max())
    interval = wilson_interval(right, runs)
    return ReaderSuccess(name, probes, runs, right / runs, interval[0], interval[1], success_bound(n, probes))


def as_rows(points: Sequence[ReaderSuccess]) -> list[dict[str, Any]]:
    """Return the records `points`, as `curve` makes them, as dicts of plain JSON types, one per record."""
    return [dataclasses.asdict(point) for point in points]
