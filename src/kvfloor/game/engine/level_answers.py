"""Decode hidden levels of a number format from a state's answers, and certify the bits that its message carries.

In the game, Alice hides values in a method's state (the memory of a KV cache) and sends its bytes, the message; Bob
restores the state and queries it. Here hidden values are as many numbers of a format as answers within a factor 1±eta
tell apart, from the least to the largest, or as answers within an additive error do (`kvfloor.floors.levels`). Answers
and levels are (m, dv), a row of them being what one query reads; a level is an index from 0 to L-1 into the table of
numbers.
"""

import dataclasses
import functools
import math

import torch
from torch import Tensor

from kvfloor.floors.entropy import row_bits
from kvfloor.floors.levels import additive_leak, additive_values, level_values, levels_leak
from kvfloor.game.engine import certificates
from kvfloor.game.engine.decode import Decoded
from kvfloor.game.engine.predict import predictor_gains


@dataclasses.dataclass(frozen=True)
class LevelTable:
    """Hold the numbers that a game hides: those of the format `values` that answers within 1±`eta` tell apart.

    numbers     (L,) float64, ascending from 0
    thresholds  (L-1,) float64: an answer above threshold j is not one for level j or below
    """

    values: str
    eta: float

    @functools.cached_property
    def numbers(self) -> Tensor:
        return torch.tensor(level_values(self.eta, self.values), dtype=torch.float64)

    @functools.cached_property
    def thresholds(self) -> Tensor:
        """Return the geometric middle between the largest answer for each level and the least for the next one."""
        numbers, leak = self.numbers, levels_leak(self.eta, self.values)
        highest = (1.0 + self.eta) * (numbers[:-1] + leak * numbers[-1])
        return highest.sqrt() * ((1.0 - self.eta) * numbers[1:]).sqrt()

    @property
    def leak(self) -> float:
        """Return the ratio (softmax mass off the token)/(mass on it) that queries may have."""
        return levels_leak(self.eta, self.values)

    @property
    def told(self) -> float:
        """Return log2 of the number of levels: the bits of a hidden value."""
        return math.log2(len(self.numbers))

    def decode(self, answers: Tensor) -> Tensor:
        """Return the level of each answer, int64. An answer that is not finite decodes as level 0."""
        answers = torch.nan_to_num(answers.double(), nan=0.0, posinf=0.0, neginf=0.0)
        return torch.bucketize(answers, self.thresholds)

    def places(self, answers: Tensor) -> Tensor:
        """Return answers on a scale on which level j is j, linear between levels in the logarithm, float64 in [0, L-1].

        Between the levels 0 and 1 the scale is linear in the answer itself.
        """
        numbers, top = self.numbers, len(self.numbers) - 1
        answers = torch.nan_to_num(answers.double(), nan=0.0, posinf=0.0, neginf=0.0).clamp(0.0, numbers[-1].item())
        below = torch.searchsorted(numbers, answers, right=True).sub(1).clamp(0, max(0, top - 1))
        low, high = numbers[below], numbers[below + 1]
        part = torch.where(
            below == 0, answers / high, torch.log(answers.clamp_min(low) / low) / torch.log(high / low)
        ).nan_to_num(nan=0.0)
        return below + part

    def trusted(self, answers: Tensor) -> Tensor:
        """Mark the rows (m,), bool, of which every answer is within 1±eta of a level, and not all of one level."""
        found = self.numbers[self.decode(answers)]
        answers = answers.double()
        near = (answers - found).abs() <= self.eta * found + levels_leak(self.eta, self.values) * self.numbers[-1]
        return near.all(dim=1) & ((found != found[:, :1]).any(dim=1) | torch.tensor(found.shape[1] == 1))


@dataclasses.dataclass(frozen=True)
class AdditiveTable:
    """Hold the numbers of the format `values` that answers tell apart whose numbers err by at most `error` times x.

    x is the format's largest number.
    numbers     (L,) float64, ascending, symmetric about 0
    thresholds  (L-1,) float64, the middles between neighbouring numbers
    """

    values: str
    error: float

    @functools.cached_property
    def numbers(self) -> Tensor:
        leak = additive_leak(self.error, self.values)
        return torch.tensor(additive_values(self.error, self.values, leak), dtype=torch.float64)

    @functools.cached_property
    def thresholds(self) -> Tensor:
        return 0.5 * (self.numbers[:-1] + self.numbers[1:])

    @property
    def leak(self) -> float:
        """Return the ratio (softmax mass off the token)/(mass on it) that queries may have.

        It is half of the leak at which the levels are counted, so that answers need no correction by the token's
        weight: attention is within 2 leak x of the hidden number, and an answer within (error + 2 leak) x.
        """
        return 0.5 * additive_leak(self.error, self.values)

    @property
    def told(self) -> float:
        """Return log2 of the number of levels: the bits of a hidden value."""
        return math.log2(len(self.numbers))

    def decode(self, answers: Tensor) -> Tensor:
        """Return the level nearest to each answer, int64. An answer that is not finite decodes as the middle level."""
        return torch.bucketize(torch.nan_to_num(answers.double(), nan=0.0, posinf=0.0, neginf=0.0), self.thresholds)

    def places(self, answers: Tensor) -> Tensor:
        """Return answers on a scale on which level j is j, linear between levels, float64 in [0, L-1]."""
        numbers, top = self.numbers, len(self.numbers) - 1
        answers = torch.nan_to_num(answers.double(), nan=0.0, posinf=0.0, neginf=0.0)
        answers = answers.clamp(numbers[0].item(), numbers[-1].item())
        below = torch.searchsorted(numbers, answers, right=True).sub(1).clamp(0, max(0, top - 1))
        return below + (answers - numbers[below]) / (numbers[below + 1] - numbers[below])

    def trusted(self, answers: Tensor) -> Tensor:
        """Mark the rows (m,), bool, of which every answer is within the error of a level, and not all of one level."""
        found = self.numbers[self.decode(answers)]
        near = (answers.double() - found).abs() <= (self.error + 2.0 * self.leak) * self.numbers[-1]
        return near.all(dim=1) & ((found != found[:, :1]).any(dim=1) | torch.tensor(found.shape[1] == 1))


def table_of(metric: str, values: str, error: float) -> LevelTable | AdditiveTable:
    """Return the table of hidden numbers of the format `values` for an error of the metric entrywise or additive."""
    return (AdditiveTable if metric == "additive" else LevelTable)(values, error)


def judge_levels(
    answers: Tensor, hidden: Tensor, table: LevelTable | AdditiveTable, *, sampled_from: int | None = None
) -> Decoded:
    """Compare answers (m, dv) with the hidden levels (m, dv), and certify the bits that a state's message carries.

    table         the hidden numbers
    sampled_from  None: every row was asked once, in order, and the best of the hard, erasure, log-loss and rows
                  certificates counts. A number n: the m rows were drawn with replacement from n, and the sampled-rows
                  certificate counts
    A row is right if all its answers decode to their levels. The hard and the erasure certificate count wrong values:
    of N values, each of which a guess gets right with probability 1/L, w wrong ones have the gain N D(1 - w/N || 1/L).
    Returns the certified bits, and the shares of values decoded wrong and of rows answered right (`Decoded`).
    """
    m, dv = hidden.shape
    wrong = (table.decode(answers) != hidden).sum(dim=1)
    right = wrong == 0
    if sampled_from is not None:
        kind = "sampled rows"
        value = certificates.certified_from_sample(sampled_from, dv * table.told, int((~right).sum()), m)
    else:
        trusted = table.trusted(answers)
        top = max(1, len(table.numbers) - 1)
        chance = torch.full((m,), -dv * table.told, dtype=torch.float64)
        gains = {
            "hard": _gain(m * dv, int(wrong.sum()), table.told),
            "erasure": _gain(dv * int(trusted.sum()), int(wrong[trusted].sum()), table.told),
            "log-loss": certificates.log_loss(
                predictor_gains(table.places(answers) / top, trusted, hidden, len(table.numbers))
            ),
            "rows": certificates.rows(chance, m - int(right.sum())),
        }
        kind, value = max(gains, key=lambda name: gains[name]), certificates.certified(list(gains.values()))
    return Decoded(value, kind, int(wrong.sum()) / (m * dv), right.double().mean().item())


def _gain(values: int, wrong: int, told: float) -> float:
    return row_bits(values, 1, 1.0 - wrong / values, told) if wrong < values else 0.0
