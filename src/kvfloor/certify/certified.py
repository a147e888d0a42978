"""Define attention results that carry a bound on their own error, and the merge of two of them.

Let Z be the true softmax mass of a set of tokens (sum of exp(logit)), and N the true sum of exp(logit) times value, so
that the true output is N / Z. The estimate is a `Partial`: a mean c and a log-mass, whose exponential is Z'. The proofs
are in docs/certificates.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kvfloor.certify.rounding import unit
from kvfloor.core.partial import Partial

_MERGING = 128  # roundings of a merge: exponents of at most 80 in size, and a few products


@dataclass(frozen=True)
class Certified:
    """Hold an estimate of attention over a set of tokens, and bounds on its error.

    partial  the estimate: c (..., dv) and log-mass (...)
    error    (...)  at least ||N - c Z|| / Z', in the Euclidean norm
    spread   (...)  at least |Z - Z'| / Z'
    largest  (...)  at most the largest Euclidean norm of a value in the set; 0 where the set is empty
    chance   (...)  another bound on ||N / Z - c||, which fails with probability at most `delta` over the dither of the
             codes, for a query, keys and values that do not depend on it; None: there is none
    delta    0 where there is none

    The set's true output differs from c by at most `bound`: always where it is `certain`, and with the probability of
    `chance` where it is `statistical`. The results over two disjoint sets `merge`.
    """

    partial: Partial
    error: Tensor
    spread: Tensor
    largest: Tensor
    chance: Tensor | None = None
    delta: float = 0.0

    @classmethod
    def exact(cls, partial: Partial, largest: Tensor, rounding: float = 0.0) -> Certified:
        """Return a result over tokens that were read exactly, whose weights err by the factor `rounding` at most.

        largest (...): the largest norm of a value of the set; the error is at most 2 * rounding * largest.
        """
        error = 2.0 * rounding * largest
        return cls(partial, error, torch.full_like(error, rounding), largest)

    @cached_property
    def bound(self) -> Tensor:
        """Return a bound (...) on the Euclidean norm of c minus the true output: the less of `certain` and `chance`."""
        return self.certain if self.chance is None else torch.minimum(self.certain, self.chance)

    @property
    def statistical(self) -> Tensor:
        """Return a mask (...), True where the bound is one that holds with probability 1 - delta."""
        return self.bound < self.certain

    @cached_property
    def certain(self) -> Tensor:
        """Return the bound (...) that always holds; infinite where none follows."""
        bound = torch.where(self.spread < 1, self.error / (1 - self.spread), torch.inf)
        return torch.where(bound >= 0, bound, torch.inf)  # also where an infinity made the error NaN

    @property
    def relative(self) -> Tensor:
        """Return the bound (...) divided by `largest`; 0 where the bound is 0."""
        bound = self.bound
        return torch.where(bound == 0, bound, bound / self.largest)

    def within(self, epsilon: float) -> Tensor:
        """Return a mask (...), True where the bound is at most epsilon times the largest value norm."""
        return self.bound <= epsilon * self.largest

    def merge(self, other: Certified) -> Certified:
        """Return the result over the union of two disjoint sets of tokens: this result's and that of `other`.

        Up to rounding, error = sum of p_j (error_j + spread_j ||c_j - c||) and spread = sum of p_j spread_j, where p_j
        is the share of set j in the estimated mass and c the merged mean. It has no `chance`.
        """
        partial = self.partial.merge(other.partial)
        size = partial.log_mass
        eps = unit(size.dtype)
        error, spread, length = (torch.zeros_like(size) for _ in range(3))
        for side in (self, other):
            mass = side.partial.log_mass
            share = torch.where(mass == -torch.inf, 0.0, (mass - size).exp())
            moved = (side.partial.mean - partial.mean).norm(dim=-1)
            error = error + share * (side.error + side.spread * moved)
            spread = spread + share * side.spread
            length = length + share * side.partial.mean.norm(dim=-1)
        alone = torch.minimum(self.partial.log_mass, other.partial.log_mass) == -torch.inf
        rounding = (eps * (_MERGING + 4 * size.abs())).masked_fill(alone, 0.0)
        return Certified(
            partial,
            error * (1 + rounding) + rounding * length,
            spread * (1 + rounding) + rounding,
            torch.maximum(self.largest, other.largest),
        )
