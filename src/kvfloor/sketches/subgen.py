"""SubGen: the softmax denominator from samples of online clusters, the numerator from a value reservoir."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from kvfloor.blocked import Blocked
from kvfloor.budget import Budget, tokens
from kvfloor.kernels.attend import attend
from kvfloor.method import Guarantee, Method, Spec, Traits, count, positive
from kvfloor.partial import Partial
from kvfloor.randomness import exponential, row_keys, uniform
from kvfloor.slots import Slots

_FIRST_CENTRES = 16
_LOG_RATIO_LIMIT = 60.0


@dataclass(frozen=True)
class SubGen(Method):
    """Zandieh, Han, Mirrokni and Karbasi 2024 (arXiv 2402.06082), the streaming algorithm.

    Keys are clustered online: a key within `delta` of the nearest centre joins it, another becomes a centre.
    Each cluster keeps `t` uniform samples of its keys; `s` (key, value) pairs are kept with probability
    proportional to |v|^2. The answer is z / tau with
        z   = sum over the s pairs of  mu / (s |v|^2) * exp(q.k) * v        (mu: sum of all |v|^2)
        tau = sum over clusters of     n' / t * sum over its samples of exp(q.k)
    delta    cluster radius in key space (l2)
    centres  cap on the clusters; past it a key joins its nearest centre whatever the distance, and the guarantee
             is withdrawn. None: as many as the stream needs.
    block    the last `block - 1` tokens at most wait unclustered and are read exactly; 1 is the paper's rule.
             The clustering is the sequential one for every block.
    radius   bound on |q| * scale, and failure: probability, for `guarantee`.
    budget   tokens per row instead of s and centres: half of it for the pairs, half for the clusters.
    """

    name: ClassVar[str] = "subgen"
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
        positive("subgen", delta=self.delta, failure=self.failure)
        count("subgen", least=1, t=self.t, s=self.s, block=self.block)
        if self.centres is not None:
            count("subgen", least=1, centres=self.centres)
        if self.radius is not None:
            positive("subgen", radius=self.radius)
        if self.failure >= 1:
            raise ValueError(f"subgen: failure must lie in (0, 1), got {self.failure}")
        if isinstance(self.budget, tuple):
            raise ValueError("subgen takes one budget for all rows, not one per row")
        if self.budget is not None and not isinstance(self.budget, str):
            count("subgen", least=1, budget=self.budget)
            least = self.block + 2 + self.t
            if self.budget < least:
                raise ValueError(
                    f"a budget of {self.budget} tokens is too small for subgen: it needs at least {least}, which is "
                    "block + 2 + t"
                )

    @property
    def traits(self) -> Traits:
        capped = self.centres is not None or self.budget is not None
        return Traits(normalised=False, value_linear=False, lossy_values=True, constant_memory=capped)

    def sizes(self) -> tuple[int, int | None]:
        """(value pairs s, cap on centres), after the budget is shared out: a pair is a token, a centre with its
        t sampled keys is (1 + t) / 2 of one."""
        if self.budget is None:
            return self.s, self.centres
        free = tokens(self.budget, 1)[0] - self.block
        s = max(1, free // 2)
        return s, max(1, 2 * (free - s) // (1 + self.t))

    def open(self, spec: Spec) -> SubGenState:
        return SubGenState(self, spec)

    def capacity(self, n: int, prompt: int | None = None, pinned: int = 0) -> int | None:
        del prompt, pinned
        return min(n, self.block - 1)  # whole tokens; pairs and centres are sketch entries

    def with_budget(self, budget: Budget) -> SubGen:
        return replace(self, budget=budget)

    def guarantee(self, spec: Spec) -> Guarantee | None:
        """||answer - attention||_2 <= epsilon ||softmax||_2 ||V||_op for one query fixed in advance.

        Constants by Chebyshev (each half of `failure`): s = 9 dv / (eps^2 f), t = 9 (R-1)^2 / (4 R eps^2 f) with
        R = exp(2 delta radius). An epsilon of 1 or more says nothing.
        """
        if self.radius is None:
            return None
        s, _ = self.sizes()
        half, ratio = self.failure / 2, math.exp(min(700.0, 2 * self.delta * self.radius))
        numerator = math.sqrt(9 * spec.dv / (s * half))
        denominator = math.sqrt(9 * (ratio - 1) ** 2 / (4 * ratio * self.t * half))
        epsilon = max(numerator, denominator)
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


class SubGenState(Blocked):
    """Per row: x centres (c, d), their counts (c,), t sampled keys each (c, t, d); s value pairs; mu.

    Every reservoir slot keeps the item of smallest counter-based key, so samples do not depend on chunking.
    """

    def __init__(self, method: SubGen, spec: Spec) -> None:
        super().__init__(method, spec, Slots(spec, [method.block] * spec.rows), method.block)
        s, cap = method.sizes()
        rows, self.cap = spec.rows, cap
        first = _FIRST_CENTRES if cap is None else cap
        like = {"dtype": spec.dtype, "device": spec.device}
        wide = {"dtype": torch.float64, "device": spec.device}
        self.centre = torch.zeros(rows, first, spec.d, **like)
        self.count = torch.zeros(rows, first, dtype=torch.int64, device=spec.device)
        self.sample = torch.zeros(rows, first, method.t, spec.d, **like)
        self.sample_key = torch.full((rows, first, method.t), torch.inf, **wide)
        self.pair_k = torch.zeros(rows, s, spec.d, **like)
        self.pair_v = torch.zeros(rows, s, spec.dv, **like)
        self.pair_key = torch.full((rows, s), torch.inf, **wide)
        self.mu = torch.zeros(rows, **wide)
        self.longest_query = torch.zeros(rows, **wide)  # |q| of the queries that came with tokens
        self.overfull = torch.zeros(rows, dtype=torch.bool, device=spec.device)

    @property
    def _plan(self) -> SubGen:
        assert isinstance(self.method, SubGen)
        return self.method

    @property
    def clusters(self) -> Tensor:
        """Number of centres per row (rows,)."""
        return (self.count > 0).sum(1)

    def guarantee(self) -> Guarantee | None:
        stated = self._plan.guarantee(self.spec)
        if stated is None:
            return None
        longest = float(self.longest_query.max()) * abs(self.spec.scale)
        if bool(self.overfull.any()):
            return replace(stated, holds=False, why="the cap on centres was reached: a key joined beyond delta")
        if self._plan.radius is not None and longest > self._plan.radius:
            return replace(stated, holds=False, why=f"a query of |q| * scale = {longest:.4g} was asked")
        return stated

    def _notice(self, q: Tensor, before: Tensor, take: Tensor) -> None:
        real = torch.arange(q.shape[2]) < take.unsqueeze(1)
        norms = q.to(torch.float64).norm(dim=-1).masked_fill(~real.unsqueeze(1).to(q.device), 0.0)
        self.longest_query = torch.maximum(self.longest_query, norms.amax((1, 2)))

    def _attend(self, q: Tensor) -> Partial:
        self._notice(q, self.slots.held, torch.full_like(self.seen, q.shape[2]))
        return super()._attend(q)

    # ---- reading -------------------------------------------------------------------------------------------

    def _rest(self, q: Tensor) -> Partial | None:
        if not bool((self.count > 0).any()):
            return None
        spec, wide = self.spec, self.spec.compute_dtype
        norm = self.pair_v.to(torch.float64).square().sum(-1)
        weight = torch.where(norm > 0, torch.log(self.mu.unsqueeze(1) / (norm * norm.shape[1])), -torch.inf)
        weight = weight.masked_fill(torch.isinf(self.pair_key), -torch.inf).to(wide)
        hidden = torch.isinf(weight).unsqueeze(1)
        mean, log_z = attend(
            q,
            self.pair_k,
            self.pair_v,
            spec.scale,
            spec.softcap,
            weight.masked_fill(hidden[:, 0], 0.0),
            hidden,
        )
        rows, c, t, d = self.sample.shape
        share = torch.log(self.count.to(torch.float64) / t).unsqueeze(2).expand(-1, -1, t).reshape(rows, c * t)
        unused = torch.isinf(share).unsqueeze(1)
        keys = self.sample.reshape(rows, c * t, d)
        nothing = keys.new_zeros(rows, c * t, 1)
        _, log_tau = attend(
            q, keys, nothing, spec.scale, spec.softcap, share.masked_fill(unused[:, 0], 0.0).to(wide), unused
        )
        # Past the cap on centres the two estimates may differ without bound; the answer stays finite.
        ratio = torch.where(log_tau == -torch.inf, 0.0, torch.exp((log_z - log_tau).clamp_max(_LOG_RATIO_LIMIT)))
        return Partial(mean * ratio.unsqueeze(-1), log_tau)

    # ---- learning ------------------------------------------------------------------------------------------

    def _close(self, rows: Tensor | None) -> None:
        rows = torch.arange(self.spec.rows) if rows is None else rows
        view = self.slots.view(rows, self.block)
        order = view.position.argsort(1)
        k = view.k.gather(1, order.unsqueeze(-1).expand_as(view.k))
        v = view.v.gather(1, order.unsqueeze(-1).expand_as(view.v))
        position = view.position.gather(1, order)
        at = rows.to(k.device)
        self._sample_values(at, k, v, position)
        self._cluster(at, k, position)
        width = int(self.slots.held.max())
        leaving = torch.zeros(self.spec.rows, width, dtype=torch.bool)
        leaving[rows] = True
        self.slots.evict(leaving & (torch.arange(width) < self.slots.held.unsqueeze(1)))

    def _sample_values(self, rows: Tensor, k: Tensor, v: Tensor, position: Tensor) -> None:
        """Slot i keeps the token with the smallest Exp(1)/|v|^2: token j wins with probability |v_j|^2 / mu."""
        norm = v.to(torch.float64).square().sum(-1)  # (r, b)
        s = self.pair_key.shape[1]
        lane = row_keys(self.spec.seed, self.spec.ids(), "subgen pairs")[rows].view(-1, 1, 1)
        counter = position.unsqueeze(2) * s + torch.arange(s, device=k.device)
        key = exponential(lane, counter) / norm.unsqueeze(2).clamp_min(1e-300)
        key = torch.where(norm.unsqueeze(2) > 0, key, torch.inf)
        best, token = key.min(1)  # (r, s)
        new_k = k.gather(1, token.unsqueeze(-1).expand(-1, -1, k.shape[-1]))
        new_v = v.gather(1, token.unsqueeze(-1).expand(-1, -1, v.shape[-1]))
        better = best < self.pair_key[rows]
        self.pair_k[rows] = torch.where(better.unsqueeze(-1), new_k, self.pair_k[rows])
        self.pair_v[rows] = torch.where(better.unsqueeze(-1), new_v, self.pair_v[rows])
        self.pair_key[rows] = torch.minimum(best, self.pair_key[rows])
        self.mu[rows] += norm.sum(1)

    def _cluster(self, rows: Tensor, k: Tensor, position: Tensor) -> None:
        """The sequential greedy rule over the block's tokens in order, for all rows at once.

        Distances go through one product of the block against the old centres and itself; the loop below runs
        over the block's tokens, with rows side by side.
        """
        b = k.shape[1]
        used = (self.count[rows] > 0).sum(1)
        self._grow(int(used.max()) + b)
        wide = k.to(torch.float32 if k.dtype != torch.float64 else torch.float64)
        centre, count = self.centre[rows], self.count[rows]
        c, cap = centre.shape[1], self.cap or centre.shape[1]
        everything = torch.cat([centre.to(wide.dtype), wide], 1)  # old centres, then the block's own tokens
        far = torch.cdist(wide, everything, compute_mode="donot_use_mm_for_euclid_dist")
        # Slot of the centre that column j of `far` stands for, and whether it is one.
        slot_of = torch.cat([torch.arange(c).expand(len(rows), c), torch.zeros(len(rows), b, dtype=torch.int64)], 1)
        slot_of = slot_of.to(k.device)
        is_centre = torch.cat([count > 0, torch.zeros(len(rows), b, dtype=torch.bool, device=k.device)], 1)
        joined = torch.zeros(len(rows), b, dtype=torch.int64, device=k.device)
        line = torch.arange(len(rows), device=k.device)
        for j in range(b):
            distance, nearest = far[:, j].masked_fill(~is_centre, torch.inf).min(1)
            opens = (distance > self._plan.delta) & (used < cap)
            self.overfull[rows] |= (distance > self._plan.delta) & ~opens
            joined[:, j] = torch.where(opens, used, slot_of[line, nearest])
            slot_of[:, c + j] = joined[:, j]
            is_centre[:, c + j] = opens
            fresh = line[opens]
            centre[fresh, used[fresh]] = k[fresh, j]
            used = used + opens.to(used.dtype)
        self.centre[rows] = centre
        self.count[rows] = count.scatter_add(1, joined, torch.ones_like(joined))
        self._sample_keys(rows, k, position, joined)

    def _sample_keys(self, rows: Tensor, k: Tensor, position: Tensor, joined: Tensor) -> None:
        """Slot i of a cluster keeps the member of smallest uniform key: t uniform samples with replacement."""
        t = self.sample.shape[2]
        lane = row_keys(self.spec.seed, self.spec.ids(), "subgen samples")[rows].view(-1, 1, 1)
        key = uniform(lane, position.unsqueeze(2) * t + torch.arange(t, device=k.device))  # (r, b, t)
        where = joined.unsqueeze(2).expand(-1, -1, t)
        old = self.sample_key[rows]
        new = old.scatter_reduce(1, where, key, "amin")
        won = (key == new.gather(1, where)) & (key < old.gather(1, where))
        r, j, i = won.nonzero(as_tuple=True)
        self.sample[rows[r], joined[r, j], i] = k[r, j]
        self.sample_key[rows] = new

    def _grow(self, needed: int) -> None:
        have = self.centre.shape[1]
        if needed <= have or self.cap is not None:
            return
        extra = max(needed, 2 * have) - have
        for name, fill in (("centre", 0), ("count", 0), ("sample", 0), ("sample_key", torch.inf)):
            old: Tensor = getattr(self, name)
            new = old.new_full((old.shape[0], extra, *old.shape[2:]), fill)
            self.move(name, torch.cat([old, new], 1))
