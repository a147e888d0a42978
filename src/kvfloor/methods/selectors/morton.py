"""Encode grid points as integers along a Z-shaped curve that keeps most neighbours close (Morton codes)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def cells(x: Tensor, bits: int) -> Tensor:
    """Return the index of the cell that holds each coordinate of x: int64 in [0, 2**bits), of x's shape.

    Cells are the intervals between quantiles of the standard normal, so a standard normal coordinate is in each with
    the same probability. The grid is fixed in advance. If its range came from the data, later tokens would change the
    Morton codes of earlier ones.
    """
    share = 0.5 * (1.0 + torch.erf(x.to(torch.float64) / math.sqrt(2.0)))
    return (share * 2**bits).floor().clamp(0, 2**bits - 1).to(torch.int64)


def interleave(cell: Tensor, bits: int) -> Tensor:
    """Return the Morton codes (...) of grid points cell (..., dims) int64.

    The last axis of `cell` has the dims coordinates of a point, each in [0, 2**bits). A point's code interleaves their
    bits: bit b of coordinate j becomes bit b * dims + j. Raises ValueError where dims * bits exceeds 62, which an int64
    does not hold.
    """
    dims = cell.shape[-1]
    if dims * bits > 62:
        raise ValueError(f"{dims} coordinates of {bits} bits make {dims * bits}-bit codes; at most 62 fit")
    bit = torch.arange(bits, device=cell.device)
    place = bit * dims + torch.arange(dims, device=cell.device).unsqueeze(1)  # (dims, bits)
    return (((cell.unsqueeze(-1) >> bit) & 1) << place).sum((-2, -1))
