"""Logits in a chosen precision, and how far each precision can be from the truth."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from kvfloor.logits import cap_

_EXP_ULPS, _TANH_ULPS = 4.0, 8.0  # more than torch's exp, and c tanh(s / c) with its roundings, err in their last place
_FLOAT32_UNIT = 2.0**-24


@dataclasses.dataclass(frozen=True)
class Factors:
    """The factors of the logits in one precision: q times the scale (m, d), k (n, d), and the cap."""

    q: Tensor
    k: Tensor
    softcap: float | None

    @staticmethod
    def of(q: Tensor, k: Tensor, scale: float, softcap: float | None, dtype: torch.dtype) -> Factors:
        """Factors rounded to `dtype` once."""
        return Factors((q.double() * scale).to(dtype), k.to(dtype), softcap)

    def logits(self, queries: slice | Tensor, tokens: slice | Tensor) -> Tensor:
        """Logits (q, t) of some queries on some tokens, capped to softcap * tanh(logit / softcap) where there is a cap.

        bfloat16 factors give float32.
        """
        products = self.q[queries] @ self.k[tokens].T
        products = products.float() if products.dtype == torch.bfloat16 else products
        return cap_(products, self.softcap)

    @property
    def sum_unit(self) -> float:
        """Unit of rounding of sums, and of what is computed from the logits."""
        return _FLOAT32_UNIT if self.q.dtype == torch.bfloat16 else torch.finfo(self.q.dtype).eps / 2.0


@dataclasses.dataclass(frozen=True)
class Rounding:
    """What the factors' precision costs, per query (m,), float64.

    error  by how much a logit may be off, whatever the key
    reach  no logit is larger in size
    """

    error: Tensor
    reach: Tensor

    @staticmethod
    def of(factors: Factors, q: Tensor, k: Tensor, scale: float) -> Rounding:
        """The rounding of `factors`, made from these q, k and scale.

        With u the unit of the sums (float32's for bfloat16), primes for the factors and |.| l2 norms, the error is
            |q - q'| |k| + |q'| |k - k'|      the factors' own rounding, measured
            + (d + 2) u |q'| |k'|             the sum, in any order (Cauchy-Schwarz)
            + unit(dtype) |q'| |k'|           the rounding of the result
            + 8 u softcap                     the cap, whose slope is at most 1
        """
        short_q, short_k = factors.q.double(), factors.k.double()
        lost_q, lost_k = (q.double() * scale - short_q).norm(dim=1), (k.double() - short_k).norm(dim=1).max()
        size_q, size_k = short_q.norm(dim=1), short_k.norm(dim=1).max() + lost_k
        unit = torch.finfo(factors.q.dtype).eps / 2.0
        error = lost_q * size_k + size_q * lost_k + ((k.shape[1] + 2) * factors.sum_unit + unit) * size_q * size_k
        reach = (size_q + lost_q) * size_k
        if factors.softcap is not None:
            error, reach = error + _TANH_ULPS * factors.sum_unit * factors.softcap, reach.clamp_max(factors.softcap)
        return Rounding(error * 1.001, reach * 1.001)

    def of_sums(self, unit: float, terms: int) -> Tensor:
        """Log of the factor by which a sum of `terms` exponentials of logits, in a precision of `unit`, may be off."""
        return self.error + unit * (_EXP_ULPS + 2.0 * self.reach + terms) * 1.01


def logits(q: Tensor, k: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Logits (m, n) of q (m, d) on k (n, d) in the precision of k; float32 for bfloat16 keys."""
    everything = slice(None)
    return Factors((q * scale).to(k.dtype), k, softcap).logits(everything, everything)


def short_products(device: torch.device) -> bool:
    """Whether bfloat16 products are fast here and summed in float32: on a CPU where oneDNN has them.

    On a GPU float32 is fast enough, and bfloat16 sums may be shortened.
    """
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    mkldnn = torch.backends.mkldnn
    return device.type == "cpu" and supported is not None and mkldnn.is_available() and mkldnn.enabled and supported()


def rough_dtype(device: torch.device, few: bool) -> torch.dtype:
    """A precision for searching: float32 for few tokens, bfloat16 for many where that is faster."""
    return torch.bfloat16 if not few and short_products(device) else torch.float32
