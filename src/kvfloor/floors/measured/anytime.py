"""Prove read floors step by step, so that a search that is stopped at any moment has a valid one to return.

The read floor is a lower bound on the bits of a state (the memory of a KV-cache method) that answers queries. In its
proof, a receiver (Bob) reconstructs ("decodes") values that are hidden in groups of tokens, one group after the other.
`readable_within` searches first and bounds weights afterwards; here both are done for a few tokens at a time. Groups
are formed from the last decoded to the first. What a group adds to the floor depends on the tokens of the stream and on
the groups decoded after it, all of which are known when it is formed:
    all keys are in the stream      the bits of a group are final when it is formed: the floor so far is a part of a sum
                                    of terms that are at least 0
    the read keys alone             a further token takes softmax weight from the queries of all former ones. The stream
                                    of the tokens so far has a floor of its own, and the largest so far is kept
Both floors grow with time (docs/floors.md, "Stopped early").
    own, before, after   sums of exponentials of a query's logits: on its own group, on other tokens of the stream, and
                         on the groups decoded later
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kvfloor.floors.measured.directions import ball_among
from kvfloor.floors.measured.levels import Demand
from kvfloor.floors.measured.limit import Watch
from kvfloor.floors.measured.products import Factors, Rounding, key_sizes
from kvfloor.floors.measured.search import NEARNESS, Block, formed, joined, joining_bits
from kvfloor.floors.measured.shares import (
    TOKENS_AT_ONCE,
    Masses,
    exponentials,
    factors_for,
    own_logits,
    rounded_shares,
)
from kvfloor.logits import capped

_SORTED_AT_ONCE = 4096  # keys whose queries are found before the best of them are tried first


class Proved(NamedTuple):
    """Hold groups with their bounded weights, in the order of decoding, and the bits that they add.

    stream   (n,) tokens of the stream, sorted; indices of the given keys
    group    (n,) the group of each token of the stream, -1 for tokens whose values are 0
    queries  (G, d)
    asked    (G,) the token for which each query was made
    weights, leaks  (G,) float64, as `ordered_shares` bounds them
    """

    bits: float
    stream: Tensor
    group: Tensor
    queries: Tensor
    asked: Tensor
    weights: Tensor
    leaks: Tensor


class Growing(Protocol):
    """Define what grows a floor: `grow` takes further tokens and their queries, `proved` returns the floor so far."""

    at_once: int

    def grow(self, tokens: Tensor, q: Tensor) -> None: ...

    def proved(self) -> Proved: ...


def proved_by_then(
    k: Tensor, radius: float, law: tuple[float, float | None], beyond: float | None, demand: Demand, alone: bool,
    watch: Watch,
) -> Proved:  # fmt: skip
    """Prove a read floor of keys k (n, d), for all queries of length at most `radius`, until `watch` has nothing left.

    law     scale and softcap of the logits
    beyond  log-sum-exp of every query's logits on tokens outside the stream, or None
    alone   whether the stream has the read keys alone, or all keys
    The queries of the last tokens are weighed to the end once they were begun. `watch.weighed` counts the tokens.
    """
    growing: Growing = (Alone if alone else Present)(k, law, beyond, demand)
    for tokens, q in _queries(k.float(), radius, law, beyond, watch):
        for part in torch.arange(len(tokens), device=k.device).split(growing.at_once):
            left = watch.left
            part = part if left is None else part[:left]
            if len(part) == 0:
                return growing.proved()
            growing.grow(tokens[part], q[part])
            watch.weighed += len(part)
    return growing.proved()


def _queries(
    k: Tensor, radius: float, law: tuple[float, float | None], beyond: float | None, watch: Watch
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (tokens, queries), a few thousand at a time, those first whose query puts most weight on its key."""
    everything = torch.arange(len(k), device=k.device)
    ball, place, steps = ball_among(k, everything, radius, *law, beyond)
    for tokens in everything.split(_SORTED_AT_ONCE):
        if watch.left == 0:
            return
        q = ball.towards(k[tokens], place[tokens], steps)
        best = ball.lead(q, k[tokens], place[tokens]).argsort(descending=True, stable=True)
        yield tokens[best], q[best]


class Present:
    """Grow the floor of a stream that has all keys k (n, d), from groups of tokens that one query does not tell apart.

    law, beyond and demand are those of `proved_by_then`.
    """

    at_once = 128

    def __init__(self, k: Tensor, law: tuple[float, float | None], beyond: float | None, demand: Demand) -> None:
        self._k, self._law, self._demand = k, law, demand
        self._beyond = None if beyond is None else torch.tensor(beyond, dtype=torch.float64, device=k.device)
        self._logits = _PartLogits(k, law)
        self._group = torch.full((len(k),), -1, device=k.device)  # numbered in the order of forming
        self._formed: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self._count = 0

    def grow(self, tokens: Tensor, q: Tensor) -> None:
        """Form groups from the queries q (t, d), made for `tokens` (t,), in turn; bound their weights."""
        n, demand = len(self._k), self._demand
        factors, rounding = self._logits.of(q)
        raw = factors.logits(slice(None), slice(None))
        later = None if self._beyond is None else self._beyond.expand(len(q))
        taken = self._group >= 0
        new = formed(Block.of(tokens, raw, later), taken, demand, NEARNESS[0])
        if len(new.places) == 0:
            return
        q, rounding, raw = q[new.places], rounding.at(new.places), raw[new.places]
        count = len(q)

        own_each = own_logits(q, self._k[new.tokens], new.member, 0, *self._law)
        top = torch.full((count,), -torch.inf, dtype=torch.float64, device=q.device)
        shift = top.scatter_reduce(0, new.member, own_each, "amax").float().double()
        own = torch.zeros_like(shift).index_add(0, new.member, torch.exp(own_each - shift[new.member]))
        mass = exponentials(raw, shift)
        rest = ~taken
        rest[new.tokens] = False
        within = mass.new_zeros(count, count).index_add(1, new.member, mass[:, new.tokens])
        after = (mass @ taken.to(mass.dtype)).double() + within.tril(-1).sum(1).double()
        before = (mass @ rest.to(mass.dtype)).double() + within.triu(1).sum(1).double()
        beyond = torch.zeros_like(own) if self._beyond is None else torch.exp(self._beyond - shift)
        weights, leaks = rounded_shares(Masses(own, before, after, beyond), rounding, factors, n, n)
        self._group[new.tokens] = self._count + new.member
        self._formed.append((q, tokens[new.places], weights, leaks))
        self._count += count

    def proved(self) -> Proved:
        """Return the floor of the groups formed so far. Groups without bits are left out."""
        stream = torch.arange(len(self._k), device=self._k.device)
        if self._count == 0:
            nothing = torch.zeros(0, dtype=torch.float64, device=self._k.device)
            return Proved(0.0, stream, self._group, self._k[:0], stream[:0], nothing, nothing)
        queries, asked, weights, leaks = (torch.cat(parts).flip(0) for parts in zip(*self._formed, strict=True))
        group = torch.where(self._group < 0, -1, self._count - 1 - self._group)
        bits = self._demand.bits(weights, leaks)
        stays = bits > 0.0
        return Proved(
            float(bits.sum()), stream, renumbered(group, stays), queries[stays], asked[stays], weights[stays],
            leaks[stays],
        )  # fmt: skip


class Alone:
    """Grow a stream of read tokens alone, each with a query of its own, from keys k (n, d).

    law, beyond and demand are those of `proved_by_then`. Every token that joins takes softmax weight from the queries
    of all members, whose sums are kept up. The members at the largest floor so far are the stream.
    """

    at_once = 512

    def __init__(self, k: Tensor, law: tuple[float, float | None], beyond: float | None, demand: Demand) -> None:
        n, device = len(k), k.device
        self._k, self._law, self._demand, self._beyond, self._count = k, law, demand, beyond, 0
        self._logits = _PartLogits(k, law)
        self._tokens = torch.zeros(n, dtype=torch.int64, device=device)
        self._q = torch.zeros(n, k.shape[1], device=device)
        self._short = torch.zeros(n, k.shape[1], dtype=self._logits.keys.dtype, device=device)
        self._shift, self._own, self._before, self._after, self._error, self._reach = (
            torch.zeros(n, dtype=torch.float64, device=device) for _ in range(6)
        )
        nothing = torch.zeros(0, dtype=torch.float64, device=device)
        self._best = 0.0, 0, nothing, nothing

    def grow(self, tokens: Tensor, q: Tensor) -> None:
        """Let the `tokens` (t,) with their queries q (t, d) join in turn, each decoded before all so far, if it reads.

        A token joins if its query adds bits.
        """
        factors, rounding = self._logits.of(q)
        own_each = capped((q.double() * self._k[tokens].double()).sum(1) * self._law[0], self._law[1])
        shift = own_each.float().double()
        beyond = torch.zeros_like(shift) if self._beyond is None else torch.exp(self._beyond - shift)
        after = torch.zeros_like(shift)
        for others in self._tokens[: self._count].split(TOKENS_AT_ONCE):
            after += exponentials(factors.logits(slice(None), others), shift).sum(1).double()
        hopeful = (joining_bits(self._demand, after, beyond) > 0.0).nonzero()[:, 0]
        inside = exponentials(factors.logits(slice(None), tokens), shift)
        earlier = inside[hopeful][:, hopeful].tril(-1).double()
        new = hopeful[joined(self._demand, after[hopeful], beyond[hopeful], earlier)]
        if len(new) == 0:
            return
        inside = inside[new][:, new]
        old, stop = self._count, self._count + len(new)
        fresh = tokens[new]
        for low in range(0, old, TOKENS_AT_ONCE):  # members lose weight to those that join, which are decoded before
            rows = slice(low, min(old, low + TOKENS_AT_ONCE))
            raw = Factors(self._short[rows], self._logits.keys, self._law[1]).logits(slice(None), fresh)
            self._before[rows] += exponentials(raw, self._shift[rows]).sum(1).double()
        at = slice(old, stop)
        self._tokens[at], self._q[at], self._short[at], self._shift[at] = fresh, q[new], factors.q[new], shift[new]
        self._own[at] = torch.exp(own_each[new] - shift[new])
        self._after[at] = after[new] + inside.tril(-1).sum(1).double()
        self._before[at] = inside.triu(1).sum(1).double()
        self._error[at], self._reach[at] = rounding.error[new], rounding.reach[new]
        self._count = stop
        self._keep_the_best()

    def proved(self) -> Proved:
        """Return the largest floor of a stream so far. Tokens without bits stay in it, with value 0."""
        bits, count, weights, leaks = self._best
        tokens, weights, leaks = self._tokens[:count].flip(0), weights.flip(0), leaks.flip(0)
        stays = self._demand.bits(weights, leaks) > 0.0
        stream, at = tokens.sort()
        group = renumbered(torch.arange(count, device=tokens.device), stays)[at]
        queries = self._q[:count].flip(0)[stays]
        return Proved(bits, stream, group, queries, tokens[stays], weights[stays], leaks[stays])

    def _keep_the_best(self) -> None:
        so_far = slice(0, self._count)
        shift = self._shift[so_far]
        beyond = torch.zeros_like(shift) if self._beyond is None else torch.exp(self._beyond - shift)
        masses = Masses(self._own[so_far], self._before[so_far], self._after[so_far], beyond)
        factors = Factors(self._short[so_far], self._logits.keys, self._law[1])
        rounding = Rounding(self._error[so_far], self._reach[so_far])
        weights, leaks = rounded_shares(masses, rounding, factors, self._count, TOKENS_AT_ONCE)
        bits = float(self._demand.bits(weights, leaks).sum())
        if bits > self._best[0]:
            self._best = bits, self._count, weights, leaks


class _PartLogits:
    """Compute logits of one part of the queries after the other, on keys k (n, d) that are rounded once.

    law  scale and softcap. The precision is what `factors_for` chooses for queries as long as the longest key, n of
         them: whatever it is, bounds count the error that it really makes.
    """

    def __init__(self, k: Tensor, law: tuple[float, float | None]) -> None:
        self._law = law
        factors, _ = factors_for(k, k, *law)
        self.keys, self._sizes = factors.k, key_sizes(factors, k)

    def of(self, q: Tensor) -> tuple[Factors, Rounding]:
        """Return what computes the logits of the queries q (t, d), and bounds on their rounding."""
        scale, softcap = self._law
        factors = Factors((q.double() * scale).to(self.keys.dtype), self.keys, softcap)
        return factors, Rounding.of_sizes(factors, q, self._sizes, scale)


def renumbered(group: Tensor, stays: Tensor) -> Tensor:
    """Return each token's group (n,), renumbered after groups are dropped; tokens of dropped groups get -1.

    stays (G,) is True for each group that is kept.
    """
    number = torch.where(stays, torch.cumsum(stays, 0) - 1, -1)
    return torch.where(group < 0, -1, torch.cat([number, number.new_tensor([-1])])[group])
