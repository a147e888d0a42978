"""Bound the operator norm of a matrix by the trace of a power of its Gram matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from kvfloor.core.rowwise import product, total

_SQUARINGS = 4


def operator_norm(gram: Tensor, eps: float) -> Tensor:
    """Return a bound (rows,) on the operator norm of matrices D (w, n) with Gram matrices D D^T = gram (rows, w, w).

    The largest eigenvalue of gram is at most the 16th root of the trace of its 16th power, which is at most w^(1/16)
    times as large. eps: bound on the error of `gram`, in the Frobenius norm, relative to its trace.
    """
    width = gram.shape[-1]
    trace = total(gram.diagonal(dim1=-2, dim2=-1).double())
    power = gram.double() / trace.clamp_min(torch.finfo(torch.float64).tiny)[:, None, None]
    exponent, scale = 1.0, torch.zeros_like(trace)  # power ** exponent times exp(scale) is the normalised Gram matrix
    for _ in range(_SQUARINGS - 1):
        power, exponent = product(power, power), exponent / 2
        size = total(total(power.square())).sqrt().clamp_min(torch.finfo(torch.float64).tiny)
        power, scale = power / size[:, None, None], scale + exponent * size.log()
    last = total(total(power.square())).sqrt()  # at least the largest eigenvalue of the 8th power
    largest = (scale.exp() * last.pow(exponent)).nan_to_num()
    return (trace * (largest * (1 + 1e-9 * width) + eps)).sqrt() * (1 + eps)
