"""Improving a choice of groups on a dense matrix of weights: reorder, prune, hand tokens over, repeat.

The promise of a group is log2(1 + w / (error + l)), a smooth stand-in for log2 L, with w its weight and l the weight
that its query puts on groups decoded later.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvfloor.floors.measured.levels import Demand

_ROUNDS = 10
_PATIENCE = 2  # rounds without a gain of more than a thousandth end the improvement
_WORTHWHILE = 1.001
_PRUNINGS = 40
_GAIN = 1e-3  # bits that dropping a group must gain


class Choice(NamedTuple):
    """Who reads what: queries in the order of decoding (G,), and for every token (n,) its query, or -1."""

    order: Tensor
    reader: Tensor


def promised(pairs: Tensor, demand: Demand) -> Tensor:
    """Bits of each group (G,) from the weight (G, G) of query j on group k, both in the order of decoding."""
    return demand.bits(pairs.diagonal(), pairs.triu(1).sum(1))


def pair_weights(weights: Tensor, reader: Tensor) -> Tensor:
    """Weight (M, M) of query j on the tokens that query k reads; weights (M, n), reader (n,) in [-1, M)."""
    count, n = weights.shape
    column = torch.where(reader < 0, count, reader)
    member = weights.new_zeros(n, count + 1).scatter_(1, column.unsqueeze(1), 1.0)
    return weights @ member[:, :count]


def improved(weights: Tensor, choice: Choice, demand: Demand, rounds: int) -> tuple[float, Choice]:
    """The best choice on the way of at most `rounds` rounds, and its bits.

    Queries without a group may stand in `choice.order`: tokens may be handed to them.
    """
    order, reader = choice
    best, most = Choice(order[:0], reader), 0.0
    if len(order) == 0:
        return most, best
    idle = 0
    for _ in range(min(rounds, _ROUNDS)):
        before, pairs = most, pair_weights(weights, reader)
        orders = [order, order[by_damage(pairs[order][:, order], demand)]]
        orders = orders[:1] if torch.equal(*orders) else orders
        for tried in orders:
            kept = tried[pruned(pairs[tried][:, tried], demand)]
            bits = float(promised(pairs[kept][:, kept], demand).sum())
            if bits > most:
                best, most = Choice(kept, reader), bits
        idle = idle + 1 if most <= before * _WORTHWHILE else 0
        last = order, reader
        order = max(orders, key=lambda tried: float(_smooth(pairs[tried][:, tried], demand)))
        reader = _handed_over(weights, order, pairs[order][:, order], demand)
        if idle == _PATIENCE or (torch.equal(order, last[0]) and torch.equal(reader, last[1])):
            break
    return most, best


def by_damage(pairs: Tensor, demand: Demand) -> Tensor:
    """An order of decoding (G,): first those that would cost the others most if they came later.

    Group k is worth asking before group j by log2(1 + pairs_jk / c_j), which j loses otherwise, c_j = error + half of
    what query j puts on other groups; groups are sorted by what they cost less what they suffer.
    """
    others = pairs - torch.diag(pairs.diagonal())
    cost = torch.log2(1.0 + others / (demand.error + 0.5 * others.sum(1, keepdim=True)))
    return torch.argsort(cost.sum(0) - cost.sum(1), descending=True, stable=True)


def pruned(pairs: Tensor, demand: Demand) -> Tensor:
    """Places (in the order of decoding) of the groups that stay when those that cost more than they give are dropped.

    A dropped group's values are 0: it leaks no more. Groups too faint to be read even without a leak go first, then the
    worst half of the groups without bits, then the worst quarter of those whose absence gains bits, again and again.
    """
    places = (demand.bits(pairs.diagonal(), torch.zeros_like(pairs[:, 0])) > 0.0).nonzero()[:, 0]
    for _ in range(_PRUNINGS):
        inside = pairs[places][:, places]
        own, after = inside.diagonal(), inside.triu(1)
        leak = after.sum(1)
        bits = demand.rough_bits(own, leak)
        spared = (leak.unsqueeze(1) - after).clamp_min_(0.0)  # leak of query j without group k
        without = demand.rough_bits(own.unsqueeze(1), spared).sub_(bits.unsqueeze(1))
        gain = without.triu_(1).sum(0) - bits
        empty = bits == 0.0
        harmful = empty if bool(empty.any()) else gain > _GAIN
        if not bool(harmful.any()):
            break
        worst = torch.argsort(gain.masked_fill(~harmful, -torch.inf), descending=True)
        share = 2 if bool(empty.any()) else 4
        stays = torch.ones_like(harmful)
        stays[worst[: max(1, int(harmful.sum()) // share)]] = False
        places = places[stays]
    return places


def _smooth(pairs: Tensor, demand: Demand) -> Tensor:
    return torch.log2(1.0 + pairs.diagonal() / (demand.error + pairs.triu(1).sum(1))).sum()


def _handed_over(weights: Tensor, order: Tensor, pairs: Tensor, demand: Demand) -> Tensor:
    """For every token the query (n,) that should read it, or -1, by the promise linearised at the present choice.

    Under query g a token gains its weight times d promise / d w_g, and costs every query before g its weight there
    times -d promise / d l.
    """
    own, noise = pairs.diagonal(), demand.error + pairs.triu(1).sum(1)
    gain = 1.0 / (noise + own)
    cost = own / (noise * (noise + own))
    seen = weights[order]
    paid = seen * cost.unsqueeze(1)
    worth = seen * gain.unsqueeze(1) - (torch.cumsum(paid, 0) - paid)
    value, place = worth.max(0)
    return torch.where(value > 0.0, order[place], -1)
