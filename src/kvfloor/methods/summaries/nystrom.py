"""Summarise the evicted tokens by clusters whose values and masses are projected (Nystrom), not summed.

In this file a row is one (batch item, kv head) stream. A point is a cluster, or a newly evicted token. A point with key
k, weighted value u and mass w adds exp(q.k) u to the numerator of attention and exp(q.k) w to its denominator. In
shapes, r are the rows of a call, c newly evicted tokens of a row, n points, m clusters, d and dv the widths of a key
and a value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvfloor.core.fields import MOST, Field
from kvfloor.core.method import Traits
from kvfloor.core.partial import Partial
from kvfloor.core.rowwise import aligned, total
from kvfloor.core.spec import Spec
from kvfloor.core.summary import Summary, SummaryState
from kvfloor.logits import capped
from kvfloor.methods.summaries.clusters import in_order, merged
from kvfloor.validation import count, positives

_RIDGE = 1e-3  # added to the diagonal (ones) of the matrix that is solved
_LARGEST_EXPONENT = 350.0
_LEFT = 1 / 16  # least mass, as a share of the sum of the masses' sizes, that is trusted


@dataclass(frozen=True)
class Nystrom(Summary):
    """Summarise the evicted tokens by at most `m` clusters of near keys, whose weights are solved for, not counted.

    Law: the mean keys c_1 .. c_m of the clusters are those of `clusters`. Let K(k, k') be the kernel exp(sharpness
    |scale| k.k') of keys less the mean of all evicted keys, and W = K(c, c)^-1 K(c, k), an m x n matrix over n points
    of keys k. Then cluster i has the mass sum_j W_ij w_j and the weighted value sum_j W_ij u_j, with w_j and u_j those
    of the points. Of all combinations of the functions K(c_i, .), sum_i W_ij K(c_i, .) is the one nearest to K(k_j, .)
    in the norm of K: a token's weight is spread over all clusters where `clusters` gives it to one. Whenever clusters
    merge, the points are projected again, on the new mean keys. 1e-3 is added to the diagonal of the matrix that is
    solved, after it is scaled to ones there. Where the solution is not finite, weights are counted as in `clusters`.
    Masses may be negative, so answers are not always convex combinations of values. A query at which negative masses
    cancel the positive ones, to less than a sixteenth of the sum of their sizes, is answered without the evicted
    tokens. Nothing is proved about the error.
    In WildCat (arXiv 2602.10056) c_i are tokens chosen by randomly pivoted Cholesky, once, and sharpness is 1 / tau^2.

    m          clusters per row: 32 unless given. A cluster takes the bytes of a token and 8 more
    sharpness  factor in the kernel, by which keys are compared; 1/2 unless given, which errs least on real keys
    """

    name: ClassVar[str] = "nystrom"
    paper: ClassVar[str] = "WildCat's weights (arXiv 2602.10056) on clusters of evicted keys (Ward 1963); no guarantee"
    m: int = 32
    sharpness: float = 0.5

    def __post_init__(self) -> None:
        count(self.name, least=1, m=self.m)
        positives(self.name, sharpness=self.sharpness)

    @property
    def traits(self) -> Traits:
        return Traits(normalised=False)

    def open(self, spec: Spec) -> NystromState:
        return NystromState(self, spec)


class NystromState(SummaryState):
    """Hold the clusters of each row; a cluster that is not used has count 0.

    mean_k (rows, m, d) mean key; value (rows, m, dv) and share (rows, m) float32, the weighted value and the mass, each
    divided by the count; count (rows, m) int64, the number of tokens, which decides which clusters merge.
    """

    def __init__(self, summary: Nystrom, spec: Spec) -> None:
        super().__init__(spec)
        m, like = summary.m, {"dtype": spec.dtype, "device": spec.device}
        self.mean_k = torch.zeros(spec.rows, m, spec.d, **like)
        self.value = torch.zeros(spec.rows, m, spec.dv, **like)
        self.share = torch.zeros(spec.rows, m, dtype=torch.float32, device=spec.device)
        self.count = torch.zeros(spec.rows, m, dtype=torch.int64, device=spec.device)
        self.sharpness = summary.sharpness

    def fields(self) -> dict[str, Any]:
        spec, m = self.spec, self.count.shape[1]
        return {
            "mean_k": Field(spec.dtype, (spec.rows, m, spec.d), finite=True),
            "value": Field(spec.dtype, (spec.rows, m, spec.dv), finite=True),
            "share": Field(torch.float32, (spec.rows, m), finite=True),
            "count": Field(torch.int64, (spec.rows, m), least=0, most=MOST),
        }

    def absorb(self, row: Tensor, k: Tensor, v: Tensor, position: Tensor) -> None:
        for at, keys, values in in_order(row, k, v, position):
            self._join(at, keys, values)

    def _join(self, at: Tensor, k: Tensor, v: Tensor) -> None:
        """Add tokens of keys k (r, c, d) and values v (r, c, dv) to the clusters of rows `at` (r,)."""
        wide, m = k.dtype, self.count.shape[1]
        one = k.new_ones(k.shape[:2])
        old = torch.cat([self.value[at].to(wide), self.share[at].to(wide).unsqueeze(-1)], 2)
        size = before = torch.cat([self.count[at].to(wide), one], 1)
        key = before_key = torch.cat([self.mean_k[at].to(wide), k], 1)
        each = before_each = torch.cat([old, torch.cat([v, one.unsqueeze(-1)], 2)], 1)
        while int((size > 0).sum(1).max()) > m:
            size, key, each = merged(size, key, each, m)
        order = torch.argsort((size == 0).to(torch.int8), dim=1, stable=True)[:, :m]
        size = size.gather(1, order)
        key, each = (x.gather(1, order.unsqueeze(-1).expand(-1, -1, x.shape[-1])) for x in (key, each))
        key = key.to(self.mean_k.dtype).to(wide)  # as it is stored
        for i in ((before > 0).sum(1) > m).nonzero().flatten().tolist():
            used, points = int((size[i] > 0).sum()), (before[i] > 0).nonzero().flatten()
            n, k_old, old = (x[i : i + 1].index_select(1, points) for x in (before, before_key, before_each))
            sums = projected(n, k_old, old, aligned(key[i : i + 1, :used]), self.sharpness * abs(self.spec.scale))
            solved = sums[0] / size[i, :used].unsqueeze(-1)
            if bool((solved.abs() <= self._largest).all()):  # not so for nan
                each[i, :used] = solved
        self.count[at] = size.to(torch.int64)
        self.mean_k[at] = key.to(self.mean_k.dtype)
        self.value[at] = each[..., :-1].to(self.value.dtype)
        self.share[at] = each[..., -1].to(torch.float32)

    @property
    def _largest(self) -> float:
        return min(torch.finfo(field.dtype).max for field in (self.value, self.share))

    def read(self, q: Tensor) -> Partial:
        spec = self.spec
        wide = spec.compute_dtype
        key, count = self.mean_k.to(wide), self.count.to(wide)
        x = capped(spec.scale * torch.matmul(q.to(wide), key.transpose(1, 2)), spec.softcap)
        x = x.masked_fill((self.count == 0).unsqueeze(1), -torch.inf)
        top = x.amax(-1, keepdim=True)
        weight = torch.exp(x - torch.where(torch.isfinite(top), top, 0.0))
        numbers = count.unsqueeze(-1) * torch.cat([self.value.to(wide), self.share.to(wide).unsqueeze(-1)], -1)
        sums = torch.matmul(weight, numbers)
        size = torch.matmul(weight, numbers[..., -1:].abs())
        mass = torch.where(sums[..., -1:] >= _LEFT * size, sums[..., -1:], 0.0)
        mean = torch.where(mass > 0, sums[..., :-1] / mass, 0.0)
        return Partial(mean, torch.log(mass).squeeze(-1) + top.squeeze(-1))


def projected(size: Tensor, key: Tensor, each: Tensor, centre: Tensor, scale: float) -> Tensor:
    """Return W (size each), (1, m, w): sums over points, projected on the functions exp(scale centre_i . x).

    size (1, n) numbers of tokens, key (1, n, d) and each (1, n, w) what a point holds per token; centre (1, m, d).
    scale is the factor in the kernel, positive. Entries are nan where the linear equations have no solution.
    """
    middle = (total(size.unsqueeze(-1) * key, 1) / total(size, 1)).unsqueeze(1)
    a, b = (scale**0.5 * (x - middle) for x in (key, centre))
    long_a, long_b = 0.5 * total(a.square()), 0.5 * total(b.square())
    inner = _unit_kernel(b, b, long_b, long_b)
    inner = inner + _RIDGE * torch.eye(inner.shape[1], dtype=inner.dtype, device=inner.device)
    across = _unit_kernel(b, a, long_b, long_a)
    factor, failed = torch.linalg.cholesky_ex(inner)
    lift = (long_a.unsqueeze(1) - long_b.unsqueeze(2)).clamp(-_LARGEST_EXPONENT, _LARGEST_EXPONENT)
    weight = torch.cholesky_solve(across, factor) * torch.exp(lift)
    found = torch.matmul(weight, size.unsqueeze(-1) * each)
    return found.masked_fill(failed.view(-1, 1, 1) != 0, torch.nan)


def _unit_kernel(x: Tensor, y: Tensor, long_x: Tensor, long_y: Tensor) -> Tensor:
    """Return exp(x.y - |x|^2 / 2 - |y|^2 / 2), (1, n, m), for long_x = |x|^2 / 2 and long_y = |y|^2 / 2."""
    exponent = torch.matmul(x, y.transpose(1, 2)) - long_x.unsqueeze(2) - long_y.unsqueeze(1)
    return torch.exp(exponent.clamp_max(0.0))
