"""Replace many tokens by a few weighted ones whose attention mass and outputs on reference queries are nearly equal.

A reference query stands for the queries to come. The mass of a query on some tokens is the sum of exp(logit) over them;
its share on one token is the token's softmax weight among them. In shapes, s tokens are given and t kept, m are
reference queries, d and dv the widths of a key and a value. The leading axis of all tensors has size 1: rows are worked
on one by one, so that a row's result depends on its own numbers alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kvfloor.core.rowwise import aligned
from kvfloor.core.spec import Spec
from kvfloor.logits import cap_
from kvfloor.methods.compaction.solvers import lift, nearest, nonnegative

TILE_TOKENS = 256  # bounds the softmax weights that exist at once: reference queries x this many tokens
WEIGHT_RIDGE = 0.03
VALUE_RIDGE = 0.01
LEAST_WEIGHT = 1e-4  # a kept token of weight zero would have log-weight -inf


@dataclass(frozen=True)
class Kept:
    """Hold what replaces a span: index (t,) of the kept tokens in it, ascending; log_weight (t,) and value (t, dv)."""

    index: Tensor
    log_weight: Tensor
    value: Tensor


def match(k: Tensor, v: Tensor, log_weight: Tensor, q: Tensor, t: int, spec: Spec) -> Kept:
    """Choose t of the tokens k (1, s, d), v (1, s, dv), and their new log-weights and values; 0 < t < s.

    log_weight  (1, s) the tokens' log-weights so far
    q           (1, m, d) the reference queries
    spec        its scale and softcap make the logits
    Law (Attention Matching, arXiv 2602.16284): with P (m, s) the shares of the reference queries,
        keys    the t tokens of largest root mean square in P's columns
        weight  min over w >= 0 of |P w - 1|^2 + r |w - 1|^2: the kept tokens have each query's whole mass
        value   min over V of |X V - P v|^2 + r |V - v|^2: the outputs are those of all tokens. X are the softmax
                weights of the kept tokens with their new log-weights
    The ridge terms r draw weights to 1 and values to the tokens' own, as there may be fewer queries than unknowns.
    """
    law, wide = _Logits(aligned(q).to(spec.compute_dtype), spec), torch.float64
    log_mass = q.new_full(q.shape[:2], -torch.inf, dtype=spec.compute_dtype)
    for _, raw in law.by_tile(k, log_weight):
        log_mass = torch.logaddexp(log_mass, raw.logsumexp(-1))
    score = log_mass.new_empty(log_weight.shape)
    output = q.new_zeros(*q.shape[:2], v.shape[2], dtype=wide)
    for at, raw in law.by_tile(k, log_weight):
        share = raw.sub_(log_mass.unsqueeze(-1)).exp_()
        output += share @ aligned(v[:, at]).to(share.dtype)
        score[:, at] = share.square_().sum(1)
    index = score[0].sort(descending=True, stable=True).indices[:t].sort().values
    share = law.over(k[:, index], log_weight[:, index]).sub_(log_mass.unsqueeze(-1)).exp_().to(wide)
    weight = _weights(share)
    among = share.mul_(weight.unsqueeze(1))
    among /= among.sum(-1, keepdim=True)
    value = nearest(among, output, v[:, index].to(wide), VALUE_RIDGE)
    return Kept(index, (log_weight[:, index] + weight.log())[0], value[0])


def _weights(share: Tensor) -> Tensor:
    """Return weights (1, t) under which the columns of `share` (1, m, t), float64, sum to about 1 in every row."""
    gram, moment = share.mT @ share, share.sum(1)
    return nonnegative(gram, moment + lift(gram, WEIGHT_RIDGE).unsqueeze(1)).clamp_min(LEAST_WEIGHT)


class _Logits:
    """Compute the logits of some queries q (1, m, d) on tokens, in the queries' dtype."""

    def __init__(self, q: Tensor, spec: Spec) -> None:
        self._q, self._softcap = q * spec.scale, spec.softcap

    def over(self, k: Tensor, log_weight: Tensor) -> Tensor:
        """Return the logits (1, m, c) on tokens of keys k (1, c, d) and log-weights (1, c)."""
        raw = cap_(self._q @ aligned(k).to(self._q.dtype).mT, self._softcap)
        return raw.add_(log_weight.unsqueeze(1))

    def by_tile(self, k: Tensor, log_weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield (tokens, logits (1, m, c)) for one slice of c <= TILE_TOKENS tokens after another."""
        for start in range(0, k.shape[1], TILE_TOKENS):
            at = slice(start, min(start + TILE_TOKENS, k.shape[1]))
            yield at, self.over(k[:, at], log_weight[:, at])
