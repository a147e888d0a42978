"""Encode grid points as integers along a Z-shaped curve that keeps most neighbours close (Morton codes)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def cells(x: Tensor, bits: int) -> Tensor:
    """Return the number of the interval that each entry of x lies in: int64 in [0, 2**bits), of x's shape.

    The 2**bits intervals (cells) lie between quantiles of the standard normal distribution, so that a standard normal
    number is in each with the same probability. They are fixed in advance: if they were fitted to the data, later
    tokens would change the Morton codes of earlier ones.
    """
    share = 0.5 * (1.0 + torch.erf(x.to(torch.float64) / math.sqrt(2.0)))
    return (share * 2**bits).floor().clamp(0, 2**bits - 1).to(torch.int64)


def interleave(cell: Tensor, bits: int) -> Tensor:
    """Return the Morton code of each grid point in cell (..., dims), int64: codes (...), int64.

    The last axis of `cell` has the dims coordinates of a point, each in [0, 2**bits). A point's code interleaves their
    bits: bit b of coordinate j becomes bit b * dims + j. Raises ValueError if dims * bits exceeds 62, as the codes then
    do not fit into int64.
    """
    dims = cell.shape[-1]
    if dims * bits > 62:
        raise ValueError(f"{dims} coordinates of {bits} bits make {dims * bits}-bit codes; at most 62 fit")
    bit = torch.arange(bits, device=cell.device)
    place = bit * dims + torch.arange(dims, device=cell.device).unsqueeze(1)  # (dims, bits)
    return (((cell.unsqueeze(-1) >> bit) & 1) << place).sum((-2, -1))
