"""Code vectors as whole numbers of steps along the axes of a basis, and restore them.

The step is the same for all axes. So an axis of variance v takes about log2(v / step^2) / 2 bits after the entropy
coder, and an axis whose variance is far below step^2 none: this is reverse water-filling, with the level step^2 / 12.
Each vector has a fineness f, a whole number: its steps are 2^(f / 2) times smaller, so it takes f / 2 bits more per
axis, and its squared error is 2^f times smaller. That is reverse water-filling over vectors, whose errors count
unequally.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvfloor.methods.transform.basis import Basis
from kvfloor.methods.transform.integers import compressed, restored
from kvfloor.methods.transform.water import water_level


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


def encode(x: Tensor, fineness: Tensor, basis: Basis, step: float) -> bytes:
    """Return vectors x (n, w) as bytes, the table of `quantised` entropy-coded.

    Vectors of equal fineness come together, so that neighbouring numbers are alike in size. Raises ValueError if a
    number of steps exceeds 2^30, and if zstandard is not installed.
    """
    order = fineness.argsort(stable=True)
    return compressed(quantised(x[order], fineness[order], basis, step))


def decode(data: bytes, fineness: Tensor, mean: Tensor, backward: Tensor, step: float) -> Tensor:
    """Return the vectors (n, w), float32, that `encode` coded with the same fineness and step.

    mean (w,), backward (axes, w): those of the basis that it coded with. Raises DamagedCode (a ValueError) for bytes
    that are no such codes.
    """
    order = fineness.argsort(stable=True)
    table = restored(data, len(fineness), backward.shape[0])
    x = torch.empty(len(fineness), backward.shape[1])
    x[order] = dequantised(table, fineness[order], mean, backward, step)
    return x


def _steps(fineness: Tensor, step: float) -> Tensor:
    """Return the step of each vector, (n, 1)."""
    return (step * 2.0 ** (-0.5 * fineness.double())).float().unsqueeze(1)
