"""Require that two attention outputs differ by at most a tolerance, which depends on the dtype.

The tolerances fit values of size at most 1, the only ones that a check draws. A function `require_...` raises the
exception Broken if its condition fails; its argument `what` begins the error's message.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvfloor.check.law import require

# Allowed difference of two answers to one query from products of different shapes. Each answer is rounded to the dtype
# once (half a unit in the last place of 1), and its weights are rounded inside the product: float32 logits of size 10
# err by about 1e-6. Answers larger than 1, of methods whose weights do not sum to 1, may err as much relative to their
# size.
AGREE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}

# Against float64, an answer may err 1.5 times as much as plain attention in the same dtype (2 times in FlashAttention's
# tests). ROUNDING is added for cases in which plain attention happens to be exact: in half precision it is the
# rounding of one number, relative where that is larger than 1 (a log-mass may be 5), otherwise that of the few float32
# or float64 sums behind a log-mass of size 8.
TIMES_PLAIN = 1.5
ROUNDING = {torch.float64: 4e-15, torch.float32: 1e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def apart(a: Tensor, b: Tensor) -> float:
    """Return the largest absolute difference between a and b; equal infinities differ by 0, NaN by infinity."""
    a, b = a.to(torch.float64), b.to(torch.float64)
    difference = torch.where(a == b, 0.0, (a - b).abs())
    return float(difference.nan_to_num(nan=torch.inf, posinf=torch.inf).max()) if difference.numel() else 0.0


def _unit(x: Tensor) -> Tensor:
    """Return the divisor that makes each entry's error relative: |x| where that is finite and above 1, else 1."""
    return x.to(torch.float64).abs().clamp_min(1.0).nan_to_num(nan=1.0, posinf=1.0)


def _relatively_apart(a: Tensor, b: Tensor) -> float:
    """Return the largest difference between a and b, each divided by |b| where |b| exceeds 1."""
    unit = _unit(b)
    return apart(a.to(torch.float64) / unit, b.to(torch.float64) / unit)


def require_agreement(a: Tensor, b: Tensor, dtype: torch.dtype, what: str, size: float = 1.0) -> None:
    """Raise Broken unless a and b agree within the dtype's tolerance times `size`, the usual size of their entries."""
    require(a.shape == b.shape, f"{what}: the shapes are {tuple(a.shape)} and {tuple(b.shape)}")
    difference, allowed = _relatively_apart(a, b), AGREE[dtype] * size
    require(difference <= allowed, f"{what}: they differ by {difference:.3g}, allowed is {allowed:.3g}")


def require_accuracy(answer: Tensor, truth: Tensor, plain: Tensor, dtype: torch.dtype, what: str) -> None:
    """Raise Broken if `answer` has an error above a limit: 1.5 times the error of `plain`, plus the dtype's rounding.

    An error is the largest difference from `truth`, which was computed in float64. `plain` is what plain attention
    gives in `dtype`, the dtype of the cache.
    """
    size = max(_unit(truth).flatten().tolist(), default=1.0) if dtype.itemsize == 2 else 1.0
    error, allowed = apart(answer, truth), TIMES_PLAIN * apart(plain, truth) + ROUNDING[dtype] * size
    require(error <= allowed, f"{what}: the error is {error:.3g}, allowed is {allowed:.3g}")


def require_same_bits(a: Tensor, b: Tensor, what: str) -> None:
    """Raise Broken unless a and b are equal bit for bit."""
    same = a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    require(
        same, f"{what}: they are not the same bits (largest difference {apart(a, b) if a.shape == b.shape else '?'})"
    )
