"""Check the arguments of the measured floors: lower bounds on the memory of attention over given keys and queries.

Errors name the argument (`name`), the given value and the allowed values. A log mass is the log-sum-exp of a query's
logits on a set of tokens.
"""

import math

import torch
from torch import Tensor


def matrix(name: str, value: Tensor, width: int | None = None, least: int = 1) -> Tensor:
    """Require a finite floating-point matrix of at least `least` rows, and of `width` columns if given; return it."""
    shape = f"(n, {'d' if width is None else width})"
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name} must be a floating-point tensor {shape}, got {got}")
    if value.ndim != 2 or value.shape[0] < least or value.shape[1] < 1 or width not in (None, value.shape[1]):
        raise ValueError(f"{name} must have shape {shape} with at least {least} rows, got {tuple(value.shape)}")
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"{name} must be finite, got NaN or infinite entries")
    return value.detach()


def log_masses(name: str, value: Tensor | float | None, count: int) -> Tensor | None:
    """Check log masses, one per query, and return them as (count,) float64; None stays None.

    A log mass is the log-sum-exp of a query's logits on some tokens; -inf means that there are none. A single number is
    taken for all queries. Raises ValueError for another shape, NaN or +inf.
    """
    if value is None:
        return None
    masses = torch.as_tensor(value).detach().to(torch.float64)
    if masses.ndim == 0:
        masses = masses.expand(count)
    if masses.shape != (count,):
        raise ValueError(f"{name} must be one number or have shape ({count},), got {tuple(masses.shape)}")
    if bool(torch.isnan(masses).any()) or bool((masses == torch.inf).any()):
        raise ValueError(f"{name} must be finite or -inf, got NaN or +inf")
    return masses


def logit_law(scale: float, softcap: float | None) -> tuple[float, float | None]:
    """Check the numbers that define logits: return `scale` as a finite float, `softcap` as None or a positive float.

    Raises ValueError for other values.
    """
    if not (isinstance(scale, (int, float)) and math.isfinite(scale)):
        raise ValueError(f"scale must be a finite number, got {scale!r}")
    if softcap is not None and not (isinstance(softcap, (int, float)) and 0 < softcap < math.inf):
        raise ValueError(f"softcap must be None or a positive number, got {softcap!r}")
    return float(scale), None if softcap is None else float(softcap)
