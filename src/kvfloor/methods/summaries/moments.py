"""Summarise the evicted tokens by the count, means and covariances of their keys and values, without training.

In this file a row is one (batch item, kv head) stream. The mass is the evicted tokens' sum of exp(logit), i.e. their
part of the denominator of attention; the numerator is their sum of exp(logit) v. E, mean and cov are over the evicted
tokens. In shapes, rows are all rows, r those of a call, m queries per row, d and dv the widths of a key and a value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from kvfloor.core.method import Traits
from kvfloor.core.partial import Partial
from kvfloor.core.rowwise import length, product, total
from kvfloor.core.spec import Spec
from kvfloor.core.summary import Summary, SummaryState, equal_lots
from kvfloor.validation import literals

_NODES = 24  # of the quadrature under a softcap; exact for polynomials of degree 47


@dataclass(frozen=True)
class Moments(Summary):
    """Summarise the evicted tokens as a Gaussian of the same count, means and covariances.

    Neither training nor sampling is needed.
    Law, for c evicted tokens, with x = scale q.k of mean mu = scale q.mean(k) and variance s2 = scale^2 q^T cov(k) q:
        mass       c E[e^x]                = c exp(mu + s2/2)
        numerator  c E[v e^x]              = c (mean(v) + scale cov(v, k) q) exp(mu + s2/2)
    These are exact if (k, v) is jointly Gaussian, and otherwise right to second order in the logits. The log-mass is
    limited to log c + scale |q| max|k|, which no keys can exceed. Where the formula exceeds the limit, s2/2 is reduced
    to meet it, and scale cov(v, k) q is reduced by the same factor. Under a softcap the expectations over x are
    computed by Gauss-Hermite quadrature. The mass is always positive.

    covariance  "full":      cov(k) and cov(v, k): 2 + d + dv + d(d+1)/2 + d dv numbers per row
                "diagonal":  the diagonal of cov(k), with cov(v, k) = 0: 2 + 2d + dv numbers. Attention over the evicted
                             tokens is then mean(v) for every query
                "none":      both covariances 0: 2 + d + dv numbers. The mass c exp(mu) is a lower bound of the exact
                             mass
    Averages are kept in float32 (float64 for float64 caches), so that they do not stall in long streams.
    """

    name: ClassVar[str] = "moments"
    paper: ClassVar[str] = "2026, MomentKV (arXiv 2606.01563); no guarantee"
    covariance: Literal["full", "diagonal", "none"] = "full"

    def __post_init__(self) -> None:
        literals(self)

    @property
    def traits(self) -> Traits:
        return Traits(normalised=self.covariance != "full")

    def open(self, spec: Spec) -> MomentsState:
        return MomentsState(self.covariance, spec)


class MomentsState(SummaryState):
    """Hold the count, means and covariances of the evicted keys and values of each row.

    count    (rows,) number of evicted tokens
    mean_k   (rows, d) mean of their keys
    mean_v   (rows, dv) mean of their values
    longest  (rows,) largest |k| of an evicted key
    cov_k    covariance of their keys: (rows, d(d+1)/2), the lower triangle row by row; or (rows, d), the diagonal
    cov_vk   (rows, dv, d) covariance of their values with their keys
    cov_k and cov_vk are None if the argument `covariance` of `Moments` leaves them out.
    """

    def __init__(self, covariance: str, spec: Spec) -> None:
        super().__init__(spec)
        like = {"dtype": spec.compute_dtype, "device": spec.device}
        rows, d, dv = spec.rows, spec.d, spec.dv
        self.count = torch.zeros(rows, dtype=torch.int64, device=spec.device)
        self.mean_k = torch.zeros(rows, d, **like)
        self.mean_v = torch.zeros(rows, dv, **like)
        self.longest = torch.zeros(rows, **like)
        self.cov_k: Tensor | None = None
        self.cov_vk: Tensor | None = None
        if covariance == "full":
            self.cov_k = torch.zeros(rows, d * (d + 1) // 2, **like)
            self.cov_vk = torch.zeros(rows, dv, d, **like)
            self.shared["moments/triangle"] = torch.tril_indices(d, d, device=spec.device)
        elif covariance == "diagonal":
            self.cov_k = torch.zeros(rows, d, **like)

    # ---- taking in -----------------------------------------------------------------------------------------

    def absorb(self, row: Tensor, k: Tensor, v: Tensor, position: Tensor) -> None:
        del position
        for at, keys, values in equal_lots(row, k.to(torch.float64), v.to(torch.float64)):
            self._join(at, keys, values)

    def _join(self, at: Tensor, k: Tensor, v: Tensor) -> None:
        """Update count, means and covariances of rows `at` (r,) by c more evicted tokens each.

        These have keys k (r, c, d) and values v (r, c, dv). Law: the pairwise update of Chan, Golub and LeVeque 1983.
        """
        c, n = k.shape[1], self.count[at].to(torch.float64)
        new = (c / (n + c)).unsqueeze(1)
        mean_k, mean_v = (total(x, 1) / c for x in (k, v))
        step_k, step_v = mean_k - self.mean_k[at], mean_v - self.mean_v[at]
        off_k, off_v = k - mean_k.unsqueeze(1), v - mean_v.unsqueeze(1)
        if self.cov_vk is not None:
            a, b = self.shared["moments/triangle"]
            inside = product(off_k.transpose(1, 2), off_k)[:, a, b] / c
            self._blend("cov_k", at, new, inside, step_k[:, a] * step_k[:, b])
            across = product(off_v.transpose(1, 2), off_k) / c
            self._blend("cov_vk", at, new.unsqueeze(2), across, step_v.unsqueeze(2) * step_k.unsqueeze(1))
        elif self.cov_k is not None:
            self._blend("cov_k", at, new, total(off_k.square(), 1) / c, step_k.square())
        like = self.mean_k.dtype
        self.mean_k[at] = (self.mean_k[at] + new * step_k).to(like)
        self.mean_v[at] = (self.mean_v[at] + new * step_v).to(like)
        self.longest[at] = torch.maximum(self.longest[at], length(k).amax(1).to(like))
        self.count[at] += c

    def _blend(self, name: str, at: Tensor, new: Tensor, inside: Tensor, between: Tensor) -> None:
        """Update the covariance `name` ("cov_k" or "cov_vk") of rows `at` (r,) by newly evicted tokens.

        new      (r, 1) or (r, 1, 1): the new tokens' share of all evicted tokens, the new ones included
        inside   covariance of the new tokens alone, (r, ...) as the attribute is (rows, ...)
        between  of the shape of `inside`: for the covariance of x and y, the product of two differences, mean x of the
                 new tokens minus mean x of the old ones, and the same for y
        """
        old: Tensor = getattr(self, name)
        old[at] = ((1 - new) * old[at] + new * inside + new * (1 - new) * between).to(old.dtype)

    # ---- reading -------------------------------------------------------------------------------------------

    def read(self, q: Tensor) -> Partial:
        x = q.to(self.mean_k.dtype) * self.spec.scale  # (rows, m, d)
        log_count = torch.log(self.count.to(torch.float64)).to(x.dtype).unsqueeze(1)
        centre = torch.matmul(x, self.mean_k.unsqueeze(2)).squeeze(2)
        largest = torch.linalg.vector_norm(x, dim=-1) * self.longest.unsqueeze(1)
        growth, share = self._growth(centre, self._variance(x), largest)
        mean = self.mean_v.unsqueeze(1).expand(-1, q.shape[1], -1)
        if self.cov_vk is not None:
            mean = mean + share.unsqueeze(-1) * torch.matmul(x, self.cov_vk.transpose(1, 2))
        return Partial(mean, log_count + growth)

    def _variance(self, x: Tensor) -> Tensor:
        """Return x^T cov(k) x, (rows, m), for queries times scale, x (rows, m, d); zeros if no covariance is kept."""
        if self.cov_k is None:
            return x.new_zeros(x.shape[:2])
        if self.cov_vk is None:
            return torch.matmul(x.square(), self.cov_k.unsqueeze(2)).squeeze(2)
        rows, _, d = x.shape
        whole = x.new_zeros(rows, d, d)
        a, b = self.shared["moments/triangle"]
        whole[:, a, b] = self.cov_k
        whole[:, b, a] = self.cov_k
        return (torch.matmul(x, whole) * x).sum(-1).clamp_min(0.0)

    def _growth(self, centre: Tensor, variance: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
        """Return log E[e^y], and the factor E[(dy/dx) e^y] / E[e^y] on scale cov(v, k) q: (rows, m) each.

        x is scale q.k of an evicted key k, modelled as normal with mean `centre` and variance `variance`. y is the
        logit: c tanh(x / c) under a softcap c, otherwise x. So E[e^y] is the mean weight of an evicted token.
        centre, variance and largest are (rows, m); `largest` is a bound on |x| for every evicted key. Under a softcap
        |x| is limited to it. Without a softcap, log E[e^y] is centre + variance / 2 and the factor is 1. If this sum
        exceeds `largest`, its second term is reduced to meet it, and the factor is the reduced term divided by variance
        / 2.
        """
        cap = self.spec.softcap
        if cap is None:
            room = (largest - centre).clamp_min(0.0)
            half = 0.5 * variance
            allowed = torch.minimum(half, room)
            return centre + allowed, torch.where(half > 0, allowed / half.clamp_min(1e-30), 1.0)
        nodes, weights = np.polynomial.hermite_e.hermegauss(_NODES)
        node = torch.as_tensor(nodes, dtype=centre.dtype, device=centre.device)
        log_weight = torch.as_tensor(np.log(weights / math.sqrt(2 * math.pi)), dtype=centre.dtype, device=centre.device)
        limit = torch.maximum(largest, centre.abs()).unsqueeze(-1)  # the centre is inside, except for rounding
        x = centre.unsqueeze(-1) + variance.sqrt().unsqueeze(-1) * node
        x = torch.minimum(torch.maximum(x, -limit), limit)
        bent = torch.tanh(x / cap)
        log_part = log_weight + cap * bent
        growth = torch.logsumexp(log_part, -1)
        slope = torch.exp(log_part - growth.unsqueeze(-1)) * (1 - bent.square())
        return growth, slope.sum(-1)
