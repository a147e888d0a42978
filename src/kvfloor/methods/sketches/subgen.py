"""Estimate the softmax denominator from samples of key clusters, the numerator from a value reservoir (SubGen).

In this file a row is one (batch item, kv head) stream. The denominator of softmax attention is the sum of exp(logit)
over all tokens, the numerator the sum of exp(logit) v.
A cluster is a set of keys around one key, its centre. A sample is a randomly drawn key of a cluster, which represents
the cluster's other keys too. A pair is the (key, value) of one token, drawn with probability proportional to |v|^2; the
reservoir holds the drawn pairs. mu is the sum of |v|^2 over all tokens of a row.
A block end comes after every `block`-th token of a row. The last `block` tokens then enter clusters and reservoir.
The keys and values of tokens since the last block end are held as they are. A `Partial` is a result of attention: the
mean of values and the log-mass (log-sum-exp of logits). A `Spec` holds the sizes and constants of a cache, among them d
and dv, the widths of a key and of a value.
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
from kvfloor.core.log_masses import log_masses
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
from kvfloor.validation import count, positives

PAIRS, SAMPLES = "subgen pairs", "subgen samples"  # what the draws are for
_LOG_RATIO_LIMIT = 60.0


@dataclass(frozen=True)
class SubGen(Method):
    """Estimate attention from samples of key clusters and from (key, value) pairs drawn in proportion to |v|^2.

    The clusters give the denominator and the pairs the numerator. This is the streaming algorithm of Zandieh, Han,
    Mirrokni and Karbasi 2024 (arXiv 2402.06082), with its theorem. On a trained model it fails: pairs and samples are
    drawn apart, so that the answer is no mean of values, and no sink or recent token is exact. For models take the
    shorthand `subgen`, which has no theorem.

    Keys are clustered online: a key within `delta` of the nearest centre joins it, any other key becomes a centre.
    Each cluster keeps `t` uniform samples of its keys. The reservoir keeps `s` (key, value) pairs, each of them drawn
    from all tokens with probability proportional to |v|^2. The answer is z / tau, where q.k is a logit (scale
    included), with
        z   = sum over the s pairs of  mu / (s |v|^2) * exp(q.k) * v        (mu: sum of all |v|^2)
        tau = sum over clusters of     n' / t * sum over its samples of exp(q.k)   (n': keys in the cluster)
    delta    cluster radius in key space (l2)
    t, s     number of samples per cluster; number of pairs per row
    centres  largest number of clusters per row; None: as many as the stream needs. Once it is reached, a key joins its
             nearest centre at any distance; if that is more than delta, the error bound (`guarantee`) no longer holds.
    block    at most the last `block - 1` tokens stay unclustered and are read exactly; 1 is the paper's rule.
             With any block, the clusters are those of clustering token by token.
    radius, failure   for `guarantee`: bound on |q| * scale, and failure probability
    budget   memory per row, in units of one token's key and value. If it is given, s and centres follow from it: the
             part that the newest `block` tokens do not need is shared equally between pairs and clusters
    """

    name: ClassVar[str] = "subgen_sketch"
    paper: ClassVar[str] = "Zandieh et al. 2024, SubGen (arXiv 2402.06082)"
    delta: float = 0.5
    t: int = 4
    s: int = 256
    centres: int | None = None
    block: int = 16
    radius: float | None = None
    failure: float = 0.1
    budget: Budget | None = None

    def __post_init__(self) -> None:
        positives("subgen_sketch", delta=self.delta, failure=self.failure)
        count("subgen_sketch", least=1, t=self.t, s=self.s, block=self.block)
        if self.centres is not None:
            count("subgen_sketch", least=1, centres=self.centres)
        if self.radius is not None:
            positives("subgen_sketch", radius=self.radius)
        if self.failure >= 1:
            raise ValueError(f"subgen_sketch: failure must lie in (0, 1), got {self.failure}")
        check_budget("subgen_sketch", self.budget, self.block, self.t)

    @property
    def traits(self) -> Traits:
        capped = self.centres is not None or self.budget is not None
        return Traits(normalised=False, value_linear=False, lossy_values=True, constant_memory=capped)

    def sizes(self) -> tuple[int, int | None]:
        """Return (s, cap): the number of sampled pairs, and the largest number of clusters (None: no limit), per row.

        Both follow from the budget if there is one.
        """
        return (self.s, self.centres) if self.budget is None else shared_out(self.budget, self.block, self.t)

    def open(self, spec: Spec) -> SubGenState:
        return SubGenState(self, spec)

    def capacity(self, n: int, prompt: int | None = None, pinned: int = 0) -> int | None:
        del prompt, pinned
        return min(n, self.block - 1)  # whole tokens; pairs and centres are sketch entries

    def with_budget(self, budget: Budget) -> SubGen:
        return replace(self, budget=budget)

    def guarantee(self, spec: Spec) -> Guarantee | None:
        """Return the bound ||answer - attention||_2 <= epsilon ||softmax||_2 ||V||_op for one query fixed in advance.

        V is the matrix of all values, ||V||_op its operator norm, and softmax the vector of exact attention weights.
        Law (Chebyshev): an epsilon needs s = 9 dv / (epsilon^2 f) pairs for the numerator, and for the denominator
        t = 9 (R-1)^2 / (4 R epsilon^2 f) samples per cluster. R is exp(2 delta radius), with the method's `delta` and
        `radius`. f = failure / 2 is the failure probability of each of the two. An epsilon of 1 or more is vacuous;
        the result then has holds=False. Of `spec`, only the value width dv is used. Returns None if `radius` is None.
        """
        if self.radius is None:
            return None
        epsilon = chebyshev(self.sizes()[0] / spec.dv, self.t, self.delta * self.radius, self.failure)
        return Guarantee(
            epsilon,
            self.failure,
            "l2, relative to ||softmax||_2 ||V||_op",
            "one query fixed before the stream (oblivious)",
            (f"|q| * scale <= {self.radius}", "no key joined a cluster farther than delta", "epsilon < 1"),
            "Zandieh et al. 2024; constants derived by Chebyshev",
            holds=epsilon < 1,
            why="" if epsilon < 1 else f"epsilon = {epsilon:.3g} is vacuous: more t or s is needed",
        )

    def _sized_for(self, epsilon: float, delta: float, spec: Spec) -> SubGen:
        """Return this method with s and t so large that its error is at most epsilon, with failure probability delta.

        s is the number of sampled pairs, t that of sampled keys per cluster. The error is the epsilon in ||answer -
        attention||_2 <= epsilon ||softmax||_2 ||V||_op, for one query fixed in advance. V is the matrix of all values,
        of the width dv in `spec`, and softmax the vector of exact weights. The argument delta
        is not the cluster radius, which stays as it is. The returned method has no budget and no limit on clusters.
        Returns the method unchanged if its `radius` is None, if epsilon is not in (0, 1) or if delta is not positive.
        Raises ValueError where the number of samples overflows.
        """
        if self.radius is None or not (0 < epsilon < 1 and delta > 0):
            return self
        s = subgen_s(spec.dv, epsilon, delta / 2)
        t = subgen_t(self.delta, self.radius, epsilon, delta / 2)
        if not math.isfinite(s + t):
            spread = f"exp({2 * self.delta * self.radius:g})"  # largest weight over least within a cluster
            raise ValueError(f"{self}: exp(2 delta radius) = {spread} takes too many samples")
        return replace(self, s=math.ceil(s), t=max(1, math.ceil(t)), failure=delta, centres=None, budget=None)


class SubGenState(Blocked[SubGen]):
    """Hold key clusters, sampled (key, value) pairs, and the keys and values of the tokens since the last block end."""

    def __init__(self, method: SubGen, spec: Spec) -> None:
        super().__init__(method, spec, Slots(spec, [method.block] * spec.rows), method.block)
        s, cap = method.sizes()
        self.keys = Clusters(spec, method.t, cap)
        self.pairs = Reservoir(spec, s)
        self.longest_query = torch.zeros(spec.rows, dtype=torch.float64, device=spec.device)  # but not of `read`

    def fields(self) -> dict[str, Any]:
        return super().fields() | {"longest_query": Field(torch.float64, (self.spec.rows,), least=0)}

    def require_sound(self, fields: dict[str, Any]) -> None:
        super().require_sound(fields)
        require_sketched(fields, [fields["keys"]], self.block)

    @property
    def clusters(self) -> Tensor:
        """Return the number of cluster centres per row, (rows,)."""
        return self.keys.used

    def guarantee(self) -> Guarantee | None:
        stated = self.method.guarantee(self.spec)
        if stated is None:
            return None
        length = float(self.longest_query.max()) * abs(self.spec.scale)
        if bool(self.keys.overfull.any()):
            return replace(stated, holds=False, why="the cap on centres was reached: a key joined beyond delta")
        if self.method.radius is not None and length > self.method.radius:
            return replace(stated, holds=False, why=f"a query of |q| * scale = {length:.4g} was asked")
        return stated

    def _on_queries(self, q: Tensor, before: Tensor, take: Tensor) -> None:
        self.longest_query = torch.maximum(self.longest_query, longest(q, take))

    def _attend(self, q: Tensor) -> Partial:
        self._on_queries(q, self.slots.held, torch.full_like(self.seen, q.shape[2]))
        return super()._attend(q)

    def _rest(self, q: Tensor) -> Partial | None:
        if not bool((self.keys.count > 0).any()):
            return None
        z = Partial.over(q, self.pairs.k, self.pairs.v, self.spec, self.pairs.log_weight())
        keys, share = self.keys.weighted()
        return ratio(z, log_masses(q, keys, self.spec.scale, self.spec.softcap, share))

    def _close(self, rows: Tensor | None) -> None:
        rows = torch.arange(self.spec.rows) if rows is None else rows
        k, v, position = drain(self.slots, rows, self.block)
        at = rows.to(k.device)
        self.pairs.offer(at, k, v, position, PAIRS)
        self.keys.join(at, k, position, self.method.delta, SAMPLES)


def chebyshev(s: float, t: int, reach: float, failure: float) -> float:
    """Return the error epsilon of SubGen with s sampled pairs and t samples per cluster.

    With probability 1 - failure, ||answer - attention||_2 <= epsilon ||softmax||_2 ||V||_F, where V is the matrix of
    all values and softmax the vector of exact attention weights. `reach` bounds the difference between the logit
    of a key and the logit of its cluster's centre.
    Law (Chebyshev): with R = exp(2 reach) and f = failure / 2, epsilon is the larger of sqrt(9 / (s f)), from the
    numerator, and sqrt(9 (R-1)^2 / (4 R t f)), from the denominator. Each of the two fails with probability f.
    For the bound with the operator norm ||V||_op in place of ||V||_F, pass as s the number of pairs divided by dv.
    """
    half, spread = failure / 2, math.exp(min(700.0, 2 * reach))
    return max(math.sqrt(9 / (s * half)), math.sqrt(9 * (spread - 1) ** 2 / (4 * spread * t * half)))


def ratio(z: Partial, log_tau: Tensor) -> Partial:
    """Divide an estimate of attention's numerator by tau, an estimate of its denominator.

    z        attention over the sampled pairs, weighted so that z.mean * exp(z.log_mass) estimates the numerator
    log_tau  the log of tau, of the shape of z.log_mass
    Returns a `Partial` with the quotient as mean and log_tau as log-mass. The factor exp(z.log_mass) / tau is limited
    to e^60, so that the answer stays finite even where a key joined a cluster from beyond its radius delta.
    """
    share = torch.exp((z.log_mass - log_tau).clamp_max(_LOG_RATIO_LIMIT))
    return Partial(z.mean * torch.where(log_tau == -torch.inf, 0.0, share).unsqueeze(-1), log_tau)
