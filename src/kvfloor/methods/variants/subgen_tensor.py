"""Estimate tensor attention, which is over pairs of tokens, from key clusters and sampled (key, value) pairs (SubGen).

Every token has two keys and two values. The first side is (K1, V1), the first key and value of every token; the second
side is (K2, V2). Tensor attention is over token pairs (j1, j2): the key and value of j1 are taken from the first side,
those of j2 from the second.
A cluster is a set of keys of one side around one key, its centre. A point is what stands for tokens of one side: a
token itself, a sampled key of a cluster, or a sampled (key, value) pair, i.e. key and value of one token, drawn with
probability proportional to |v|^2. A point has a weight, the number of tokens that it stands for. A row is one (batch
item, kv head) stream. A block end comes after every `block`-th token of a row; tokens since then are held with their
own keys and values. A `Partial` is a result of attention: the mean of values and the log-mass (log-sum-exp of logits).
A state is what the method keeps of a stream. A `Spec` holds the sizes and constants of a cache, among them d and dv,
the widths of one key and of one value.
A side becomes two sets of points: sampled keys of its clusters, whose weights sum to the number n of tokens, and its
sampled (key, value) pairs. The denominator of attention is one sum over all pairs of a sampled key of the first side
and one of the second, and the numerator the same with sampled (key, value) pairs. So neither the n^2 token pairs nor
clusters of token pairs are ever stored. After Zandieh et al. 2024, who sketch standard attention; Chen et al. 2025
(arXiv 2503.11108) announce such an algorithm, SubGen4Cache, whose text is not known to us. Constants are derived in
docs/floors.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvfloor.core.blocked import Blocked
from kvfloor.core.budget import Budget
from kvfloor.core.fields import Field
from kvfloor.core.memory import Memory
from kvfloor.core.method import Guarantee, Method, Traits
from kvfloor.core.partial import Partial
from kvfloor.core.slots import Slots
from kvfloor.core.spec import Spec
from kvfloor.floors.sampling import subgen_s, subgen_t
from kvfloor.methods.sketches.clusters import (
    Clusters,
    Reservoir,
    check_budget,
    drain,
    longest,
    require_sketched,
    shared_out,
)
from kvfloor.methods.sketches.subgen import PAIRS, SAMPLES, chebyshev, ratio
from kvfloor.methods.variants.tensor import Points, log_masses_over_pairs, over_pairs
from kvfloor.validation import count, positives

# The first side uses the draws of SubGen; the second needs its own draws, so that the sides are independent.
_PURPOSES = ((PAIRS, SAMPLES), ("subgen second pairs", "subgen second samples"))


@dataclass(frozen=True)
class SubGenTensor(Method):
    """Estimate tensor attention in memory that grows with the number of key clusters.

    The answer is z / tau with

        tau = sum over sampled keys  x of the first side, y of the second, of  n_x n_y / t^2 * exp(score(x, y))
        z   = sum over sampled pairs x of the first side, y of the second, of  w_x w_y * exp(score(x, y)) * (v_x * v_y)

    For a query q, score(x, y) is scale times the sum over l of q_l x_l y_l. In z, x is the key of a sampled (key,
    value) pair and v_x its value. n_x is the number of keys in x's cluster, and w_x = mu1 / (s |v_x|^2) with mu1 the
    sum of |v1|^2 over all tokens. y, v_y, n_y and w_y are the same on the second side.
    delta1, delta2  cluster radius of the first and of the second keys (l2)
    t               sampled keys per cluster, on each side: t^2 pairs of keys represent a pair of clusters
    s               sampled (key, value) pairs per side, drawn in proportion to |v1|^2 or |v2|^2: z has s^2 terms
    centres         largest number of clusters of a side; None: as many as the stream needs. Once it is reached, a key
                    joins its nearest centre at any distance; if that is more than delta1 (or delta2), the error bound
                    no longer holds
    block           at most the last `block - 1` tokens stay unclustered, as points of weight 1
    radius, largest, failure  for `guarantee`: bound on |q| * scale, bound on the size of a key's entries, and failure
                    probability
    budget          memory per row, in units of one token's keys and values. If it is given, s and centres follow from
                    it: what the newest `block` tokens leave is shared equally between sampled pairs and clusters
    A state takes keys (rows, a, 2d) and values (rows, a, 2dv) of `a` new tokens: k1 and k2 of a token concatenated, and
    likewise v1 and v2.
    """

    name: ClassVar[str] = "subgen_tensor"
    paper: ClassVar[str] = "after Zandieh et al. 2024, SubGen (arXiv 2402.06082)"
    delta1: float = 0.5
    delta2: float = 0.5
    t: int = 4
    s: int = 256
    centres: int | None = None
    block: int = 16
    radius: float | None = None
    largest: float = 1.0
    failure: float = 0.1
    budget: Budget | None = None

    def __post_init__(self) -> None:
        own = self.name
        positives(own, delta1=self.delta1, delta2=self.delta2, largest=self.largest, failure=self.failure)
        count(own, least=1, t=self.t, s=self.s, block=self.block)
        if self.centres is not None:
            count(own, least=1, centres=self.centres)
        if self.radius is not None:
            positives(own, radius=self.radius)
        if self.failure >= 1:
            raise ValueError(f"{own}: failure must lie in (0, 1), got {self.failure}")
        check_budget(own, self.budget, self.block, self.t)

    @property
    def traits(self) -> Traits:
        capped = self.centres is not None or self.budget is not None
        return Traits(
            reference="tensor", normalised=False, value_linear=False, lossy_values=True, constant_memory=capped
        )

    def sizes(self) -> tuple[int, int | None]:
        """Return (s, cap) of each side, per row: the number of sampled pairs, and the largest number of clusters.

        cap None: no limit. Both follow from the budget if there is one.
        """
        return (self.s, self.centres) if self.budget is None else shared_out(self.budget, self.block, self.t)

    def open(self, spec: Spec) -> SubGenTensorState:
        return SubGenTensorState(self, spec)

    def capacity(self, n: int, prompt: int | None = None, pinned: int = 0) -> int | None:
        del prompt, pinned
        return min(n, self.block - 1)  # whole tokens; samples are sketch entries

    def with_budget(self, budget: Budget) -> SubGenTensor:
        return replace(self, budget=budget)

    def guarantee(self, spec: Spec) -> Guarantee | None:
        """Return the upper bound epsilon on the error, and its failure probability, for one query fixed in advance.

        ||answer - attention||_2 <= epsilon ||softmax||_2 ||V1||_F ||V2||_F.
        V1 and V2 are the matrices of all first and second values, softmax the vector of exact weights of all token
        pairs. If x and x' are first keys of one cluster, y and y' second keys of one cluster, then score(x, y) and
        score(x', y') differ by at most D = 2 radius largest (delta1 + delta2); let R = exp(D).
        By Chebyshev, an error of epsilon takes s = 9 / (epsilon^2 f) sampled pairs for the numerator, and t =
        9 (R-1)^2 / (4 R epsilon^2 f) sampled keys per cluster for the denominator. f = failure / 2 is the failure
        probability of each of the two. If epsilon is 1 or more, the result has holds=False. `spec` is not used. Returns
        None if `radius` is None.
        """
        del spec
        if self.radius is None:
            return None
        epsilon = chebyshev(self.sizes()[0], self.t, self._reach * self.radius, self.failure)
        return Guarantee(
            epsilon,
            self.failure,
            "l2, relative to ||softmax||_2 ||V1||_F ||V2||_F",
            "one query fixed before the stream (oblivious)",
            (
                f"|q| * scale <= {self.radius}",
                f"entries of keys in [-{self.largest}, {self.largest}]",
                "no key joined a cluster farther than its delta",
                "epsilon < 1",
            ),
            "derived by Chebyshev, docs/floors.md, after Zandieh et al. 2024",
            holds=epsilon < 1,
            why="" if epsilon < 1 else f"epsilon = {epsilon:.3g} is vacuous: more t or s is needed",
        )

    @property
    def _reach(self) -> float:
        """Return an upper bound on the l2 distance of the product k1 * k2 of two keys to the product of their centres.

        Products are entry by entry. k1 is a key in a cluster of the first side, k2 a key in a cluster of the second
        side, and each centre is that of the key's cluster.
        """
        return self.largest * (self.delta1 + self.delta2)

    def _sized_for(self, epsilon: float, delta: float, spec: Spec) -> SubGenTensor:
        """Return this method with s and t so large that its error is at most epsilon, with failure probability delta.

        s is the number of sampled pairs, t that of sampled keys per cluster. The error is the epsilon in
        ||answer - attention||_2 <= epsilon ||softmax||_2 ||V1||_F ||V2||_F, for one query fixed in advance. V1 and V2
        are the matrices of all first and second values, softmax the vector of exact weights of all token pairs. The
        cluster radii delta1 and delta2 stay as they are; `spec` does not change the result. The returned method has no
        budget and no limit on clusters. Returns the method unchanged if `radius` is None, if epsilon is not in (0, 1)
        or if delta is not positive. Raises ValueError where the number of samples overflows.
        """
        if self.radius is None or not (0 < epsilon < 1 and delta > 0):
            return self
        s = subgen_s(spec.dv, epsilon, delta / 2, norm="frobenius")
        t = subgen_t(self._reach, self.radius, epsilon, delta / 2)
        if not math.isfinite(s + t):
            raise ValueError(f"{self}: keys of a cluster differ by e^{2 * self._reach * self.radius:g} in weight")
        return replace(self, s=math.ceil(s), t=max(1, math.ceil(t)), failure=delta, centres=None, budget=None)


class Side(Memory):
    """Hold the memory of one side, (K1, V1) or (K2, V2): key clusters, and sampled (key, value) pairs."""

    def __init__(self, spec: Spec, method: SubGenTensor) -> None:
        s, cap = method.sizes()
        self.spec = spec
        self.keys = Clusters(spec, method.t, cap)
        self.pairs = Reservoir(spec, s)

    def masses(self, waiting: Points) -> Points:
        """Return this side's weighted points for the denominator: the sampled keys, then the `waiting` points.

        `waiting` are the tokens since the last block end, as points; they are in no cluster yet. The values of the
        result have width 0, because the denominator needs none.
        """
        keys, weight = self.keys.weighted(int(self.keys.used.max()))
        return _points(keys, keys[..., :0], weight, replace(waiting, v=waiting.v[..., :0]))

    def values(self, waiting: Points) -> Points:
        """Return this side's weighted points for the numerator: sampled (key, value) pairs, then the `waiting` points.

        `waiting` are the tokens since the last block end, as points; they are in no sample yet.
        """
        return _points(self.pairs.k, self.pairs.v, self.pairs.log_weight(), waiting)


class SubGenTensorState(Blocked[SubGenTensor]):
    """Hold the memory of both sides, and the keys and values of the tokens since the last block end."""

    def __init__(self, method: SubGenTensor, spec: Spec) -> None:
        tokens = replace(spec, d=2 * spec.d, dv=2 * spec.dv)
        super().__init__(method, spec, Slots(tokens, [method.block] * spec.rows), method.block)
        self.first, self.second = Side(spec, method), Side(spec, method)
        wide = {"dtype": torch.float64, "device": spec.device}
        self.longest_query = torch.zeros(spec.rows, **wide)  # largest |q| given with tokens or to `attend`
        self.largest_entry = torch.zeros(spec.rows, **wide)  # of the keys that left the open block

    @property
    def key_width(self) -> int:
        return 2 * self.spec.d

    @property
    def value_width(self) -> int:
        return 2 * self.spec.dv

    def fields(self) -> dict[str, Any]:
        size = Field(torch.float64, (self.spec.rows,), least=0)
        return super().fields() | {"longest_query": size, "largest_entry": size}

    def require_sound(self, fields: dict[str, Any]) -> None:
        super().require_sound(fields)
        require_sketched(fields, [fields[side]["keys"] for side in ("first", "second")], self.block)

    @property
    def clusters(self) -> Tensor:
        """Return the number of cluster centres per row of the first and of the second keys, (rows, 2)."""
        return torch.stack([self.first.keys.used, self.second.keys.used], 1)

    def guarantee(self) -> Guarantee | None:
        stated = self.method.guarantee(self.spec)
        if stated is None or self.method.radius is None:
            return None
        length, entry = float(self.longest_query.max()) * abs(self.spec.scale), float(self._entries().max())
        if bool((self.first.keys.overfull | self.second.keys.overfull).any()):
            return replace(stated, holds=False, why="the cap on centres was reached: a key joined beyond its delta")
        if length > self.method.radius:
            return replace(stated, holds=False, why=f"a query of |q| * scale = {length:.4g} was asked")
        if entry > self.method.largest:
            return replace(stated, holds=False, why=f"a key with an entry of {entry:.4g} came")
        return stated

    def _entries(self) -> Tensor:
        """Return, for each row, the largest absolute entry of all keys given so far: (rows,) float64."""
        view = self.slots.view()
        waiting = view.k.abs() if view.live is None else view.k.abs().masked_fill(~view.live.unsqueeze(-1), 0)
        if waiting.shape[1] == 0:
            return self.largest_entry
        return torch.maximum(self.largest_entry, waiting.amax((1, 2)).to(torch.float64))

    def _on_queries(self, q: Tensor, before: Tensor, take: Tensor) -> None:
        self.longest_query = torch.maximum(self.longest_query, longest(q, take))

    def _attend(self, q: Tensor) -> Partial:
        self._on_queries(q, self.slots.held, torch.full_like(self.seen, q.shape[2]))
        return super()._attend(q)

    # ---- reading -------------------------------------------------------------------------------------------

    def _read(self, q: Tensor) -> Partial:
        return self._pairs(q, self.slots.held)

    def _answer(self, q: Tensor, new_k: Tensor, new_v: Tensor, before: Tensor) -> Partial:
        """Estimate causal tensor attention of the a newest tokens' queries q (rows, g, a, d): a `Partial` (rows, g, a).

        g is the number of query heads per kv head. The query of a token attends to all token pairs (j1, j2) in which
        neither j1 nor j2 is newer than that token. These pairs differ from token to token, so the queries of one token
        are answered at a time. before (rows,) is the number of tokens held in slots before the a newest ones came.
        new_k and new_v are not used: the state holds these tokens already.
        """
        parts = [self._pairs(q[:, :, i], torch.minimum(before + i + 1, self.slots.held)) for i in range(q.shape[2])]
        return Partial(torch.stack([part.mean for part in parts], 2), torch.stack([part.log_mass for part in parts], 2))

    def _pairs(self, q: Tensor, visible: Tensor) -> Partial:
        """Return a `Partial` (rows, m): the estimated tensor attention of q (rows, m, d), the ratio of two sums.

        Both sums are over all pairs of a point of the first side and a point of the second. The points of a side are
        its samples (sampled pairs for the numerator, sampled keys for the denominator) and the first visible[r] of row
        r's tokens since the last block end, which are in no sample yet.
        """
        view = self.slots.view(width=self.block)  # of fixed shape, so that every chunking rounds alike
        hidden = (torch.arange(self.block) >= visible.unsqueeze(1)).to(q.device)
        weight = torch.zeros(hidden.shape, dtype=torch.float64, device=q.device).masked_fill(hidden, -torch.inf)
        (k1, k2), (v1, v2) = view.k.chunk(2, -1), view.v.chunk(2, -1)
        one, two = Points(k1, v1, weight), Points(k2, v2, weight)
        z = over_pairs(q, self.first.values(one), self.second.values(two), self.spec)
        return ratio(z, log_masses_over_pairs(q, self.first.masses(one), self.second.masses(two), self.spec))

    # ---- learning ------------------------------------------------------------------------------------------

    def _close(self, rows: Tensor | None) -> None:
        rows = torch.arange(self.spec.rows) if rows is None else rows
        k, v, position = drain(self.slots, rows, self.block)
        at = rows.to(k.device)
        self.largest_entry[at] = torch.maximum(self.largest_entry[at], k.abs().amax((1, 2)).to(torch.float64))
        deltas = (self.method.delta1, self.method.delta2)
        sides = zip((self.first, self.second), k.chunk(2, -1), v.chunk(2, -1), deltas, _PURPOSES, strict=True)
        for side, key, value, delta, (pairs, samples) in sides:
            side.pairs.offer(at, key, value, position, pairs)
            side.keys.join(at, key, position, delta, samples)


def _points(k: Tensor, v: Tensor, log_weight: Tensor, waiting: Points) -> Points:
    """Return the s points k (rows, s, d), v (rows, s, dv), log_weight (rows, s), and after them the `waiting` points.

    `waiting` are the tokens since the last block end, as points; they are in no sample yet.
    """
    assert waiting.log_weight is not None
    return Points(*(torch.cat(x, 1) for x in ((k, waiting.k), (v, waiting.v), (log_weight, waiting.log_weight))))
