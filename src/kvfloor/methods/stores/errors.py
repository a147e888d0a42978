"""Bound the errors of coded vectors, and of attention over them, by what is stored: for every input, every query.

A code names the level nearest to an entry of a unit vector u. The entries that have this nearest level are the code's
cell. Let c be the vector of levels. Nothing but the cells and |u| = 1 is used, so the bounds hold for any rotation. The
proofs are in docs/guarantees.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SLOPES = (0.2, 0.3, 0.35, 0.4, 0.44, 0.47, 0.5)


def cells(level: Tensor) -> tuple[Tensor, Tensor]:
    """Return (low, high), each (codes,): the least and the largest |entry| in the cell of each of the levels (codes,).

    The levels must be ascending and symmetric about 0, without 0, so that no cell has entries of both signs.
    """
    edge = (level[1:] + level[:-1]) / 2
    ends = torch.stack((torch.cat((-torch.ones_like(edge[:1]), edge)), torch.cat((edge, torch.ones_like(edge[:1])))))
    return ends.abs().amin(0), ends.abs().amax(0)


def least_product(c: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return a lower bound (...) on c.u over all unit vectors u in the cells of the levels c (..., w).

    c (..., w) are the sizes of the levels; low and high (..., w) are the least and the largest |entry| of each cell.
    For every slope a >= 0, c.u = a + sum_i (c_i |u_i| - a u_i^2), and each term is least at an end of its cell. An
    entry is at most sqrt(low_i^2 + 1 - sum_j low_j^2), as the others are at least low_j. The best of a few slopes is
    taken.
    """
    room = (1 - low.square().sum(-1, keepdim=True)).clamp_min(0)
    high = torch.minimum(high, (low.square() + room).sqrt())
    least = (c * low).sum(-1)
    for slope in _SLOPES:
        ends = torch.minimum(c * low - slope * low.square(), c * high - slope * high.square())
        least = torch.maximum(least, slope + ends.sum(-1))
    return least


def of_token(c: Tensor, level: Tensor, unbiased: bool) -> tuple[Tensor, Tensor]:
    """Return upper bounds (..., ) on (|x|, |y - x|), as multiples of |y|, for a vector x that is decoded as y.

    y is s c in the rotated frame, with the scale s of `TokenCodes`. c (..., w) int64 are indices of `level`. Let k be
    c.u / |c|, the cosine of the angle between x and y. If `unbiased`, |x| = k |y| and |y - x|^2 = (1 - k^2) |y|^2.
    Otherwise |y| = k |x| and |y - x|^2 = (1 / k^2 - 1) |y|^2.
    """
    low, high = (x[c] for x in cells(level))
    size = level.abs()[c]
    cosine = (least_product(size, low, high) / size.square().sum(-1).sqrt()).clamp(0, 1)
    if unbiased:
        return torch.ones_like(cosine), (1 - cosine.square()).sqrt()
    return 1 / cosine, (1 / cosine.square() - 1).clamp_min(0).sqrt()
