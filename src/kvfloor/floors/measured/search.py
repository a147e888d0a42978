"""Search groups of tokens, the query that reads each group, and their order of decoding, for `readable_by`.

`readable_by` computes the read floor, a lower bound on the bits of a state (the memory of a KV-cache method) that
answers given queries. In its proof, values are hidden in the stream, and a receiver (Bob) reconstructs ("decodes") them
from the answers, one group of tokens after the other.
    group           tokens that share one hidden row of values, read by one query
    weight          softmax weight of a query on a token or on its group
    leak            softmax weight that the query of a group puts on groups that Bob decodes later
    near tokens     tokens on which a query's weight is at least a given share (such as 0.2) of its largest weight
    demand          the accuracy required of answers (`Demand`)
    sight           the object that computes the queries' softmax weights on tokens (`Sight`)
    estimated bits  the floor that a choice of groups would give, before rounding is accounted for
The search only proposes groups. Any disjoint groups in any order give a valid floor, which `readable.py` computes from
weights that it bounds again. So the search decides the size of the floor, never its validity. Groups depend on keys and
queries only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kvfloor.floors.measured.improve import Choice, improved
from kvfloor.floors.measured.levels import Demand
from kvfloor.floors.measured.limit import unwatched
from kvfloor.floors.measured.products import Factors, rough_dtype

_KEPT_WEIGHTS = 2**25  # queries x tokens up to which the weights stay in memory
_WIDE_UP_TO = 2**22  # and up to which they are float64
_RANKED_UP_TO = 2**28  # up to which queries are ranked before any is chosen
_IMPROVED_UP_TO = 2**23  # up to which a choice is improved
_THOROUGH_UP_TO = 2**21  # and up to which from several starts
_WORK = 2**27  # weights looked at while improving, about
_POOL = 256  # up to so many queries, all of them take part in the improvement
_QUERIES_AT_ONCE = 128
_SAMPLED_QUERIES = 1024
NEARNESS = (0.5, 0.2, 0.05, 0.0)  # a token belongs to a query's group from this share of its largest weight on
_ENOUGH = 1.001  # the search ends within a thousandth of the most bits possible
_PASSES = 16  # most iterations of `settled`


@dataclasses.dataclass(frozen=True)
class Block:
    """Hold the softmax weights of b queries on the n stored tokens, as a product: `softmax` times `share`.

    A query may see further tokens besides the stored ones.
    queries  (b,) indices of the queries
    softmax  (b, n), the softmax over the stored tokens alone
    share    (b,), the share of a query's softmax mass that is on the stored tokens; the rest is on further tokens
    """

    queries: Tensor
    softmax: Tensor
    share: Tensor

    @staticmethod
    def of(queries: Tensor, logits: Tensor, later_mass: Tensor | None) -> Block:
        """Return the block of the `queries` (b,) with the given logits (b, n) on the stored tokens.

        later_mass (b,) is the log-sum-exp of their logits on further tokens, or None.
        """
        softmax = torch.softmax(logits, 1)
        if later_mass is None:
            return Block(queries, softmax, torch.ones_like(logits[:, 0]))
        mass = logits.amax(1) - softmax.amax(1).log()
        return Block(queries, softmax, torch.sigmoid(mass - later_mass.to(logits.dtype)))

    @property
    def weights(self) -> Tensor:
        """Return the weight (b, n) of each query on each stored token, in the softmax over all tokens that it sees."""
        return self.softmax * self.share.unsqueeze(1)

    def near(self, share: float) -> Tensor:
        """Mark the tokens (b, n), bool, on which a query's weight is at least `share` of its largest weight."""
        return self.softmax >= share * self.softmax.amax(1, keepdim=True)

    def at(self, places: Tensor) -> Block:
        """Return a block with c of this block's queries only, those at the indices `places` (c,) within the block."""
        return Block(self.queries[places], self.softmax[places], self.share[places])


class Sight:
    """Compute the softmax weights of m queries on n stored tokens, in a precision that is good enough for the search.

    scale and softcap define the logits of queries q (m, d) on keys k (n, d). later_mass (m,) is the log-sum-exp of each
    query's logits on further tokens that it sees, or None. `look` is called before every batch of queries, and may
    raise an error to end the search.
    """

    def __init__(
        self, q: Tensor, k: Tensor, scale: float, softcap: float | None, later_mass: Tensor | None,
        look: Callable[[], None] = unwatched,
    ) -> None:  # fmt: skip
        self._look = look
        self.m, self.n, self.device = q.shape[0], k.shape[0], k.device
        size = self.m * self.n
        dtype = torch.float64 if size <= _WIDE_UP_TO else rough_dtype(k.device, size <= _RANKED_UP_TO)
        self._factors, self._later = Factors.of(q, k, scale, softcap, dtype), later_mass
        self._kept = self._made(self.all()) if size <= _KEPT_WEIGHTS else None

    def all(self) -> Tensor:
        """Return the indices of all queries (m,)."""
        return torch.arange(self.m, device=self.device)

    def rows(self, queries: Tensor) -> Block:
        """Return one `Block`: the softmax weights on all stored tokens of the queries at the given indices (b,)."""
        return self._made(queries) if self._kept is None else self._kept.at(queries)

    def blocks(self, queries: Tensor) -> Iterator[Block]:
        """Yield the softmax weights of the queries at the given indices (b,), one `Block` per batch of queries."""
        return (self.rows(part) for part in queries.split(_QUERIES_AT_ONCE))

    def _made(self, queries: Tensor) -> Block:
        self._look()
        later = None if self._later is None else self._later[queries]
        return Block.of(queries, self._factors.logits(queries, slice(None)), later)


def find_groups(sight: Sight, demand: Demand) -> Choice:
    """Return the choice of token groups, queries and order of decoding with the largest estimated read floor.

    Several searches are made, which differ in the share that defines near tokens, and the best result is returned. It
    has no groups if no query can read any token. `sight` gives the softmax weights, and `demand` is the accuracy
    required of the answers.
    """
    small = sight.m * sight.n <= _RANKED_UP_TO
    last = torch.full((sight.n,), -1, device=sight.device)
    best, most = Choice(sight.all()[:0], last), 0.0
    for share in NEARNESS if small else NEARNESS[:1]:
        bits, choice = _grown(sight, demand, share, _ranked(sight, demand, share) if small else sight.all())
        if bool((choice.reader == last).all()):
            continue
        last = choice.reader
        pool = sight.all() if sight.m <= _POOL else choice.order
        found = [(bits, choice)]
        if 0 < len(pool) * sight.n <= _IMPROVED_UP_TO:
            found += _improved(sight, demand, choice, pool)
        for bits, choice in found:
            if bits > most:
                best, most = choice, bits
        if most * _ENOUGH >= min(sight.m, sight.n) * demand.ceiling:
            break
    return best


def _improved(sight: Sight, demand: Demand, choice: Choice, pool: Tensor) -> Iterator[tuple[float, Choice]]:
    """Improve a choice of groups from up to three starts; yield (estimated bits, improved choice) of each start.

    `pool` holds the indices of the queries that may read tokens. A start is an order of decoding of queries of the
    pool. It has the groups of `choice` in their order. The queries of the pool that have no group yet come before them,
    or after them, or are left out.
    """
    weights = sight.rows(pool).weights
    place = torch.full((sight.m + 1,), -1, device=sight.device)
    place[pool] = torch.arange(len(pool), device=sight.device)
    reader, order = place[choice.reader], place[choice.order]
    rest = torch.ones(len(pool), dtype=torch.bool, device=sight.device)
    rest[order] = False
    others = rest.nonzero()[:, 0]
    starts = [torch.cat([others, order])]
    if len(others) and weights.numel() <= _THOROUGH_UP_TO:
        starts += [torch.cat([order, others]), order]
    rounds = max(2, _WORK // (len(starts) * len(NEARNESS) * weights.numel()))
    for start in starts:
        bits, found = improved(weights, Choice(start, reader), demand, rounds)
        yield bits, Choice(pool[found.order], torch.where(found.reader < 0, -1, pool[found.reader]))


def _ranked(sight: Sight, demand: Demand, share: float) -> Tensor:
    """Rank the queries, best first, by how little other queries attend to the tokens that a query would read.

    Returns the queries' indices (m,). A query would read its near tokens, those with at least `share` of its largest
    weight. Let w be the weight that the query puts on these tokens. Let u be the total weight that all other queries
    put on them, estimated from a sample of the queries. The score of the query is w / (u + error), where error is the
    allowed error of an answer.
    """
    step = max(1, sight.m // _SAMPLED_QUERIES)
    asked = sum(block.share @ block.softmax for block in sight.blocks(sight.all()[::step])) * float(step)
    score = []
    for block in sight.blocks(sight.all()):
        near = block.near(share).to(block.softmax.dtype)
        own = (block.softmax * near).sum(1) * block.share
        score.append(own / ((near @ asked - own).clamp_min(0.0) + demand.error))
    return torch.argsort(torch.cat(score), descending=True, stable=True)


def _grown(sight: Sight, demand: Demand, share: float, candidates: Tensor) -> tuple[float, Choice]:
    """Form groups greedily: each query of `candidates` in turn reads its near tokens that no other query reads yet.

    Returns (estimated bits, choice). `candidates` holds indices of queries; queries whose group would add no bits are
    skipped. Near tokens have at least `share` of the query's largest weight. Bob decodes the groups in reverse: the
    group formed first is decoded last. So a new group is decoded before all groups so far, and adds no leak to them.
    """
    reader = torch.full((sight.n,), -1, device=sight.device)
    chosen, promise = [candidates[:0]], 0.0
    for block in sight.blocks(candidates):
        new = formed(block, reader >= 0, demand, share)
        queries = block.queries[new.places]
        reader[new.tokens] = queries[new.member]
        chosen.append(queries)
        promise += new.bits
    return promise, Choice(torch.cat(chosen).flip(0), reader)


class Formed(NamedTuple):
    """Hold the a groups that were formed from one block of queries, in the order in which they were formed.

    places  (a,) the query of each group, an index within the block
    tokens  (t,) the tokens of all these groups
    member  (t,) the group of each of these tokens, in 0..a-1
    bits    the bits that these groups add, estimated
    """

    places: Tensor
    tokens: Tensor
    member: Tensor
    bits: float


def formed(block: Block, taken: Tensor, demand: Demand, share: float) -> Formed:
    """Form groups from one block: each query in turn reads its near tokens that no earlier query reads.

    taken (n,), bool, marks the tokens that are in groups already. Near tokens have at least `share` of a query's
    largest weight. A group is formed only if it adds bits while all groups formed so far are decoded after it.
    For speed, all queries are handled at once, by `settled`.
    """
    near = block.near(share) & ~taken
    tokens = near.view(torch.uint8).amax(0).nonzero()[:, 0]  # faster than any() along the first axis
    leak = (block.softmax @ taken.to(block.softmax.dtype)) * block.share
    weights, near = block.softmax[:, tokens] * block.share.unsqueeze(1), near[:, tokens]
    own = (weights * near).sum(1)
    places = (demand.bits(own, leak) > 0.0).nonzero()[:, 0]
    if len(places) == 0:
        return Formed(places, tokens[:0], tokens[:0], 0.0)
    weights, near, own, leak = (x[places] for x in (weights, near, own, leak))
    member = near.to(weights.dtype).T
    lost, leaked = ((weights * near) @ member).tril(-1), (weights @ member).tril(-1)

    def added(accepted: Tensor) -> Tensor:
        earlier = accepted.to(weights.dtype)
        return demand.bits((own - lost @ earlier).clamp_min(0.0), leak + leaked @ earlier)

    accepted, bits = settled(added, len(places), places.device)
    if not bool(accepted.any()):
        return Formed(places[:0], tokens[:0], tokens[:0], 0.0)
    near = near[accepted]
    read = near.any(0)
    return Formed(places[accepted], tokens[read], near.to(torch.uint8).argmax(0)[read], float(bits[accepted].sum()))


def settled(added: Callable[[Tensor], Tensor], a: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Accept those of a candidates that add bits, where what one adds depends on which earlier ones are accepted.

    added  returns the bits (a,) that each candidate adds if those marked in a mask (a,) are accepted
    All are taken for accepted first. Then the mask is computed again until nothing changes, at most a fixed number of
    times. Returns the mask (a,), bool, and the bits (a,) computed last.
    """
    accepted = torch.ones(a, dtype=torch.bool, device=device)
    bits = torch.zeros(a, dtype=torch.float64, device=device)
    for _ in range(_PASSES):
        bits = added(accepted)
        if bool(((bits > 0.0) == accepted).all()):
            break
        accepted = bits > 0.0
    return accepted, bits


def joining_bits(demand: Demand, load: Tensor, beyond: Tensor) -> Tensor:
    """Return the bits (t,) that each token would add to the floor if it joined a stream of read tokens.

    Both are softmax masses of a token's own query, divided by its mass on this token:
    load    (t,) the mass on the members that are decoded after the token
    beyond  (t,) the mass on tokens outside the stream
    """
    own = 1.0 / (1.0 + load + beyond)
    return demand.bits(own, own * load)


def joined(demand: Demand, load: Tensor, beyond: Tensor, inside: Tensor) -> Tensor:
    """Let tokens join a stream of read tokens in turn, each decoded before all so far, if it adds bits.

    load, beyond  as in `joining_bits`, for the members so far
    inside        (t, t) the mass of each token's query on the tokens before it in turn, 0 elsewhere
    Returns a mask (t,), bool, of the tokens that join.
    """

    def added(accepted: Tensor) -> Tensor:
        return joining_bits(demand, load + inside @ accepted.to(inside.dtype), beyond)

    return settled(added, len(load), load.device)[0]
