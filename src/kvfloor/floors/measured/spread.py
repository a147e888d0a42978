"""Which keys can stand in one stream so that bounded queries read each of them: the search behind
`readable_within(others="absent")`. It proposes; `readable.py` computes the floor from weights bounded anew.

With R_ij = exp(logit_ij - logit_ii) for the query of token i, a set of tokens leaves token i the weight
1 / (1 + sum_j R_ij) over the others j of the set, and as leak that weight times the sum over the j decoded later.
Sets grow from the last decoded token to the first: one that joins in front leaks nothing into those behind it, and only
shrinks their weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kvfloor.floors.measured.directions import FEW, thinned, with_rivals
from kvfloor.floors.measured.improve import by_damage, promised, pruned
from kvfloor.floors.measured.levels import Demand
from kvfloor.floors.measured.products import Factors, rough_dtype
from kvfloor.logits import capped

_TOKENS_AT_ONCE = _OTHERS_AT_ONCE = 512
_REVISED_UP_TO = 2**25  # tokens x members up to which a set is revised in rounds
_ROUNDS = 3
_PATIENCE = 2  # steps without a gain of more than a thousandth end the revisions
_WORTHWHILE = 1.001
_NEARLY_ALL = 0.9  # share of tokens that a sample says are readable from which all of these are tried
_PASSES = 16  # at most this many to settle who is chosen within a block
_TOP = 60.0  # logit differences are cut here: finite above, and far from slow subnormal numbers below


class Pull:
    """R, from every token's own query: how much others draw from it. `beyond` is log mass that all queries see."""

    def __init__(self, q: Tensor, k: Tensor, scale: float, softcap: float | None, beyond: float | None) -> None:
        self.q, self.n = q, len(k)
        self._factors = Factors.of(q, k, scale, softcap, rough_dtype(k.device, self.n <= FEW))
        self._own = capped((q * k).sum(1) * scale, softcap)
        reach = abs(scale) * float(q.norm(dim=1).max()) * float(k.norm(dim=1).max())
        self._tame = 2.0 * reach <= _TOP
        self.beyond = torch.zeros_like(self._own) if beyond is None else torch.exp((beyond - self._own).clamp_max(_TOP))

    def on(self, tokens: Tensor, others: Tensor) -> Tensor:
        """R (t, o), 0 where both are the same token."""
        pull = self._factors.logits(tokens, others).sub_(self._own[tokens].unsqueeze(1))
        pull = (pull if self._tame else pull.clamp_(-_TOP, _TOP)).exp_()
        place = torch.full((self.n,), -1, device=tokens.device)
        place[others] = torch.arange(len(others), device=tokens.device)
        same = place[tokens]
        rows = (same >= 0).nonzero()[:, 0]
        pull[rows, same[rows]] = 0.0
        return pull

    def load(self, tokens: Tensor, others: Tensor) -> Tensor:
        """Row sums (t,) of R."""
        total = torch.zeros_like(self._own[tokens])
        for row in range(0, len(tokens), _TOKENS_AT_ONCE):
            rows = slice(row, row + _TOKENS_AT_ONCE)
            for part in others.split(_OTHERS_AT_ONCE):
                total[rows] += self.on(tokens[rows], part).sum(1)
        return total

    def damage(self, tokens: Tensor, others: Tensor) -> Tensor:
        """Column sums (o,) of R cut at 1: how much the queries of `tokens` see of each other token."""
        total = torch.zeros_like(self._own[others])
        for rows in tokens.split(_TOKENS_AT_ONCE):
            total += self.on(rows, others).clamp_max_(1.0).sum(0)
        return total

    def pairs(self, members: Tensor) -> Tensor:
        """Weight (G, G) of each member's query on each member, in a stream of these alone."""
        pull = self.on(members, members)
        pull.fill_diagonal_(1.0)
        return pull / (pull.sum(1) + self.beyond[members]).unsqueeze(1)


class Candidate(NamedTuple):
    """Tokens (G,) in the order of decoding for a stream of these alone, their queries (G, d), and the promised bits."""

    tokens: Tensor
    q: Tensor
    bits: float


class Spread:
    """The search for one matrix of keys (n, d), float32, under one logit law and radius."""

    def __init__(
        self, k: Tensor, radius: float, scale: float, softcap: float | None, beyond: float | None, demand: Demand
    ) -> None:
        self.k, self.demand = k, demand
        self._law = (scale, softcap, beyond)
        self._radius = radius
        self._all = torch.arange(k.shape[0], device=k.device)

    def candidates(self) -> Iterator[Candidate]:
        """Choices to be judged one after the other, until one keeps what it promises.

        Few tokens: the best of the revisions from two starts. Many: all that a sample says can stand together, if that
        is nearly all; then a set grown pair by pair, which also sees near-duplicates that a sample misses.
        """
        pull = self._pull(self._all, None)
        sample = thinned(self._all)
        load = pull.load(self._all, sample) * (len(self._all) / len(sample))
        if len(self._all) <= FEW:
            yield self._best(pull, (load.argsort(), pull.damage(sample, self._all).argsort()))
            return
        fine = self._reads(load, pull.beyond)
        if float(fine.double().mean()) >= _NEARLY_ALL:
            tokens = load.argsort()
            tokens = tokens[fine[tokens]]
            own = 1.0 / (1.0 + load[tokens] + pull.beyond[tokens])
            bits = float(self.demand.bits(own, own * load[tokens] / 2.0).sum())
            yield Candidate(tokens, pull.q[tokens], bits)
        yield self._best(pull, (load.argsort(),))

    def _best(self, pull: Pull, orders: tuple[Tensor, ...]) -> Candidate:
        """The best revision of the sets that grow in the given orders."""
        best = Candidate(self._all[:0], self.k[:0], 0.0)
        for order in orders:
            before, idle = 0.0, 0
            for found in self._revisions(pull, self._grown(pull, order, self._all[:0])):
                best = max(best, found, key=lambda candidate: candidate.bits)
                idle = 0 if found.bits > before * _WORTHWHILE else idle + 1
                before = max(before, found.bits)
                if idle == _PATIENCE:
                    break
            if best.bits * _WORTHWHILE >= len(self._all) * self.demand.ceiling:
                break
        return best

    def _pull(self, rivals: Tensor, first: Tensor | None) -> Pull:
        """Every token's best query against the given rivals."""
        scale, softcap, beyond = self._law
        q = with_rivals(self.k, rivals, self._radius, scale, softcap, beyond, first)
        return Pull(q, self.k, scale, softcap, beyond)

    def _revisions(self, pull: Pull, members: Tensor) -> Iterator[Candidate]:
        """A set's order, what is left when harmful members go, queries anew against it, further members; and again."""
        for _ in range(_ROUNDS):
            bits, members = self._arranged(pull, members)
            yield Candidate(members, pull.q[members], bits)
            if len(members) <= FEW:
                members = members[pruned(pull.pairs(members), self.demand)]
                yield Candidate(members, pull.q[members], float(promised(pull.pairs(members), self.demand).sum()))
            if len(members) == 0 or len(self._all) * len(members) > _REVISED_UP_TO:
                return
            pull = self._pull(members, pull.q)
            members = self._grown(pull, pull.load(self._all, members).argsort(), members)

    def _arranged(self, pull: Pull, members: Tensor) -> tuple[float, Tensor]:
        """The members in a better order, and the bits promised; where all pairs are too many, easy ones first."""
        if len(members) <= FEW:
            pairs = pull.pairs(members)
            again = by_damage(pairs, self.demand)
            orders = (torch.arange(len(members), device=pairs.device), again)
            sums = [float(promised(pairs[order][:, order], self.demand).sum()) for order in orders]
            best = sums.index(max(sums))
            return sums[best], members[orders[best]]
        sample = thinned(members)
        load = pull.load(members, sample) * (len(members) / len(sample))
        own = 1.0 / (1.0 + load + pull.beyond[members])
        return float(self.demand.bits(own, own * load / 2.0).sum()), members[load.argsort()]

    def _grown(self, pull: Pull, order: Tensor, members: Tensor) -> Tensor:
        """Members and, in front of them, further tokens of the given order that are readable beside the others."""
        new = torch.ones_like(self._all, dtype=torch.bool)
        new[members] = False
        for part in order[new[order]].split(_TOKENS_AT_ONCE):
            load = pull.load(part, members)
            alone = self._reads(load, pull.beyond[part])
            part, load = part[alone], load[alone]
            inside = pull.on(part, part).tril(-1)
            accepted = torch.ones_like(part, dtype=torch.bool)
            for _ in range(_PASSES):
                again = self._reads(load + inside @ accepted.to(inside.dtype), pull.beyond[part])
                if bool((again == accepted).all()):
                    break
                accepted = again
            members = torch.cat([part[accepted].flip(0), members])
        return members

    def _reads(self, load: Tensor, beyond: Tensor) -> Tensor:
        """Whether a token in front of others that draw `load` from it still has bits."""
        own = 1.0 / (1.0 + load + beyond)
        return self.demand.bits(own, own * load) > 0.0
