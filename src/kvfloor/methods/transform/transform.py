"""Code vectors as whole numbers of steps along the axes of a basis, and restore them.

The step is the same for all axes. So an axis of variance v takes about log2(v / step^2) / 2 bits after the entropy
coder, and an axis whose variance is far below step^2 none: this is reverse water-filling, with the level step^2 / 12.
The newest vectors of a stream are sharp, i.e. coded in steps that are SHARPER times smaller.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvfloor.methods.transform.basis import Basis
from kvfloor.methods.transform.integers import compressed, restored
from kvfloor.methods.transform.water import water_level

SHARPER = 8.0
"""How many times smaller the steps of sharp vectors are: 3 bits more per number."""

NEWEST = 128
"""How many of a stream's newest vectors are sharp."""


def sharp(n: int) -> Tensor:
    """Return a mask (n,), True for those of a stream's n vectors that are coded in smaller steps."""
    return torch.arange(n) >= n - NEWEST


def step_for(variances: Tensor, error: float) -> float:
    """Return the step at which the mean squared error of a vector is about `error`, summed over all axes.

    variances: the variance of the coordinate along each axis, any shape. The relation is that of small steps (step^2 /
    12 each) for axes above the level, and all of the variance for the others.
    """
    return (12 * water_level(variances, error)) ** 0.5 or 1.0  # any step does where nothing varies


def quantised(x: Tensor, smaller: Tensor, basis: Basis, step: float) -> list[Tensor]:
    """Return vectors x (n, w), float32, in steps along the axes: two tables (vectors, axes) of whole numbers, int64.

    The first table has the vectors that are not `smaller` (n,), bool, the second those that are, in smaller steps.
    """
    y = (x - basis.mean) @ basis.forward / step
    return [part.round().long() for part in (y[~smaller], y[smaller] * SHARPER)]


def dequantised(tables: Sequence[Tensor], smaller: Tensor, mean: Tensor, backward: Tensor, step: float) -> Tensor:
    """Return the vectors (n, w), float32, that two tables of steps from `quantised` stand for.

    mean (w,), backward (axes, w): those of the basis. Along every axis, each vector differs by at most half a step from
    the one given to `quantised`, up to rounding.
    """
    y = torch.empty(len(smaller), backward.shape[0])
    for chosen, table, size in zip((~smaller, smaller), tables, (step, step / SHARPER), strict=True):
        y[chosen] = table.float() * size
    return y @ backward + mean


def encode(x: Tensor, smaller: Tensor, basis: Basis, step: float) -> list[bytes]:
    """Return vectors x (n, w) as two byte strings, the tables of `quantised`, entropy-coded.

    Raises ValueError if a number of steps exceeds 2^30, and if zstandard is not installed.
    """
    return [compressed(table) for table in quantised(x, smaller, basis, step)]


def decode(codes: Sequence[bytes], smaller: Tensor, mean: Tensor, backward: Tensor, step: float) -> Tensor:
    """Return the vectors (n, w), float32, that `encode` coded with the same mask and step.

    mean (w,), backward (axes, w): those of the basis that it coded with. Raises DamagedCode (a ValueError) for bytes
    that are no such codes.
    """
    counts = (int((~smaller).sum()), int(smaller.sum()))
    tables = [restored(data, n, backward.shape[0]) for data, n in zip(codes, counts, strict=True)]
    return dequantised(tables, smaller, mean, backward, step)
