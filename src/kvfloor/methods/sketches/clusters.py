"""Hold the memory of SubGen: online clusters of keys with uniform samples, and pairs drawn in proportion to |v|^2.

In this file a row is one (batch item, kv head) stream; a block end comes after every `block`-th token of a row. The key
and value of a new token are held in a slot, and go into clusters and pairs at the next block end.
A cluster is a set of keys around one key, the centre; a sample is one of these keys and represents the others.
A pair is the (key, value) of one sampled token, and mu is the sum of |v|^2 over all tokens of its row.
A token's random numbers are computed from the seed, the row's identity number and the token's position in the stream.
So they are the same whenever they are computed. In shapes, r are the rows of a call and b the new tokens of each of
them, d and dv the widths of a key and a value; an argument `rows` (r,) has the indices of these rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvfloor.core.budget import Budget, tokens
from kvfloor.core.fields import MOST, Field, require_equal
from kvfloor.core.memory import Memory
from kvfloor.core.randomness import exponential, row_keys, uniform
from kvfloor.core.rowwise import length, total
from kvfloor.core.slots import Slots
from kvfloor.core.spec import Spec
from kvfloor.methods.sketches import append
from kvfloor.methods.sketches.nearest import nearest
from kvfloor.validation import count

_FIRST_CENTRES = 16
_RINGS = 16  # events of a token's Poisson process (`Reservoir.offer`) that are drawn at a time
_RINGS_LIMIT = 2**24  # bound on a token's events: filling s slots takes some s log s events, 10^5 for s = 10^4


class Clusters(Memory):
    """Hold online clusters of keys: per row, c centres (c, d), cluster sizes (c,), and t samples per cluster (c, t, d).

    A key within a distance delta (l2) of the nearest centre joins that centre; any other key becomes a centre. Once a
    row has `cap` centres (None: no cap), a key joins its nearest centre whatever the distance. `overfull` (rows,) is
    True for rows in which a key joined a centre farther than delta. Samples are uniform: sample i of a cluster is the
    key whose i-th random number, fixed by the key's position, is smallest. So samples do not depend on how the stream
    is split into calls.
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

    def fields(self) -> dict[str, Any]:
        spec, centres = self.spec, "centres" if self.cap is None else self.cap
        shape = (spec.rows, centres, self.sample.shape[2])
        return {
            "centre": Field(spec.dtype, (spec.rows, centres, spec.d), finite=True),
            "count": Field(torch.int64, (spec.rows, centres), least=0, most=MOST),
            "sample": Field(spec.dtype, (*shape, spec.d), finite=True),
            "sample_key": Field(torch.float64, shape, least=0),
        }

    def require_sound(self, fields: dict[str, Any]) -> None:
        there = fields["count"] > 0
        if bool((there[:, 1:] & ~there[:, :-1]).any()):
            raise ValueError("a cluster without keys stands before one with some")

    @property
    def used(self) -> Tensor:
        """Return the number of cluster centres in use per row, (rows,)."""
        return (self.count > 0).sum(1)

    def weighted(self, width: int | None = None) -> tuple[Tensor, Tensor]:
        """Return the sampled keys (rows, width * t, d) of the first `width` clusters, and their log-weights.

        width None: all clusters. The t samples of a cluster stand for all its keys, so each sample has the weight
        (number of keys) / t. The log-weights are (rows, width * t), float64, and -inf where there is no cluster.
        """
        sample, size = self.sample[:, :width], self.count[:, :width]
        t = sample.shape[2]
        share = torch.log(size.to(torch.float64) / t).unsqueeze(2).expand(-1, -1, t)
        return sample.flatten(1, 2), share.flatten(1)

    def join(self, rows: Tensor, k: Tensor, position: Tensor, delta: float, purpose: str) -> None:
        """Add the keys k (r, b, d) of `rows` to their clusters: each joins a centre within delta or becomes a centre.

        Old centres are the centres from before this call. New centres are found among the keys without an old centre
        within delta. In the order of the stream, each of these keys becomes a new centre, unless an earlier new centre
        is within delta or the row has reached its cap. Then every key joins the nearest centre: an old one, or a new
        one that is not later in the stream than the key itself. position (r, b): the keys' positions in the stream.
        purpose: a text that sets the random draws of these samples apart from all other draws.
        """
        if self.cap is None:
            self._grow(int(self.used[rows].max()) + k.shape[1])
        lane = row_keys(self.spec.seed, self.spec.ids(), purpose)[rows]
        if append.joined(self, rows, k, position, lane, delta):
            return
        used = self.used[rows]
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
        self._sample(rows, k, position, joined, lane)

    @staticmethod
    def _open(wide: Tensor, uncovered: Tensor, room: Tensor, delta: float) -> Tensor:
        """Return a mask (r, b), True for the keys that become new centres.

        wide       (r, b, d) the keys, in float32 or wider, in the order of the stream
        uncovered  (r, b) True for keys that are farther than delta from every centre from before this call
        room       (r,) the most new centres that each row may get
        Each uncovered key becomes a centre, unless an earlier new centre is within delta or the row already has room[r]
        new centres.
        """
        most = int(uncovered.sum(1).max())
        order = torch.argsort((~uncovered).to(torch.int8), dim=1, stable=True)[:, :most]  # the uncovered, by age
        waits = uncovered.gather(1, order)
        key = wide.gather(1, order.unsqueeze(-1).expand(-1, -1, wide.shape[-1]))
        within = torch.stack([length(key - key[:, u : u + 1]) for u in range(most)], 1) <= delta
        chosen = torch.zeros_like(waits)
        for u in range(most):
            chosen[:, u] = waits[:, u] & (room > 0)
            room = room - chosen[:, u].to(room.dtype)
            waits &= ~(chosen[:, u : u + 1] & within[:, u])
        return torch.zeros_like(uncovered).scatter(1, order, chosen)

    def _sample(self, rows: Tensor, k: Tensor, position: Tensor, joined: Tensor, lane: Tensor) -> None:
        """Update the t uniform samples of the clusters by the keys k (r, b, d) that have just joined them.

        joined    (r, b) index of the cluster that each key joined
        position  (r, b) the keys' positions in the stream, which fix their t random numbers each
        lane      (r,) what fixes these random numbers for each row, beside positions (`row_keys`)
        Sample i of a cluster is the key whose i-th random number is smallest. So one key may be several of the samples
        (sampling with replacement).
        """
        t = self.sample.shape[2]
        key = uniform(lane.view(-1, 1, 1), position.unsqueeze(2) * t + torch.arange(t, device=k.device))  # (r, b, t)
        where = joined.unsqueeze(2).expand(-1, -1, t)
        old = self.sample_key[rows]
        new = old.scatter_reduce(1, where, key, "amin")
        won = (key == new.gather(1, where)) & (key < old.gather(1, where))
        r, j, i = won.nonzero(as_tuple=True)
        self.sample[rows[r], joined[r, j], i] = k[r, j]
        self.sample_key[rows] = new

    def _grow(self, needed: int) -> None:
        have = self.centre.shape[1]
        if needed <= have:
            return
        extra = max(needed, 2 * have) - have
        for name, fill in (("centre", 0), ("count", 0), ("sample", 0), ("sample_key", torch.inf)):
            old: Tensor = getattr(self, name)
            new = old.new_full((old.shape[0], extra, *old.shape[2:]), fill)
            self.move(name, torch.cat([old, new], 1))


class Reservoir(Memory):
    """Hold s sampled (key, value) pairs per row, k (s, d) and v (s, dv), drawn with probability proportional to |v|^2.

    Each pair is an independent draw of a token with probability |v|^2 / mu, where mu is the sum of all |v|^2. Here a
    slot is the place of one of the s pairs. Every token has one exponential random number of rate |v|^2 for each slot,
    and each slot keeps the token with the smallest number for it. The numbers are fixed by the token's position, so the
    pairs do not depend on how the stream is split into calls.
    """

    def __init__(self, spec: Spec, s: int) -> None:
        self.spec = spec
        like = {"dtype": spec.dtype, "device": spec.device}
        wide = {"dtype": torch.float64, "device": spec.device}
        self.k = torch.zeros(spec.rows, s, spec.d, **like)
        self.v = torch.zeros(spec.rows, s, spec.dv, **like)
        self.key = torch.full((spec.rows, s), torch.inf, **wide)
        self.mu = torch.zeros(spec.rows, **wide)

    def fields(self) -> dict[str, Any]:
        return {
            "k": Field(self.spec.dtype, tuple(self.k.shape), finite=True),
            "v": Field(self.spec.dtype, tuple(self.v.shape), finite=True),
            "key": Field(torch.float64, tuple(self.key.shape), least=0),
            "mu": Field(torch.float64, tuple(self.mu.shape), least=0),
        }

    def log_weight(self) -> Tensor:
        """Return the log of the weight mu / (s |v|^2) of each of the s sampled pairs, (rows, s), float64.

        v is the pair's value, and mu the sum of |v|^2 over all tokens of the row. Under these weights, sums over the
        sampled pairs are unbiased estimates of sums over all tokens. The log-weight is -inf where a slot has no pair.
        """
        norm = self.v.to(torch.float64).square().sum(-1)
        weight = torch.where(norm > 0, torch.log(self.mu.unsqueeze(1) / (norm * norm.shape[1])), -torch.inf)
        return weight.masked_fill(torch.isinf(self.key), -torch.inf)

    def offer(self, rows: Tensor, k: Tensor, v: Tensor, position: Tensor, purpose: str) -> None:
        """Update the sampled pairs of `rows` by new tokens k (r, b, d), v (r, b, dv), position (r, b).

        position has the tokens' positions in the stream, which fix their random numbers; the text `purpose` sets these
        numbers apart from all others.
        Law: a token has one exponential random number of rate |v|^2 for each of the s slots, and each slot keeps the
        token with the smallest number for it. So a slot keeps token j with probability |v_j|^2 / mu.
        A token's s numbers come from one Poisson process of rate s |v|^2, whose events fall into slots chosen
        uniformly: the number for a slot is the time of the first event there. Events later than the numbers of all kept
        pairs change nothing, so drawing stops at that time. In a stream of n tokens this takes O(s log(s) / n) draws
        per token on average, instead of s.
        """
        lane = row_keys(self.spec.seed, self.spec.ids(), purpose)[rows]
        if append.offered(self, rows, k, v, position, lane):
            return
        norm = total(v.to(torch.float64).square())  # (r, b)
        s = self.key.shape[1]
        best = self.key[rows]
        token = torch.full_like(best, -1, dtype=torch.int64)  # the token that replaces the pair of slot i, or -1
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
        self.mu[rows] += total(norm, 1)


def drain(slots: Slots, rows: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Evict all tokens from the slots of `rows`, `block` tokens in each row, and return them, oldest first.

    `slots` has the tokens of a row since its last block end. `rows` are in order. The results may be views of the
    slots, good until the next token comes. Returns their keys k (r, b, d), values v (r, b, dv) and
    positions in the stream (r, b), with b = block.
    """
    everything = len(rows) == len(slots.held)
    view = slots.view(None if everything else rows, block)
    k, v, position = view.k, view.v, view.position
    if bool((position[:, 1:] < position[:, :-1]).any()):
        order = position.argsort(1)
        k = k.gather(1, order.unsqueeze(-1).expand_as(k))
        v = v.gather(1, order.unsqueeze(-1).expand_as(v))
        position = position.gather(1, order)
    slots.empty(rows)
    return k, v, position


def require_sketched(fields: dict[str, Any], parts: list[dict[str, Any]], block: int) -> None:
    """Raise ValueError unless slots and clusters of a saved state have as many tokens as its rows have seen.

    The slots of a row must hold the tokens since its last block end, and its clusters all earlier tokens.
    fields  name -> saved value of the state, such as "seen" (rows,), the number of tokens of each row
    parts   the same for each `Clusters` object of the state
    block   tokens from one block end to the next
    """
    require_equal(fields["slots"]["held"], fields["seen"] % block, "tokens of the open block")
    for keys in parts:
        require_equal(keys["count"].sum(1), fields["seen"] // block * block, "tokens in the clusters")


def longest(q: Tensor, take: Tensor) -> Tensor:
    """Return the largest norm |q| (rows,), float64, over the queries q (rows, g, a, d) of each row.

    g is the number of queries per token, a the largest number of tokens per row. Row r has take[r] tokens, and its
    further entries are padding. The result is 0 for a row without queries.
    """
    if q.numel() == 0:
        return torch.zeros(q.shape[0], dtype=torch.float64, device=q.device)
    real = torch.arange(q.shape[2]) < take.unsqueeze(1)
    norms = length(q.to(torch.float64)).masked_fill(~real.unsqueeze(1).to(q.device), 0.0)
    return norms.amax((1, 2))


def shared_out(budget: Budget, block: int, t: int) -> tuple[int, int]:
    """Return the number s of sampled pairs and the cap on centres that fit into a budget in tokens.

    `block` tokens of the budget are set aside for the newest tokens, which are not clustered yet. Half of the other
    tokens pays for pairs, at one token each. The other half pays for centres: a centre with its t sampled keys counts
    as (1 + t) / 2 tokens, as it has no values.
    """
    free = tokens(budget, 1)[0] - block
    s = max(1, free // 2)
    return s, max(1, 2 * (free - s) // (1 + t))


def check_budget(owner: str, budget: Budget | None, block: int, t: int) -> None:
    """Raise ValueError if the budget is given row by row, or is less than block + 2 + t tokens.

    These pay for the newest `block` tokens, at least one sampled pair, and at least one cluster with t sampled keys.
    owner   the method's name, for the error
    budget  tokens per row; None, and a text such as "25%" or "64MiB", are not checked
    """
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
