"""Search for a stream of keys, each with a short query that reads it, for `readable_within(others="absent")`.

`readable_within` computes the read floor, a lower bound on the bits of a state (the memory of a KV-cache method) that
answers all queries up to a given length. In its proof, a row of values is hidden in each token, and a receiver (Bob)
reconstructs ("decodes") the rows one by one from the answers. Tokens that he has decoded no longer disturb his next
answers. So tokens are kept in an order of decoding, which has nothing to do with their order in the stream. A query
"reads" a token if its answer gives bits of the hidden row. Every token i has one query, and logit_ij is the logit of
this query on token j.
    members         the tokens of the stream that is being built; all other tokens are left out of it
    ratio R_ij      exp(logit_ij - logit_ii): the softmax mass of the query of token i on token j, over that on token i
    beyond          log-sum-exp of a query's logits on further tokens that every query sees; None: there are no such
                    tokens
    pull            one query per token, with the ratios R_ij under these queries (`Pull`)
    load            sum of the ratios R_ij over a set of tokens j
    weight          softmax weight of the query of token i on token i: 1 / (1 + sum of R_ij over the other members and
                    the further tokens)
    leak            the weight of token i times the sum of R_ij over the members that Bob decodes after token i
    damage          how much a token disturbs the queries of other tokens
    demand          the accuracy required of answers
    estimated bits  the read floor of a stream by the search's own softmax weights, in which rounding errors are not
                    accounted for; `readable.py` bounds the weights anew and computes the true floor
The search only proposes streams. A stream grows from the last decoded token to the first: a token that is decoded
earlier adds no leak to the tokens decoded after it, and only shrinks their weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kvfloor.floors.measured.directions import FEW, thinned, with_rivals
from kvfloor.floors.measured.improve import by_damage, promised, pruned
from kvfloor.floors.measured.levels import Demand
from kvfloor.floors.measured.limit import unwatched
from kvfloor.floors.measured.products import Factors, rough_dtype
from kvfloor.floors.measured.search import joined, joining_bits
from kvfloor.logits import capped

_TOKENS_AT_ONCE = _OTHERS_AT_ONCE = 512
_REVISED_UP_TO = 2**25  # tokens x members up to which a set is revised in rounds
_ROUNDS = 3
_PATIENCE = 2  # so many steps in a row without a gain of more than a thousandth end the revisions
_WORTHWHILE = 1.001
_NEARLY_ALL = 0.9  # from this share of tokens on that are readable by a sample's estimate, all of these are tried
_TOP = 60.0  # logit differences are cut to +-60: exponentials stay finite, and clear of slow subnormal numbers


class Pull:
    """Compute the ratios R_ij: the softmax mass on token j over that on token i, under the query of token i.

    q (n, d) holds one query per key of k (n, d). scale and softcap define the logits. `beyond` is the log-sum-exp of
    every query's logits on further tokens, or None. `look` is called before every 512 tokens of a load, and may raise
    an error to end the search.
    """

    def __init__(
        self, q: Tensor, k: Tensor, scale: float, softcap: float | None, beyond: float | None,
        look: Callable[[], None] = unwatched,
    ) -> None:  # fmt: skip
        self.q, self.n, self._look = q, len(k), look
        self._factors = Factors.of(q, k, scale, softcap, rough_dtype(k.device, self.n <= FEW))
        self._own = capped((q * k).sum(1) * scale, softcap)
        reach = abs(scale) * float(q.norm(dim=1).max()) * float(k.norm(dim=1).max())
        self._tame = 2.0 * reach <= _TOP
        self.beyond = torch.zeros_like(self._own) if beyond is None else torch.exp((beyond - self._own).clamp_max(_TOP))

    def on(self, tokens: Tensor, others: Tensor) -> Tensor:
        """Return the ratios R_ij (t, o) for all i of `tokens` (t,) and j of `others` (o,), which are indices of tokens.

        R_ij is the softmax mass on token j over that on token i, under the query of token i. Where i and j are the same
        token, the result is 0.
        """
        pull = self._factors.logits(tokens, others).sub_(self._own[tokens].unsqueeze(1))
        pull = (pull if self._tame else pull.clamp_(-_TOP, _TOP)).exp_()
        place = torch.full((self.n,), -1, device=tokens.device)
        place[others] = torch.arange(len(others), device=tokens.device)
        same = place[tokens]
        rows = (same >= 0).nonzero()[:, 0]
        pull[rows, same[rows]] = 0.0
        return pull

    def load(self, tokens: Tensor, others: Tensor) -> Tensor:
        """Return the load of `others` on each i of `tokens`, (t,): the sum of the ratios R_ij over all j in `others`.

        R_ij is the softmax mass on token j over that on token i, under the query of token i.
        """
        total = torch.zeros_like(self._own[tokens])
        for row in range(0, len(tokens), _TOKENS_AT_ONCE):
            self._look()
            rows = slice(row, row + _TOKENS_AT_ONCE)
            for part in others.split(_OTHERS_AT_ONCE):
                total[rows] += self.on(tokens[rows], part).sum(1)
        return total

    def damage(self, tokens: Tensor, others: Tensor) -> Tensor:
        """Return how much each token j of `others` (o,) disturbs the queries of `tokens` (t,): (o,), larger is worse.

        The damage of j is the sum of min(R_ij, 1) over all i of `tokens`. R_ij is the softmax mass on token j over that
        on token i, under the query of token i.
        """
        total = torch.zeros_like(self._own[others])
        for rows in tokens.split(_TOKENS_AT_ONCE):
            total += self.on(rows, others).clamp_max_(1.0).sum(0)
        return total

    def pairs(self, members: Tensor) -> Tensor:
        """Return the softmax weights (G, G) of each member's query on every member of a stream.

        `members` (G,) are the tokens of the stream. The softmax also counts the further tokens `beyond`, so that the
        weights of a query sum to at most 1.
        """
        pull = self.on(members, members)
        pull.fill_diagonal_(1.0)
        return pull / (pull.sum(1) + self.beyond[members]).unsqueeze(1)


class Candidate(NamedTuple):
    """Hold a proposed stream of tokens, each read by one query, and the estimated read floor of this stream.

    tokens  (G,) in the order of decoding: Bob, the receiver in the proof, reconstructs their hidden values in this
            order
    q       (G, d), the query that reads each token
    bits    estimated floor, in bits
    """

    tokens: Tensor
    q: Tensor
    bits: float


class Spread:
    """Search keys (n, d), float32, for streams in which a query per token reveals the token's hidden value.

    A query reveals a value, or reads the token, if its answer shows which of several possible numbers the value is.
    `candidates` yields the streams found. The tokens of a stream are its members. They are kept in the order of
    decoding, in which the receiver of the proof (Bob) reconstructs their values.
    radius          greatest length of a query
    scale, softcap  define the logits
    beyond          log-sum-exp of every query's logits on further tokens, or None
    demand          accuracy required of an answer: the largest error, for values in [-1, 1], and the probability to
                    keep within it
    look            is called again and again, and may raise an error to end the search
    """

    def __init__(
        self, k: Tensor, radius: float, scale: float, softcap: float | None, beyond: float | None, demand: Demand,
        look: Callable[[], None] = unwatched,
    ) -> None:  # fmt: skip
        self.k, self.demand, self._look = k, demand, look
        self._law = (scale, softcap, beyond)
        self._radius = radius
        self._all = torch.arange(k.shape[0], device=k.device)

    def candidates(self) -> Iterator[Candidate]:
        """Yield one or two proposed streams with their estimated floors; the caller computes the true floor of each.

        For up to 4,096 tokens, one stream is yielded, the better of two. Both are grown by trying the tokens one by
        one, each in another order.
        For more tokens, up to two streams are yielded:
            first  the tokens that seem readable while all tokens are in the stream, if they are at least 90 % of all. A
                   sample of at most 1,024 tokens, evenly spaced, is used for this estimate
            last   always, a stream grown by trying tokens one by one against all members so far. It leaves out
                   near-duplicates, which the estimate can miss
        """
        pull = self._pull(self._all, None)
        sample = thinned(self._all)
        load = pull.load(self._all, sample) * (len(self._all) / len(sample))
        if len(self._all) <= FEW:
            yield self._best(pull, (load.argsort(), pull.damage(sample, self._all).argsort()))
            return
        fine = joining_bits(self.demand, load, pull.beyond) > 0.0
        if float(fine.double().mean()) >= _NEARLY_ALL:
            tokens = load.argsort()
            tokens = tokens[fine[tokens]]
            own = 1.0 / (1.0 + load[tokens] + pull.beyond[tokens])
            bits = float(self.demand.bits(own, own * load[tokens] / 2.0).sum())
            yield Candidate(tokens, pull.q[tokens], bits)
        yield self._best(pull, (load.argsort(),))

    def _best(self, pull: Pull, orders: tuple[Tensor, ...]) -> Candidate:
        """Return the stream with the largest estimated floor, over several orders of trying tokens as members.

        For each of the given `orders`, a stream is grown by adding tokens in this order, and then revised in rounds.
        `pull` holds the queries and their ratios R_ij.
        """
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
        """Search for a query per token that reads this token, despite the softmax mass on the tokens `rivals` (r,).

        `rivals` are indices of tokens. Returns a `Pull`, which holds the n queries and computes the ratios R_ij of
        softmax masses under them. `first` (n, d) holds queries to improve on, or is None.
        """
        scale, softcap, beyond = self._law
        q = with_rivals(self.k, rivals, self._radius, scale, softcap, beyond, first, self._look)
        return Pull(q, self.k, scale, softcap, beyond, self._look)

    def _revisions(self, pull: Pull, members: Tensor) -> Iterator[Candidate]:
        """Revise a stream with the given `members` in rounds, and yield each version with its estimated floor.

        Each round reorders the members, drops members that cost more bits than they add, searches new queries against
        the remaining members, and adds further tokens.
        """
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
        """Arrange the members of a stream in a good order of decoding; return (estimated floor in bits, members).

        For up to 4,096 members, the better of two orders is returned, by the estimated floor. One is the given order.
        The other begins with the members that would cost the others most bits if decoded late. More members are sorted
        by their loads, the least first. A member's load is the softmax mass of its query on other members, divided by
        that on itself. It is estimated from a sample of the members.
        """
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
        """Extend a stream of `members`: try other tokens in the given order, and add those that a query can still read.

        A query can read a token if the answer gives bits of the token's hidden value. Returns all members in the order
        of decoding, in which hidden values are reconstructed. The added tokens come before the given members, the last
        one added first.
        """
        new = torch.ones_like(self._all, dtype=torch.bool)
        new[members] = False
        for part in order[new[order]].split(_TOKENS_AT_ONCE):
            load, beyond = pull.load(part, members), pull.beyond[part]
            alone = joining_bits(self.demand, load, beyond) > 0.0
            part, load, beyond = part[alone], load[alone], beyond[alone]
            accepted = joined(self.demand, load, beyond, pull.on(part, part).tril(-1))
            members = torch.cat([part[accepted].flip(0), members])
        return members
