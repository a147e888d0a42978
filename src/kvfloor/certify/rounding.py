"""Define how much rounding the certificates allow for, by the dtype of the computation."""

from __future__ import annotations

import torch

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
