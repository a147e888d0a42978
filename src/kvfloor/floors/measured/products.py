"""Compute attention logits in a chosen precision, and bound the rounding error of the logits in each precision.

A softcap replaces each logit s by softcap * tanh(s / softcap); None leaves the logits as they are.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from kvfloor.logits import cap_

_EXP_ULPS, _TANH_ULPS = 4.0, 8.0  # more than torch's exp, and c tanh(s / c) with its roundings, err in their last place
_FLOAT32_UNIT = 2.0**-24


@dataclasses.dataclass(frozen=True)
class Factors:
    """Hold what logits are computed from: queries times the scale (m, d), keys (n, d), and the softcap.

    Queries and keys have one dtype, whose precision the logits are computed in.
    """

    q: Tensor
    k: Tensor
    softcap: float | None

    @staticmethod
    def of(q: Tensor, k: Tensor, scale: float, softcap: float | None, dtype: torch.dtype) -> Factors:
        """Return the factors of the logits scale q.k of q (m, d) on k (n, d), each rounded to `dtype` once."""
        return Factors((q.double() * scale).to(dtype), k.to(dtype), softcap)

    def logits(self, queries: slice | Tensor, tokens: slice | Tensor) -> Tensor:
        """Return the logits (b, t) of the queries on the tokens at the given indices.

        bfloat16 factors give float32 logits.
        """
        products = self.q[queries] @ self.k[tokens].T
        products = products.float() if products.dtype == torch.bfloat16 else products
        return cap_(products, self.softcap)

    @property
    def sum_unit(self) -> float:
        """Return the unit roundoff (half of eps) of the format in which the sums of dot products are computed.

        Logits are processed further in this format too. The format is the factors' dtype, but float32 for bfloat16
        factors.
        """
        return _FLOAT32_UNIT if self.q.dtype == torch.bfloat16 else torch.finfo(self.q.dtype).eps / 2.0


@dataclasses.dataclass(frozen=True)
class Rounding:
    """Hold bounds on the logits that are computed in one precision: two tensors (m,), float64, one bound per query.

    The true logit is that of the given query and key in exact arithmetic. Both logits are after the softcap, if any.
    error  bound on the difference of a computed logit from the true one, for every key
    reach  bound on the absolute value of the true logit, for every key
    """

    error: Tensor
    reach: Tensor

    @staticmethod
    def of(factors: Factors, q: Tensor, k: Tensor, scale: float) -> Rounding:
        """Bound the error of the logits that `factors` give, and the absolute value of the true ones, as a `Rounding`.

        `factors` were made from q (m, d), k (n, d) and scale.
        """
        return Rounding.of_sizes(factors, q, key_sizes(factors, k), scale)

    @staticmethod
    def of_sizes(factors: Factors, q: Tensor, sizes: tuple[Tensor, Tensor], scale: float) -> Rounding:
        """Bound the same, given the `sizes` of the keys (`key_sizes`), which many sets of queries can share.

        Notation: q is here the unrounded query times scale, q'
        and k' are the rounded factors, |.| are l2 norms (of keys: the largest), and u is the unit roundoff of the sums
        (float32's for bfloat16). The error is at most the sum of
            |q - q'| |k| + |q'| |k - k'|      the factors' own rounding, measured
            (d + 2) u |q'| |k'|               the sum over coordinates, in any order (Cauchy-Schwarz)
            unit(dtype) |q'| |k'|             the rounding of the result, unit(dtype) the unit roundoff of the factors
            8 u softcap                       the softcap, whose slope is at most 1
        The true logit is at most (|q'| + |q - q'|) (|k'| + |k - k'|), which is >= |q| |k|, and at most the softcap.
        Both bounds are enlarged by 0.1 %.
        """
        short_q = factors.q.double()
        lost_q, size_q = (q.double() * scale - short_q).norm(dim=1), short_q.norm(dim=1)
        size_k, lost_k = sizes
        unit = torch.finfo(factors.q.dtype).eps / 2.0
        error = lost_q * size_k + size_q * lost_k + ((q.shape[1] + 2) * factors.sum_unit + unit) * size_q * size_k
        reach = (size_q + lost_q) * size_k
        if factors.softcap is not None:
            error, reach = error + _TANH_ULPS * factors.sum_unit * factors.softcap, reach.clamp_max(factors.softcap)
        return Rounding(error * 1.001, reach * 1.001)

    def at(self, queries: Tensor) -> Rounding:
        """Return the bounds of the queries at the given indices."""
        return Rounding(self.error[queries], self.reach[queries])

    def of_sums(self, unit: float, terms: int) -> Tensor:
        """Bound |log(computed / true)| for a sum of exponentials of a query's logits: (m,), one bound per query.

        The sum has `terms` terms, and `unit` is the unit roundoff of the format that it is computed in.
        """
        return self.error + unit * (_EXP_ULPS + 2.0 * self.reach + terms) * 1.01


def key_sizes(factors: Factors, k: Tensor) -> tuple[Tensor, Tensor]:
    """Return two numbers for keys k (n, d): a bound on their norms, and on the norms of what rounding took from them.

    Both are float64, and cover the given keys and those of `factors`.
    """
    short = factors.k.double()
    lost = (k.double() - short).norm(dim=1).max()
    return short.norm(dim=1).max() + lost, lost


def logits(q: Tensor, k: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Return the logits scale q.k, after the softcap if there is one, of q (m, d) on k (n, d): (m, n).

    They are computed in the precision of k, but float32 for bfloat16 keys.
    """
    everything = slice(None)
    return Factors((q * scale).to(k.dtype), k, softcap).logits(everything, everything)


def short_products(device: torch.device) -> bool:
    """Return True if `device` is a CPU where oneDNN multiplies bfloat16 matrices fast and sums in float32.

    Returns False for a GPU: float32 is fast enough there, and bfloat16 products may be summed in lower precision.
    """
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    mkldnn = torch.backends.mkldnn
    return device.type == "cpu" and supported is not None and mkldnn.is_available() and mkldnn.enabled and supported()


def rough_dtype(device: torch.device, few: bool) -> torch.dtype:
    """Choose a precision for logits that need not be accurate: bfloat16 for many tokens where it is faster, or float32.

    Such logits guide the search for a high memory floor. The floor itself is computed anew, with bounds on rounding
    errors. `few` is True if there are so few tokens that float32 is fast enough.
    """
    return torch.bfloat16 if not few and short_products(device) else torch.float32
