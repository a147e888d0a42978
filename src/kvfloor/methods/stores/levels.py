"""Compute levels that code an entry of a random unit vector with the least mean squared error (Lloyd-Max quantizer).

An entry t of a random unit vector of width d has a density proportional to (1 - t^2)^((d-3)/2) on [-1, 1]. A code of b
bits names one of 2^b levels; an entry gets the code of the nearest level. Widths below 3 are treated as 3.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

_GRID = 1 << 16
_ROUNDS = 60


@lru_cache(maxsize=128)
def levels(bits: int, width: int, device: str = "cpu") -> Tensor:
    """Return the levels (2^bits,), float32 and ascending, for entries of random unit vectors of this width.

    Levels are rounded to multiples of 2^-16, so that rounding differences between processors do not change them.
    """
    return _levels(bits, max(3, width)).to(torch.float32).to(device)


def error(bits: int, width: int) -> float:
    """Return the mean of |u - c|^2 over random unit vectors u; c is u with each entry replaced by the nearest level."""
    t, weight = _density(max(3, width))
    level = levels(bits, width).double()
    nearest = level[torch.bucketize(t, (level[1:] + level[:-1]) / 2)]
    return float((weight * (t - nearest).square()).sum() * width)


def _density(width: int) -> tuple[Tensor, Tensor]:
    """Return (t, weight): a grid of values of an entry, ascending, and their probabilities, which sum to 1."""
    reach = min(1.0, 9.0 / math.sqrt(width))
    t = (torch.arange(_GRID, dtype=torch.float64) + 0.5) / _GRID * 2 * reach - reach
    weight = (1 - t * t) ** ((width - 3) / 2)
    return t, weight / weight.sum()


def _levels(bits: int, width: int) -> Tensor:
    t, weight = _density(width)
    # The best levels lie as densely as the cube root of the density, for many bits; Lloyd's rounds then improve them.
    mass = weight ** (1 / 3)
    share = torch.cumsum(mass, 0) / mass.sum()
    wanted = (torch.arange(2**bits, dtype=torch.float64) + 0.5) / 2**bits
    level = t[torch.searchsorted(share, wanted).clamp_max(_GRID - 1)]
    for _ in range(_ROUNDS):
        cell = torch.bucketize(t, (level[1:] + level[:-1]) / 2)
        sums = torch.zeros(2, len(level), dtype=torch.float64)
        sums.index_add_(1, cell, torch.stack((weight * t, weight)))
        level = torch.where(sums[1] > 0, sums[0] / sums[1].clamp_min(1e-300), level)
    level = (level - level.flip(0)) / 2  # the density is even
    return (level * 2**16).round() / 2**16
