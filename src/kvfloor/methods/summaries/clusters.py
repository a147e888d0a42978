"""Summarise the evicted tokens by clusters: per cluster the mean key, the mean value and the number of tokens.

In this file a row is one (batch item, kv head) stream. A point is a cluster, or a newly evicted token, which counts as
a cluster of one. In shapes, rows are all rows, r those of a call, c newly evicted tokens of a row, n points, m
clusters, d and dv the widths of a key and a value.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvfloor.core.fields import MOST, Field
from kvfloor.core.partial import Partial
from kvfloor.core.rowwise import product, total
from kvfloor.core.spec import Spec
from kvfloor.core.summary import Summary, SummaryState, equal_lots
from kvfloor.validation import count

_AT_ONCE = 64  # evicted tokens that join the clusters together, which bounds the table of distances


@dataclass(frozen=True)
class ClusterMeans(Summary):
    """Summarise the evicted tokens by at most `m` clusters of near keys, each a token of several tokens' weight.

    Law: a cluster of n tokens answers as n tokens with the cluster's mean key and mean value, i.e. as one token whose
    logit is increased by log n. The mass, i.e. the sum of exp(logit), is then at most that of the n tokens, because exp
    is convex (without a softcap). Where all keys of a cluster are equal, the answer is exact. Nothing is proved about
    the error otherwise.
    Methods that merge an evicted token into a kept one, such as CaM (Zhang et al. 2024), change the kept token's answer
    and lose the evicted token's mass. Here the clusters are tokens of their own, beside the kept ones.
    If a row has more than m clusters, some are merged. The cost of merging clusters of a and b tokens with the mean
    keys k and k' is a b / (a + b) |k - k'|^2: the growth of the keys' squared distances to their cluster's mean (Ward
    1963). Evicted tokens first become clusters of one, 64 at a time. Then come rounds of merging: in a round the
    cheapest half of all pairs of clusters that are each other's cheapest partner is merged, until m clusters are left.
    m    clusters per row: 32 unless given. A cluster takes the bytes of a token and 4 more; its means have the cache's
         dtype, so in a cache of 16 bits a cluster of many hundred tokens hardly moves any more
    """

    name: ClassVar[str] = "clusters"
    paper: ClassVar[str] = "Ward 1963 (clusters of evicted keys); compare CaM (Zhang et al. 2024, ICML); no guarantee"
    m: int = 32

    def __post_init__(self) -> None:
        count(self.name, least=1, m=self.m)

    def open(self, spec: Spec) -> ClusterMeansState:
        return ClusterMeansState(self.m, spec)


class ClusterMeansState(SummaryState):
    """Hold the clusters of each row: mean_k (rows, m, d), mean_v (rows, m, dv), count (rows, m) int64, 0 if unused."""

    def __init__(self, m: int, spec: Spec) -> None:
        super().__init__(spec)
        like = {"dtype": spec.dtype, "device": spec.device}
        self.mean_k = torch.zeros(spec.rows, m, spec.d, **like)
        self.mean_v = torch.zeros(spec.rows, m, spec.dv, **like)
        self.count = torch.zeros(spec.rows, m, dtype=torch.int64, device=spec.device)

    def fields(self) -> dict[str, Any]:
        spec, m = self.spec, self.count.shape[1]
        return {
            "mean_k": Field(spec.dtype, (spec.rows, m, spec.d), finite=True),
            "mean_v": Field(spec.dtype, (spec.rows, m, spec.dv), finite=True),
            "count": Field(torch.int64, (spec.rows, m), least=0, most=MOST),
        }

    def absorb(self, row: Tensor, k: Tensor, v: Tensor, position: Tensor) -> None:
        for at, keys, values in in_order(row, k, v, position):
            self._join(at, keys, values)

    def _join(self, at: Tensor, k: Tensor, v: Tensor) -> None:
        """Add tokens of keys k (r, c, d) and values v (r, c, dv) to the clusters of rows `at` (r,)."""
        m = self.count.shape[1]
        size = torch.cat([self.count[at].to(k.dtype), k.new_ones(k.shape[:2])], 1)
        mean_k = torch.cat([self.mean_k[at].to(k.dtype), k], 1)
        mean_v = torch.cat([self.mean_v[at].to(v.dtype), v], 1)
        while int((size > 0).sum(1).max()) > m:
            size, mean_k, mean_v = merged(size, mean_k, mean_v, m)
        order = torch.argsort((size == 0).to(torch.int8), dim=1, stable=True)[:, :m]
        self.count[at] = size.gather(1, order).to(torch.int64)
        order = order.unsqueeze(-1)
        self.mean_k[at] = mean_k.gather(1, order.expand(-1, -1, k.shape[2])).to(self.mean_k.dtype)
        self.mean_v[at] = mean_v.gather(1, order.expand(-1, -1, v.shape[2])).to(self.mean_v.dtype)

    def read(self, q: Tensor) -> Partial:
        log_count = torch.log(self.count.to(self.spec.compute_dtype))  # -inf for an unused cluster
        hide = (self.count == 0).unsqueeze(1)
        return Partial.over(q, self.mean_k, self.mean_v, self.spec, log_count, hide if bool(hide.any()) else None)


def in_order(row: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Split evicted tokens into those that join the clusters together: yield rows (r,), keys and values in float64.

    The arguments are those of `absorb`. The tokens of a row come in the order of their positions, at most 64 at a time.
    """
    for at, keys, values, when in equal_lots(row, k, v, position):
        order = when.argsort(1).unsqueeze(-1)
        keys, values = (x.gather(1, order.expand_as(x)).to(torch.float64) for x in (keys, values))
        for start in range(0, keys.shape[1], _AT_ONCE):
            yield at, keys[:, start : start + _AT_ONCE], values[:, start : start + _AT_ONCE]


def merged(size: Tensor, k: Tensor, v: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Merge the cheapest pairs of points once, in each row with more than `most` points.

    size (r, n) is the number of tokens of each point, 0 for none; k (r, n, d) and v (r, n, dv) are its mean key and
    value. Returns the same, with the merged pairs in the place of their first point and size 0 in that of the second.
    A pair is merged if each is the other's cheapest partner and the pair is among the cheapest half of such pairs.
    """
    n = size.shape[1]
    place = torch.arange(n, device=size.device)
    square = total(k.square())
    far = square.unsqueeze(2) + square.unsqueeze(1) - 2.0 * product(k, k.transpose(1, 2))
    far = torch.maximum(far, far.transpose(1, 2))  # a product may round k.k' and k'.k differently
    weight = size.unsqueeze(2) * size.unsqueeze(1) / (size.unsqueeze(2) + size.unsqueeze(1)).clamp_min(1.0)
    unused = (size == 0).unsqueeze(2) | (size == 0).unsqueeze(1) | torch.eye(n, dtype=torch.bool, device=size.device)
    most_cost = torch.finfo(far.dtype).max  # for keys whose distance overflows: some pair is always to be merged
    cost = (weight * far.clamp_min(0.0)).nan_to_num(most_cost, most_cost).masked_fill(unused, torch.inf)
    least = cost.amin(2)
    partner = torch.where(cost == least.unsqueeze(2), place, n).amin(2).clamp_max(n - 1)  # of equal ones the first
    mutual = (partner.gather(1, partner) == place) & (place < partner) & torch.isfinite(least)
    over = ((size > 0).sum(1) - most).clamp_min(0)
    wanted = torch.minimum((mutual.sum(1) + 1) // 2, over).unsqueeze(1)
    rank = least.masked_fill(~mutual, torch.inf).argsort(dim=1, stable=True).argsort(dim=1, stable=True)
    line, one = ((rank < wanted) & mutual).nonzero(as_tuple=True)
    other = partner[line, one]
    a, b = size[line, one], size[line, other]
    share = (b / (a + b)).unsqueeze(1)
    size, k, v = size.clone(), k.clone(), v.clone()
    for mean in (k, v):
        mean[line, one] = mean[line, one] + share * (mean[line, other] - mean[line, one])
    size[line, one], size[line, other] = a + b, 0.0
    return size, k, v
