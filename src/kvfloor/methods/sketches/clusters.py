"""What SubGen keeps: online clusters of keys with uniform samples, and pairs drawn by the size of their value."""

from __future__ import annotations

import torch
from torch import Tensor

from kvfloor.core.budget import Budget, tokens
from kvfloor.core.memory import Memory
from kvfloor.core.randomness import exponential, row_keys, uniform
from kvfloor.core.slots import Slots
from kvfloor.core.spec import Spec
from kvfloor.methods.sketches.nearest import DIRECT, nearest
from kvfloor.validation import count

_FIRST_CENTRES = 16
_RINGS = 16  # of a token's clocks, drawn at a time
_RINGS_LIMIT = 2**24  # counters of one token: filling s slots takes some s log s rings, 10^5 for s = 10^4


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

        Old centres first, by one search for the whole block; then the rule among those it left uncovered; then every
        key goes to the nearest of the old centres and of the new ones made no later than itself.
        `purpose` names the draws of the samples.
        """
        used = self.used[rows]
        self._grow(int(used.max()) + k.shape[1])
        wide = k.to(torch.float32 if k.dtype != torch.float64 else torch.float64)
        width = int(used.max())
        old = self.centre[:, :width] if len(rows) == self.spec.rows else self.centre[rows, :width]
        is_centre = torch.arange(width, device=k.device) < used.unsqueeze(1)
        apart, joined = nearest(wide, old.to(wide.dtype), is_centre.unsqueeze(1))
        room = (self.cap or torch.iinfo(used.dtype).max) - used
        uncovered = apart > delta
        if bool((uncovered.any(1) & (room > 0)).any()):
            opens = self._open(wide, uncovered, room, delta)
            number = opens.cumsum(1) - 1
            line, j = opens.nonzero(as_tuple=True)
            self.centre[rows[line], used[line] + number[line, j]] = k[line, j]
            no_later = torch.ones(k.shape[1], k.shape[1], dtype=torch.bool, device=k.device).tril()
            fresh, which = nearest(wide, wide, opens.unsqueeze(1) & no_later)
            closer = fresh < apart
            joined = torch.where(closer, used.unsqueeze(1) + number.gather(1, which), joined)
            apart = torch.where(closer, fresh, apart)
        self.overfull[rows] |= (apart > delta).any(1)
        size = self.count[rows]
        self.count[rows] = size.scatter_add(1, joined, torch.ones_like(joined))
        self._sample(rows, k, position, joined, purpose)

    @staticmethod
    def _open(wide: Tensor, uncovered: Tensor, room: Tensor, delta: float) -> Tensor:
        """Which keys (r, b) become centres: uncovered by old ones and by those opened before, while there is room."""
        most = int(uncovered.sum(1).max())
        order = torch.argsort((~uncovered).to(torch.int8), dim=1, stable=True)[:, :most]  # the uncovered, by age
        waits = uncovered.gather(1, order)
        key = wide.gather(1, order.unsqueeze(-1).expand(-1, -1, wide.shape[-1]))
        within = torch.cdist(key, key, compute_mode=DIRECT) <= delta
        chosen = torch.zeros_like(waits)
        for u in range(most):
            chosen[:, u] = waits[:, u] & (room > 0)
            room = room - chosen[:, u].to(room.dtype)
            waits &= ~(chosen[:, u : u + 1] & within[:, u])
        return torch.zeros_like(uncovered).scatter(1, order, chosen)

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
        """Slot i keeps the token with the smallest Exp(1)/|v|^2: token j wins with probability |v_j|^2 / mu.

        A token's s clocks are drawn as one: rings at rate s |v|^2, each in a uniform slot, in which the first ring is
        that slot's clock. A token stops ringing once it is later than every slot's keeper, so a long stream costs
        O(log(s) s / n) draws per token instead of s, and which token a slot keeps depends on no cut.
        """
        norm = v.to(torch.float64).square().sum(-1)  # (r, b)
        s = self.key.shape[1]
        lane = row_keys(self.spec.seed, self.spec.ids(), purpose)[rows]
        best = self.key[rows]
        token = torch.full_like(best, -1, dtype=torch.int64)  # who takes slot i over
        line, j = (norm > 0).nonzero(as_tuple=True)
        time = torch.zeros(len(line), dtype=torch.float64, device=k.device)
        ring = torch.arange(_RINGS, device=k.device)
        while len(line):
            draw = (position[line, j].unsqueeze(1) * _RINGS_LIMIT + ring) * 2
            key = lane[line].unsqueeze(1)
            at = time.unsqueeze(1) + (exponential(key, draw) / (s * norm[line, j].unsqueeze(1))).cumsum(1)
            where = line.unsqueeze(1) * s + (uniform(key, draw + 1) * s).long()
            old = best.view(-1).clone()
            best.view(-1).scatter_reduce_(0, where.flatten(), at.flatten(), "amin")
            who, which = ((at == best.view(-1)[where]) & (at < old[where])).nonzero(as_tuple=True)
            token.view(-1)[where[who, which]] = j[who]
            time, ring = at[:, -1], ring + _RINGS
            goes_on = time < best.amax(1)[line]
            line, j, time = line[goes_on], j[goes_on], time[goes_on]
        taken, slot = (token >= 0).nonzero(as_tuple=True)
        self.k[rows[taken], slot] = k[taken, token[taken, slot]]
        self.v[rows[taken], slot] = v[taken, token[taken, slot]]
        self.key[rows] = best
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
