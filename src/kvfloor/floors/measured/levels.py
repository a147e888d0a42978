"""Compute the number of value levels that an answer distinguishes, and the bits of the read floor that follow.

The read floor is a lower bound on the bits of a state (the memory of a KV-cache method) that answers queries over given
keys. In its proof, a receiver (Bob) reconstructs ("decodes") hidden values from the answers of the state, one group of
tokens after the other.
    group   tokens that share one hidden row of dv values, read by one query
    weight  softmax weight that the query of a group puts on the group
    leak    softmax weight that the query of a group puts on all groups decoded later
    levels  equally spaced values in [-1, 1] that a hidden value can take
"""

import dataclasses

import torch
from torch import Tensor

from kvfloor.floors.entropy import H2
from kvfloor.validation import whole, within

_SHAVE = 1e-12  # keeps the rounding of a quotient from adding a level
_MOST = 2**53  # whole numbers up to which float64 counts


def grain(dtype: torch.dtype) -> float:
    """Return the largest rounding error of a number in [-1, 1] in `dtype`: 2^-25 for float32, 2^-9 for bfloat16.

    In the read floor this error is added to the error that answers may have.
    """
    return torch.finfo(dtype).eps / 4.0


@dataclasses.dataclass(frozen=True)
class Demand:
    """Hold the accuracy required of attention's answers, and the number format of the values.

    eta          largest error that is allowed in a value of an answer, in [0, 1), for values in [-1, 1]
    p            probability that a whole row, the dv values of one answer, is within eta
    dv           width of a value
    dtype        number format of the values; its rounding error is added to eta
    most_levels  a cap on the number of equally spaced levels that a hidden value can take, such as 16 for 4-bit values;
                 None: no cap besides eta and the rounding
    """

    eta: float
    p: float
    dv: int
    dtype: torch.dtype = torch.float32
    most_levels: int | None = None

    def __post_init__(self) -> None:
        within("eta", self.eta, 0.0, 1.0, high_open=True)
        within("p", self.p, 0.0, 1.0, low_open=True)
        whole("dv", self.dv)
        if not isinstance(self.dtype, torch.dtype) or not self.dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating-point torch dtype, got {self.dtype!r}")
        if self.most_levels is not None:
            whole("most_levels", self.most_levels, least=2)

    @property
    def error(self) -> float:
        """Return the allowed error of an answer: eta plus the largest rounding error of a value in `dtype`.

        The rounding counts because the answer is compared with exact attention over the values before rounding.
        """
        return self.eta + grain(self.dtype)

    def levels(self, weights: Tensor, leaks: Tensor) -> Tensor:
        """Return the number of levels that Bob can tell apart in the values of each group of tokens, int64.

        weights are the softmax weights of queries on their own groups of tokens, leaks those on groups decoded later.
        Both have the same shape, which is also that of the result.
        Law: the largest whole L with (L - 1)(e + leak) < weight, in 1..`most_levels`, where e is the allowed error of
        an answer: eta plus the rounding error of the values. L equally spaced levels in [-1, 1] lie 2/(L-1) apart. Bob
        divides the answer by the weight, and is then off by at most (e + leak)/weight. If that is less than half a
        spacing, the nearest level is the hidden one.
        """
        ratio = weights.double() / (self.error + leaks.double())
        return torch.ceil(ratio * (1.0 - _SHAVE)).clamp(1.0, self._cap).to(torch.int64)

    def bits(self, weights: Tensor, leaks: Tensor) -> Tensor:
        """Return the bits that each group of tokens adds to the read floor, float64.

        weights and leaks are those of `levels`: each query's softmax weight on its own group, and on groups decoded
        later.
        Law: p dv log2 L - H2(p), and at least 0; 0 for L = 1. L is the number of levels that Bob can tell apart (the
        method `levels`), and H2 is the binary entropy.
        """
        levels = self.levels(weights, leaks)
        bits = self.p * self.dv * torch.log2(levels.double()) - H2(self.p)
        return bits.clamp_min(0.0).masked_fill(levels < 2, 0.0)

    def rough_bits(self, weights: Tensor, leaks: Tensor) -> Tensor:
        """Return an estimate of the bits that each group of tokens adds to the read floor, in the dtype of `weights`.

        The method `bits` computes these bits in float64. The estimate is faster, and accurate enough for the search
        that chooses the groups. weights and leaks are those of `levels`: each query's softmax weight on its own group,
        and on groups decoded later.
        """
        levels = torch.ceil(weights / (self.error + leaks)).clamp_(1.0, self._cap)
        bits = torch.log2(levels).mul_(self.p * self.dv).sub_(H2(self.p)).clamp_min_(0.0)
        return bits.masked_fill_(levels < 2.0, 0.0)

    @property
    def ceiling(self) -> float:
        """Return the most bits that a group can add to the read floor: those of a group with weight 1 and leak 0."""
        return float(self.bits(torch.ones(()), torch.zeros(())))

    @property
    def _cap(self) -> float:
        return float(_MOST if self.most_levels is None else self.most_levels)
