"""Measure how softmax mass is spread over keys. In shapes, rows are kv heads, m queries and n keys of each."""

from __future__ import annotations

from torch import Tensor


def softmax_weights(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Return the weights (rows, m, n), float64, of queries q (rows, m, d) on keys k (rows, n, d)."""
    return (scale * q.double() @ k.double().mT).softmax(-1)


def keys_for_mass(weights: Tensor, mass: float) -> Tensor:
    """Return the least number of keys whose weights sum to `mass` or more: weights (..., n), result (...), int64."""
    before = weights.sort(-1, descending=True).values.cumsum(-1)
    return ((before < mass).sum(-1) + 1).clamp_max(weights.shape[-1])


def effective_keys(weights: Tensor) -> Tensor:
    """Return the exponential of the weights' entropy: weights (..., n), result (...); n for equal weights."""
    return (-(weights * weights.clamp_min(1e-300).log()).sum(-1)).exp()


def mass_of(read: Tensor, q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Return the softmax mass (rows, m), float64, that queries q give to the keys in the mask `read` (rows, m, n)."""
    return softmax_weights(q, k, scale).mul(read).sum(-1)
