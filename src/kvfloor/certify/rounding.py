"""Define how much rounding the certificates allow for, by the dtype of the computation."""

from __future__ import annotations

import torch
from torch import Tensor

LEAST = {torch.float32: -80.0, torch.float64: -700.0}
"""Least exponent of a softmax weight relative to the largest one: smaller ones are raised to it, and allowed for."""


def unit(dtype: torch.dtype) -> float:
    """Return the allowance for one rounding: twice the unit roundoff of sums and products in `dtype`.

    A sum of n terms, in any order, errs by at most n units of the sum of their sizes. If torch is allowed to multiply
    float32 matrices in fewer bits (`torch.set_float32_matmul_precision`), the unit is that of bfloat16.
    """
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return 2.0**-7
    return torch.finfo(dtype).eps


RUN = 64
"""Most terms of a dot product that are summed at once: the runs' sums are then added one by one."""


def products(x: Tensor, y: Tensor) -> Tensor:
    """Return the dot products (..., m, s) of x (..., m, d) and y (..., s, d), which err by at most `product_rounding`.

    Each is summed in runs of 64 terms, as the rounding of a sum grows with its terms.
    """
    found = torch.matmul(x[..., :RUN], y[..., :RUN].transpose(-1, -2))
    for start in range(RUN, x.shape[-1], RUN):
        found = found + torch.matmul(x[..., start : start + RUN], y[..., start : start + RUN].transpose(-1, -2))
    return found


def product_rounding(d: int, dtype: torch.dtype, run: int = RUN) -> float:
    """Return how much a dot product of width d errs, relative to the product of the norms, if runs are summed first.

    A sum of n products errs by n unit roundoffs, half a unit each, of the sum of their sizes, which is at most the
    product of the norms. 16 units are added for the factors' own rounding, when they are scaled and decoded.
    """
    return unit(dtype) * (min(run, d) / 2 + -(-d // run) / 2 + 16)
