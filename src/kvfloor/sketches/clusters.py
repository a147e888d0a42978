"""What SubGen keeps: online clusters of keys with uniform samples, and pairs drawn by the size of their value."""

from __future__ import annotations

import torch
from torch import Tensor

from kvfloor.budget import Budget, tokens
from kvfloor.memory import Memory
from kvfloor.method import Spec, count
from kvfloor.randomness import exponential, row_keys, uniform
from kvfloor.slots import Slots

_FIRST_CENTRES = 16


class Clusters(Memory):
    """Per row: x centres (c, d), how many keys joined each (c,), and t of those keys, uniform (c, t, d).

    A key within `delta` of the nearest centre joins it, another becomes a centre; past the cap on centres a key
    joins whatever the distance, and `overfull` (rows,) tells.
    Every sample slot keeps the key of smallest counter-based draw, so samples do not depend on chunking.
    """

    def __init__(self, spec: Spec, t: int, cap: int | None) -> None:
        self.spec, self.cap = spec, cap
        rows, first = spec.rows, _FIRST_CENTRES if cap is None else cap
        like = {"dtype": spec.dtype, "device": spec.device}
        self.centre = torch.zeros(rows, first, spec.d, **like)
        self.count = torch.zeros(rows, first, dtype=torch.int64, device=spec.device)
        self.sample = torch.zeros(rows, first, t, spec.d, **like)
        self.sample_key = torch.full((rows, first, t), torch.inf, dtype=torch.float64, device=spec.device)
        self.overfull = torch.zeros(rows, dtype=torch.bool, device=spec.device)

    @property
    def used(self) -> Tensor:
        """Number of centres per row (rows,)."""
        return (self.count > 0).sum(1)

    def weighted(self, width: int | None = None) -> tuple[Tensor, Tensor]:
        """The samples of the first `width` clusters (all if None) as keys (rows, s, d), and log of the tokens that
        each stands for (rows, s), float64: a sample stands for count / t of them, -inf where there is no cluster."""
        sample, size = self.sample[:, :width], self.count[:, :width]
        t = sample.shape[2]
        share = torch.log(size.to(torch.float64) / t).unsqueeze(2).expand(-1, -1, t)
        return sample.flatten(1, 2), share.flatten(1)

    def join(self, rows: Tensor, k: Tensor, position: Tensor, delta: float, purpose: str) -> None:
        """The sequential greedy rule over the keys k (r, b, d) of `rows`, in order, for all rows at once.

        Distances go through one product of the block against the old centres and itself; the loop below runs
        over the block's tokens, with rows side by side. `purpose` names the draws of the samples.
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
            opens = (distance > delta) & (used < cap)
            self.overfull[rows] |= (distance > delta) & ~opens
            joined[:, j] = torch.where(opens, used, slot_of[line, nearest])
            slot_of[:, c + j] = joined[:, j]
            is_centre[:, c + j] = opens
            fresh = line[opens]
            centre[fresh, used[fresh]] = k[fresh, j]
            used = used + opens.to(used.dtype)
        self.centre[rows] = centre
        self.count[rows] = count.scatter_add(1, joined, torch.ones_like(joined))
        self._sample(rows, k, position, joined, purpose)

    def _sample(self, rows: Tensor, k: Tensor, position: Tensor, joined: Tensor, purpose: str) -> None:
        """Slot i of a cluster keeps the member of smallest uniform key: t uniform samples with replacement."""
        t = self.sample.shape[2]
        lane = row_keys(self.spec.seed, self.spec.ids(), purpose)[rows].view(-1, 1, 1)
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


class Reservoir(Memory):
    """Per row s pairs k (s, d), v (s, dv), each an own draw of a token with probability |v|^2 / mu; mu sums |v|^2.

    Every slot keeps the token of smallest counter-based draw, so samples do not depend on chunking.
    """

    def __init__(self, spec: Spec, s: int) -> None:
        self.spec = spec
        like = {"dtype": spec.dtype, "device": spec.device}
        wide = {"dtype": torch.float64, "device": spec.device}
        self.k = torch.zeros(spec.rows, s, spec.d, **like)
        self.v = torch.zeros(spec.rows, s, spec.dv, **like)
        self.key = torch.full((spec.rows, s), torch.inf, **wide)
        self.mu = torch.zeros(spec.rows, **wide)

    def log_weight(self) -> Tensor:
        """Log of the weight mu / (s |v|^2) of each pair (rows, s), float64, which makes sums over pairs unbiased for
        sums over tokens; -inf where no pair is."""
        norm = self.v.to(torch.float64).square().sum(-1)
        weight = torch.where(norm > 0, torch.log(self.mu.unsqueeze(1) / (norm * norm.shape[1])), -torch.inf)
        return weight.masked_fill(torch.isinf(self.key), -torch.inf)

    def offer(self, rows: Tensor, k: Tensor, v: Tensor, position: Tensor, purpose: str) -> None:
        """Slot i keeps the token with the smallest Exp(1)/|v|^2: token j wins with probability |v_j|^2 / mu."""
        norm = v.to(torch.float64).square().sum(-1)  # (r, b)
        s = self.key.shape[1]
        lane = row_keys(self.spec.seed, self.spec.ids(), purpose)[rows].view(-1, 1, 1)
        counter = position.unsqueeze(2) * s + torch.arange(s, device=k.device)
        key = exponential(lane, counter) / norm.unsqueeze(2).clamp_min(1e-300)
        key = torch.where(norm.unsqueeze(2) > 0, key, torch.inf)
        best, token = key.min(1)  # (r, s)
        new_k = k.gather(1, token.unsqueeze(-1).expand(-1, -1, k.shape[-1]))
        new_v = v.gather(1, token.unsqueeze(-1).expand(-1, -1, v.shape[-1]))
        better = best < self.key[rows]
        self.k[rows] = torch.where(better.unsqueeze(-1), new_k, self.k[rows])
        self.v[rows] = torch.where(better.unsqueeze(-1), new_v, self.v[rows])
        self.key[rows] = torch.minimum(best, self.key[rows])
        self.mu[rows] += norm.sum(1)


def drain(slots: Slots, rows: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `block` tokens of each of `rows`, which leave, by age: k (r, b, d), v (r, b, dv), position (r, b)."""
    view = slots.view(rows, block)
    order = view.position.argsort(1)
    k = view.k.gather(1, order.unsqueeze(-1).expand_as(view.k))
    v = view.v.gather(1, order.unsqueeze(-1).expand_as(view.v))
    position = view.position.gather(1, order)
    width = int(slots.held.max())
    leaving = torch.zeros(slots.held.shape[0], width, dtype=torch.bool)
    leaving[rows] = True
    slots.evict(leaving & (torch.arange(width) < slots.held.unsqueeze(1)))
    return k, v, position


def longest(q: Tensor, take: Tensor) -> Tensor:
    """The largest |q| (rows,), float64, of the first take[r] queries of each row of q (rows, g, a, d)."""
    real = torch.arange(q.shape[2]) < take.unsqueeze(1)
    norms = q.to(torch.float64).norm(dim=-1).masked_fill(~real.unsqueeze(1).to(q.device), 0.0)
    return norms.amax((1, 2))


def shared_out(budget: Budget, block: int, t: int) -> tuple[int, int]:
    """(value pairs s, cap on centres) under a budget in tokens: half for the pairs, half for the clusters.

    A pair is a token, a centre with its t sampled keys is (1 + t) / 2 of one.
    """
    free = tokens(budget, 1)[0] - block
    s = max(1, free // 2)
    return s, max(1, 2 * (free - s) // (1 + t))


def check_budget(owner: str, budget: Budget | None, block: int, t: int) -> None:
    """Raise ValueError for a budget that is not one number for all rows, or has no room for a pair and a cluster."""
    if isinstance(budget, tuple):
        raise ValueError(f"{owner} takes one budget for all rows, not one per row")
    if budget is not None and not isinstance(budget, str):
        count(owner, least=1, budget=budget)
        least = block + 2 + t
        if budget < least:
            raise ValueError(
                f"a budget of {budget} tokens is too small for {owner}: it needs at least {least}, which is "
                "block + 2 + t"
            )
