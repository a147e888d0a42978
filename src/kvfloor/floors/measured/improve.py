"""Improve a choice of token groups, each read by one query, given all softmax weights of the queries on the tokens.

The choice serves the read floor, a lower bound on the bits of a state (the memory of a KV-cache method) that answers
the queries. In its proof, values are hidden in the stream, and a receiver (Bob) reconstructs ("decodes") them from the
answers to the queries.
    group   tokens that share one hidden row of values, read by one query
    order   Bob decodes one group after the other. From each answer he subtracts the contribution of the groups already
            decoded, so that these no longer disturb it
    weight  softmax weight w that the query of a group puts on the group
    leak    softmax weight l that the query of a group puts on all groups decoded later
    levels  number L of values that Bob can tell apart in a group
    demand  the accuracy required of answers; demand.error is the allowed error of an answer, not counting the leak
    pairs   matrix (G, G), G the number of groups: entry (j, k) is the softmax weight of the query of group j on group
            k, groups in the order of decoding
Each round reorders the groups, drops groups, and assigns tokens anew to queries. This is to raise the sum over groups
of log2(1 + w / (error + l)), a smooth approximation of the bits log2 L of a group.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvfloor.floors.measured.levels import Demand

_ROUNDS = 10
_PATIENCE = 2  # so many rounds in a row without a gain of more than a thousandth end the improvement
_WORTHWHILE = 1.001
_PRUNINGS = 40
_GAIN = 1e-3  # bits that dropping a group must gain


class Choice(NamedTuple):
    """Hold a choice of token groups: for each token the query that reads it, and the order in which groups are decoded.

    order   (G,) indices of queries, one per group: Bob decodes the groups (reconstructs their hidden values) in this
            order
    reader  (n,) index of the query that reads each token, -1 for none; the tokens of one query are its group
    """

    order: Tensor
    reader: Tensor


def promised(pairs: Tensor, demand: Demand) -> Tensor:
    """Return the bits (G,) that each group adds to the read floor, if the softmax weights `pairs` are exact.

    pairs (G, G) holds the softmax weight of query j on group k, groups in the order of decoding. The weight of a query
    on the groups decoded later counts as its leak: an error of the answer, caused by their hidden values.
    """
    return demand.bits(pairs.diagonal(), pairs.triu(1).sum(1))


def pair_weights(weights: Tensor, reader: Tensor) -> Tensor:
    """Return a matrix (M, M): entry (j, k) is the softmax weight of query j on all tokens that query k reads, together.

    weights (M, n) are the softmax weights of the M queries on the n single tokens. reader (n,) holds the query, as an
    index 0..M-1, that reads each token, -1 for none.
    """
    count, n = weights.shape
    column = torch.where(reader < 0, count, reader)
    member = weights.new_zeros(n, count + 1).scatter_(1, column.unsqueeze(1), 1.0)
    return weights @ member[:, :count]


def improved(weights: Tensor, choice: Choice, demand: Demand, rounds: int) -> tuple[float, Choice]:
    """Improve a choice of groups in at most min(`rounds`, 10) rounds; return (estimated bits, choice) of the best one.

    weights (M, n) are the softmax weights of the M queries on all n tokens. `choice.order` may contain queries that
    read no token yet; tokens may be assigned to them. The bits are those of the read floor, estimated from `weights` as
    if these had no rounding errors.
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
    """Return a good order of decoding (G,): it begins with the groups that would disturb others most if decoded late.

    The order is given as indices of groups. Bob decodes (reconstructs the hidden values of) one group after the other,
    and a decoded group no longer disturbs later answers. pairs (G, G) holds the softmax weight pairs_jk of query j on
    group k. Let c_j be the allowed error plus half of the weight that query j puts on other groups. If group k is
    decoded after group j, it costs group j about log2(1 + pairs_jk / c_j) bits. Groups are sorted by the bits that they
    cost others minus the bits that others cost them, largest first.
    """
    others = pairs - torch.diag(pairs.diagonal())
    cost = torch.log2(1.0 + others / (demand.error + 0.5 * others.sum(1, keepdim=True)))
    return torch.argsort(cost.sum(0) - cost.sum(1), descending=True, stable=True)


def pruned(pairs: Tensor, demand: Demand) -> Tensor:
    """Drop the groups that cost other groups more bits than they add; return the positions (m,) of the groups kept.

    Positions are indices into pairs (G, G), which holds the softmax weight of query j on group k, groups in the order
    of decoding. The tokens of a dropped group get the value 0, so that it disturbs no answer.
    First, groups whose weight is too small to be read even without a leak are dropped. Then groups are dropped in
    rounds, by their harm: the bits that the other groups would gain without the group, minus the group's own bits.
        if some groups add no bits  a round drops half of these groups, the more harmful half
        if all groups add bits      a round drops a quarter of the groups of positive harm, the most harmful ones
    The rounds end when there is nothing to drop, or after a fixed number.
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
    """Choose for each token the query that should read it, by a linear estimate of the bits gained.

    Returns the queries' indices (n,), -1 where no query should read the token.
    weights  (M, n), softmax weight of each query on each token
    order    (G,), indices of queries, one per group, in the order of decoding
    pairs    (G, G), softmax weights of these queries on the groups
    Let w_g be the weight of query g on its own group, and l_g its leak, i.e. its weight on groups decoded later. The
    bits are estimated as F, the sum over groups g of log2(1 + w_g / (error + l_g)).
    Law: let each query h put weight a_h on a token. If query g reads the token, F changes to first order by a_g dF/dw_g
    plus a sum: that of a_h dF/dl_h over the queries h decoded before g. The sum is negative: it is the cost of the
    leak. A token goes to the query of the largest change, or to none if no change is positive.
    """
    own, noise = pairs.diagonal(), demand.error + pairs.triu(1).sum(1)
    gain = 1.0 / (noise + own)
    cost = own / (noise * (noise + own))
    seen = weights[order]
    paid = seen * cost.unsqueeze(1)
    worth = seen * gain.unsqueeze(1) - (torch.cumsum(paid, 0) - paid)
    value, place = worth.max(0)
    return torch.where(value > 0.0, order[place], -1)
