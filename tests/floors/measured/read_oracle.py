"""Compute the read floor a second time, in float64 and by definition: weights, worst answers, all choices."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from kvfloor.floors.measured import Demand, Readable


def weights(q: Tensor, k: Tensor, scale=1.0, softcap=None, later_mass=None) -> Tensor:
    """Compute the softmax weights (m, n) by definition, one query at a time."""
    rows = []
    for i, query in enumerate(q.double()):
        logits = scale * (k.double() * query).sum(1)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        extra = [] if later_mass is None else [later_mass.double()[i : i + 1]]
        rows.append(torch.softmax(torch.cat([logits, *extra]), 0)[: len(k)])
    return torch.stack(rows)


def pairs(found: Readable, k: Tensor) -> Tensor:
    """Return the weights (G, G) of query g on group h."""
    if found.groups == 0:
        return torch.zeros(0, 0, dtype=torch.float64)
    seen = weights(found.queries, k[found.stream], found.scale, found.softcap, found.later_mass)
    return torch.stack([seen[:, found.group == h].sum(1) for h in range(found.groups)], 1)


def holds(found: Readable, k: Tensor) -> bool:
    """Return True if a floor's weights and leaks are the true ones, its levels are allowed and its bits their sum.

    It applies to floors that were computed in float64.
    """
    between, demand = pairs(found, k), found.demand
    own, leak = between.diagonal(), between.triu(1).sum(1)
    bounds = (found.weights - own).abs().le(1e-9 * own) & (found.leaks - leak).abs().le(1e-9 * leak + 1e-12)
    condition = (found.levels - 1) * (demand.eta + leak) < own * (1 + 1e-10)
    entropy = -demand.p * math.log2(demand.p) - (1 - demand.p) * math.log2(1 - demand.p) if demand.p < 1 else 0.0
    bits = sum(max(0.0, demand.p * demand.dv * math.log2(level) - entropy) for level in found.levels.tolist())
    return bool(bounds.all()) and bool(condition.all()) and math.isclose(bits, found.bits, rel_tol=1e-9, abs_tol=1e-9)


def survives(found: Readable, k: Tensor) -> bool:
    """Return True if every group's level can be decoded from the worst answers that err by at most eta.

    In the worst case all groups decoded later have the value -1, or all have 1, and the answer errs by eta to the same
    side. Groups decoded earlier are known; both ends are tried for them too. The tried levels are the lowest one, the
    highest one and one between them.
    """
    between, eta = pairs(found, k), found.demand.eta
    for g, side, known in itertools.product(range(found.groups), (-1.0, 1.0), (-1.0, 1.0)):
        top = int(found.levels[g]) - 1
        for level in {0, top, top // 2}:
            values = torch.full((found.groups,), side, dtype=torch.float64)
            values[:g] = known
            values[g] = 2.0 * level / top - 1.0
            answer = float(between[g] @ values) + side * eta
            own = float(between[g, g])
            rest = answer - float(between[g, :g].sum()) * known
            if own == 0.0 or round((rest / own + 1.0) * top / 2.0) != level:
                return False
    return True


def best_by_all_choices(seen: Tensor, demand: Demand) -> float:
    """Return the most bits over all assignments of tokens to queries or to none, in all orders: for a few tokens."""
    m, n = seen.shape
    choices = torch.tensor(list(itertools.product(range(-1, m), repeat=n)))
    best = 0.0
    for count in range(1, m + 1):
        for order in itertools.permutations(range(m), count):
            total = torch.zeros(len(choices), dtype=torch.float64)
            member = [(choices == query).double() for query in order]
            for place, query in enumerate(order):
                own = member[place] @ seen[query]
                leak = sum((later @ seen[query] for later in member[place + 1 :]), torch.zeros_like(own))
                total += demand.bits(own, leak)
            best = max(best, float(total.max()))
    return best


def best_within_by_all_choices(k: Tensor, radius: float, demands: list[Demand]) -> list[float]:
    """Return the most bits over all sets of tokens in all orders, with queries of largest weight: for a few tokens."""
    best = [0.0] * len(demands)
    for count in range(1, len(k) + 1):
        for chosen in itertools.combinations(range(len(k)), count):
            seen = largest_weights(k[list(chosen)], radius, steps=100)
            for order in itertools.permutations(range(count)):
                between = seen[list(order)][:, list(order)]
                own, leak = between.diagonal(), between.triu(1).sum(1)
                best = [
                    max(most, float(demand.bits(own, leak).sum())) for most, demand in zip(best, demands, strict=True)
                ]
    return best


def largest_weights(k: Tensor, radius: float, steps: int) -> Tensor:
    """Maximise each token's weight over queries of length <= radius by projected gradient ascent.

    Returns the weights (n, n) of the best queries.
    """
    away = k - k.mean(0)
    query = away * (radius / away.norm(dim=1, keepdim=True).clamp_min(1e-9))
    best, most = query, torch.full((len(k),), -torch.inf, dtype=torch.float64)
    stride = 2.0 / (float(away.square().sum(1).max()) + 1e-9)
    for _ in range(steps):
        seen = torch.log_softmax(query @ k.T, 1)
        better = seen.diagonal() > most
        best, most = torch.where(better.unsqueeze(1), query, best), torch.maximum(most, seen.diagonal())
        query = query + stride * (k - seen.exp() @ k)
        length = query.norm(dim=1, keepdim=True)
        query = torch.where(length > radius, query * radius / length, query)
    return torch.softmax(best @ k.T, 1)
