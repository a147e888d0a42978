"""Bound the softmax weights of groups of tokens, for the read floor, so that rounding errors cannot raise the floor.

The read floor is a lower bound on the bits of a state (the memory of a KV-cache method) that answers queries. In its
proof, values are hidden in the stream, and a receiver (Bob) reconstructs ("decodes") them from the answers, one group
of tokens after the other. Query g reads group g, and groups are numbered in the order of decoding. In shapes, G is the
number of groups, n of keys, and d the width of a key; scale and softcap define the logits.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kvfloor.floors.measured.limit import unwatched
from kvfloor.floors.measured.products import Factors, Rounding, short_products
from kvfloor.logits import capped

_QUERIES_AT_ONCE = TOKENS_AT_ONCE = 512  # a tile that fits the cache, and that bfloat16 products are fast on
_WIDE_UP_TO = 2**32  # multiplications up to which everything is float64
_SHORT_ERROR = 0.15  # largest error of a logit with which bfloat16 is still worth its speed
_DEEPEST = -80.0  # exponents are cut here: below, float32 exponentials turn subnormal and slow
_UNSHIFTED_UP_TO = 60.0  # logits up to this size need no shift before the exponential


def ordered_shares(
    q: Tensor,
    k: Tensor,
    group: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    later_mass: Tensor | None = None,
    look: Callable[[], None] = unwatched,
) -> tuple[Tensor, Tensor]:
    """Bound the softmax weight of each query on its own group of tokens, and on all groups decoded later.

    Returns (weights, leaks), two (G,) float64 in [0, 1], rounded so that the floor cannot rise: `weights` are at most
    the true weights on the own groups. `leaks` are the weights on the later groups; for every c >= 0, the quotient
    weights / (c + leaks) is at most its true value.
    q           (G, d), query g reads group g
    k           (n, d), the keys of the stream
    group       (n,) int64 in [-1, G), the group of each token, -1 for tokens in no group
    later_mass  (G,) float64, log-sum-exp of the logits of query g on tokens outside the stream, or None
    look        is called before every 512 queries, and may raise an error to end the computation
    The softmax runs over all n tokens and those outside. The exponentials of a query's own group are computed in
    float64, those of other tokens in float64 for small inputs, else in bfloat16 or float32. Rounding may have made the
    sums over other tokens too small by a factor, at most exp of a bound on the rounding errors of the logits. They are
    multiplied by this factor.
    """
    count, n, device = q.shape[0], k.shape[0], k.device
    if count == 0:
        return torch.zeros(0, dtype=torch.float64, device=device), torch.zeros(0, dtype=torch.float64, device=device)
    order = torch.argsort(group, stable=True)  # tokens of no group first, then group by group
    group, k = group[order], k[order]
    first = torch.searchsorted(group, torch.arange(count + 1, device=device)).tolist()  # where each group starts

    factors, rounding = factors_for(q, k, scale, softcap)
    own_each = own_logits(q, k, group, first[0], scale, softcap)
    members = group[first[0] :]
    top = torch.full((count,), -torch.inf, dtype=torch.float64, device=device)
    top = top.scatter_reduce(0, members, own_each, "amax").nan_to_num(neginf=0.0)
    shift = torch.where(rounding.reach <= _UNSHIFTED_UP_TO, 0.0, top).float().double()
    own = torch.zeros_like(top).index_add(0, members, torch.exp(own_each - shift[members]))

    shifted = bool((shift != 0.0).any())
    before, after = torch.zeros_like(top), torch.zeros_like(top)
    for start in range(0, count, _QUERIES_AT_ONCE):
        look()
        stop = min(count, start + _QUERIES_AT_ONCE)
        asked = slice(start, stop)
        for low, high in _pieces(first[start], first[stop], n):
            mass = exponentials(factors.logits(asked, slice(low, high)), shift[asked] if shifted else None)
            if high <= first[start]:
                before[asked] += mass.sum(1).double()
            elif low >= first[stop]:
                after[asked] += mass.sum(1).double()
            else:
                here, mine = group[low:high], torch.arange(start, stop, device=device).unsqueeze(1)
                before[asked] += (mass * (here < mine)).sum(1).double()
                after[asked] += (mass * (here > mine)).sum(1).double()

    beyond = torch.zeros_like(top) if later_mass is None else torch.exp(later_mass.to(device) - shift)
    return rounded_shares(Masses(own, before, after, beyond), rounding, factors, n, TOKENS_AT_ONCE)


class Masses(NamedTuple):
    """Hold sums of exponentials of each query's logits, each less a shift of the query's own: four (G,) float64.

    own     over the query's own group, computed in float64
    before  over all other tokens of the stream but those decoded later, in the precision of the logits
    after   over the groups decoded later, in the same precision
    beyond  over tokens outside the stream
    """

    own: Tensor
    before: Tensor
    after: Tensor
    beyond: Tensor


def rounded_shares(masses: Masses, rounding: Rounding, factors: Factors, n: int, terms: int) -> tuple[Tensor, Tensor]:
    """Return (weights, leaks) of each query, as `ordered_shares` does, from sums of exponentials.

    n is the number of tokens of the stream. `terms` is the largest number of exponentials that were added in the
    precision of `factors`, before the sums went on in float64. Exponents below _DEEPEST may have been raised to it.
    """
    wide = torch.finfo(torch.float64).eps / 2.0
    slack = torch.exp(rounding.of_sums(factors.sum_unit, terms))
    cut = n * torch.exp(torch.as_tensor(_DEEPEST, dtype=torch.float64))  # what cutting exponents may have added
    own = masses.own * (1.0 - wide * ((factors.k.shape[1] + 8.0) * rounding.reach + n + 16.0))
    before, after = slack * (masses.before + cut), slack * (masses.after + cut)
    total = own + masses.beyond + before + after
    weights, leaks = own / total, after / total
    readable = torch.isfinite(weights) & torch.isfinite(leaks)
    return torch.where(readable, weights, 0.0), torch.where(readable, leaks, 1.0)


def factors_for(q: Tensor, k: Tensor, scale: float, softcap: float | None) -> tuple[Factors, Rounding]:
    """Round queries and keys, whose products are the logits, to the shortest precision that suffices.

    Returns two objects. `Factors` holds the rounded queries (times `scale`), the rounded keys and the softcap.
    `Rounding` holds two bounds per query: on the error of the logits computed from `Factors`, and on the absolute value
    of the true logits. Small inputs use float64. Larger ones may use float32 or bfloat16 where torch allows it,
    bfloat16 only if its rounding error is small enough.
    """
    allowed = [torch.float64]
    if len(q) * k.numel() > _WIDE_UP_TO:
        if torch.get_float32_matmul_precision() == "highest":
            allowed.insert(0, torch.float32)
        if short_products(k.device):
            allowed.insert(0, torch.bfloat16)
    for dtype in allowed:
        factors = Factors.of(q, k, scale, softcap, dtype)
        rounding = Rounding.of(factors, q, k, scale)
        if dtype != torch.bfloat16 or float(rounding.error.max()) <= _SHORT_ERROR:
            break
    return factors, rounding


def exponentials(logits: Tensor, shift: Tensor | None) -> Tensor:
    """Return exp(logits - shift) (b, t), computed in place, for a shift (b,) of each query; None: no shift.

    Shifted logits below _DEEPEST are raised to it.
    """
    if shift is not None:
        logits.sub_(shift.to(logits.dtype).unsqueeze(1)).clamp_min_(_DEEPEST)
    return logits.exp_()


def own_logits(q: Tensor, k: Tensor, group: Tensor, start: int, scale: float, softcap: float | None) -> Tensor:
    """Return the logit of every token from `start` on under the query of the token's own group: (t,), float64.

    group (n,) is the group of each token of k (n, d); row g of q (G, d) is the query of group g.
    """
    parts = [k.new_zeros(0, dtype=torch.float64)]
    for low in range(start, k.shape[0], TOKENS_AT_ONCE):
        here = slice(low, low + TOKENS_AT_ONCE)
        product = (q[group[here]].double() * k[here].double()).sum(1) * scale
        parts.append(capped(product, softcap))
    return torch.cat(parts)


def _pieces(inside: int, beyond: int, n: int) -> list[tuple[int, int]]:
    """Cut n tokens, sorted by group, into index ranges of bounded length; return them as pairs (low, high).

    Index high is excluded. The tokens `inside` .. `beyond` - 1 are those of the groups that a few consecutive queries
    read. Each range lies entirely before these tokens (in groups decoded earlier), within them, or after them (decoded
    later).
    """
    pieces = []
    for low, high in ((0, inside), (inside, beyond), (beyond, n)):
        pieces += [(at, min(high, at + TOKENS_AT_ONCE)) for at in range(low, high, TOKENS_AT_ONCE)]
    return pieces
