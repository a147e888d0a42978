"""Rotate vectors by a fixed random rotation, made of sign flips and Walsh-Hadamard transforms.

Whatever the vector was, the entries of the rotated vector have about equal variance and are close to normally
distributed. So one set of levels codes all entries well. The rotation has two rounds. In each round, every entry is
first multiplied by a fixed random sign. Then the Walsh-Hadamard transform is applied to w entries, where w is the
largest power of two up to the width: to the first w in round one, to the last w in round two. Only additions and
multiplications by constants are done, element by element, so the same vector gives the same bits in any batch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

_SEED = 0x6B76

Rotation = Callable[[Tensor], Tensor]
"""A function that rotates vectors (..., width)."""


@lru_cache(maxsize=64)
def _signs(width: int, device: str) -> Tensor:
    """Return the signs of both rounds, (2, width), each -1 or 1: constants of this release, the same for all states."""
    drawn = torch.randint(0, 2, (2, width), generator=torch.Generator().manual_seed(_SEED))
    return (2.0 * drawn - 1.0).to(device)


def turned(x: Tensor) -> Tensor:
    """Rotate vectors x (..., width), float32 or float64: return (..., width)."""
    width = x.shape[-1]
    window, signs = _window(width), _signs(width, str(x.device)).to(x.dtype)
    x = _mixed(x * signs[0], 0, window)
    return _mixed(x * signs[1], width - window, width)


def turned_back(x: Tensor) -> Tensor:
    """Undo `turned`: return the vectors (..., width) whose rotation is x."""
    width = x.shape[-1]
    window, signs = _window(width), _signs(width, str(x.device)).to(x.dtype)
    x = _mixed(x, width - window, width) * signs[1]
    return _mixed(x, 0, window) * signs[0]


@lru_cache(maxsize=64)
def matrix(width: int, dtype: torch.dtype, device: str) -> Tensor:
    """Return the rotation as a matrix R (width, width): `turned(x)` is x R^T up to rounding."""
    return turned(torch.eye(width, dtype=dtype, device=device)).T.contiguous()


@lru_cache(maxsize=64)
def transposed(width: int, dtype: torch.dtype, device: str) -> Tensor:
    """Return the transpose of `matrix`, a view of it."""
    return matrix(width, dtype, device).T


def rotated(x: Tensor) -> Tensor:
    """Do the work of `turned` in one product, which rounds otherwise, and may round otherwise in another batch."""
    return x @ transposed(x.shape[-1], x.dtype, str(x.device))


def _window(width: int) -> int:
    return 1 << (width.bit_length() - 1)


def _mixed(x: Tensor, start: int, stop: int) -> Tensor:
    """Apply the orthonormal Walsh-Hadamard transform to entries start .. stop - 1 of x (..., width)."""
    mixed, size = x[..., start:stop], stop - start
    step = 1
    while step < size:
        one, two = mixed.unflatten(-1, (-1, 2, step)).unbind(-2)
        mixed = torch.stack((one + two, one - two), -2).flatten(-3)
        step *= 2
    mixed = mixed * size**-0.5
    return torch.cat((x[..., :start], mixed, x[..., stop:]), -1)
