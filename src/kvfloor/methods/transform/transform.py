"""Code vectors as whole numbers of steps along the axes of a basis, and restore them.

The step is the same for all axes. So an axis of variance v takes about log2(v / step^2) / 2 bits after the entropy
coder, and an axis whose variance is far below step^2 none: this is reverse water-filling, with the level step^2 / 12.
Each vector has a fineness f, a whole number: its steps are 2^(f / 2) times smaller, so it takes f / 2 bits more per
axis, and its squared error is 2^f times smaller. That is reverse water-filling over vectors, whose errors count
unequally.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvfloor.methods.transform.basis import Basis
from kvfloor.methods.transform.integers import compressed, restored
from kvfloor.methods.transform.water import water_level

SMALLEST = 40  # axes whose mean square in steps is below 2^-40 count as alike


def step_for(variances: Tensor, error: float) -> float:
    """Return the step at which the mean squared error of a vector of fineness 0 is about `error`, over all axes.

    variances: the variance of the coordinate along each axis, any shape. The relation is that of small steps (step^2 /
    12 each) for axes above the level, and all of the variance for the others.
    """
    return (12 * water_level(variances, error)) ** 0.5 or 1.0  # any step does where nothing varies


def quantised(x: Tensor, fineness: Tensor, basis: Basis, step: float) -> Tensor:
    """Return vectors x (n, w), float32, in steps along the axes: whole numbers (n, axes), int64.

    fineness: (n,), int64, of each vector.
    """
    return ((x - basis.mean) @ basis.forward / _steps(fineness, step)).round().long()


def dequantised(table: Tensor, fineness: Tensor, mean: Tensor, backward: Tensor, step: float) -> Tensor:
    """Return the vectors (n, w), float32, that a table (n, axes) of steps from `quantised` stands for.

    mean (w,), backward (axes, w): those of the basis. Along every axis, each vector differs by at most half of its step
    from the one given to `quantised`, up to rounding.
    """
    return table.float() * _steps(fineness, step) @ backward + mean


def encode(x: Tensor, fineness: Tensor, basis: Basis, step: float) -> tuple[bytes, bytes]:
    """Return vectors x (n, w) as bytes: the size of the numbers of each axis, and the numbers of `quantised`.

    Raises ValueError if a number of steps exceeds 2^30, and if zstandard is not installed.
    """
    table = quantised(x, fineness, basis, step)
    spread = (table * 2.0 ** (-0.5 * fineness.double()).unsqueeze(1)).square().sum(0) / max(1, len(x))
    size = torch.log2(spread.clamp_min(2.0**-SMALLEST)).round().long()
    one = torch.zeros(1, dtype=torch.int64)
    return compressed(size.unsqueeze(0), one, torch.zeros_like(size)), compressed(table, fineness, size)


def decode(codes: Sequence[bytes], fineness: Tensor, mean: Tensor, backward: Tensor, step: float) -> Tensor:
    """Return the vectors (n, w), float32, that `encode` coded with the same fineness and step.

    mean (w,), backward (axes, w): those of the basis that it coded with. Raises DamagedCode (a ValueError) for bytes
    that are no such codes.
    """
    sizes, numbers = codes
    one, none = torch.zeros(1, dtype=torch.int64), torch.zeros(backward.shape[0], dtype=torch.int64)
    size = restored(sizes, one, none).squeeze(0)
    return dequantised(restored(numbers, fineness, size), fineness, mean, backward, step)


def _steps(fineness: Tensor, step: float) -> Tensor:
    """Return the step of each vector, (n, 1)."""
    return (step * 2.0 ** (-0.5 * fineness.double())).float().unsqueeze(1)
