"""Compute the read floor: a lower bound on the bits of a state that answers queries over given keys.

A state is the memory that a KV-cache method keeps of a stream of tokens. It must answer given queries, or all queries
up to a given length. The proof is a game. Alice hides random values in the stream and sends the state, S bits, to Bob.
Bob asks each query of a copy of the state, and reconstructs the hidden values from the answers. Keys and queries are
public.
    group   tokens that share one hidden row of dv values, read by one query; tokens in no group have value 0
    order   Bob reconstructs ("decodes") the groups one after the other, in a fixed order that has nothing to do with
            the order of the stream; from each answer, he subtracts the contribution of the groups decoded before
    weight  softmax weight that the query of a group puts on the group
    leak    softmax weight that the query of a group puts on all groups decoded later, an error that Bob cannot remove
    levels  number of equally spaced values in [-1, 1] that Bob can tell apart in the group's values
    grain   largest rounding error of a number in [-1, 1] in the values' format (`levels.grain`)
    demand  accuracy required of answers: largest error eta and probability p (`Demand`). It also has the width, the
            format and the most levels of the values
    later_mass   log-sum-exp of a query's logits on tokens outside the stream, which also enter its softmax
Fano's inequality bounds the bits of each group. Groups hide independent rows, so the bits of all groups add up by the
chain rule (docs/floors.md, "Readable tokens").
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from kvfloor.floors.measured.anytime import proved_by_then, renumbered
from kvfloor.floors.measured.directions import towards_each
from kvfloor.floors.measured.inputs import log_masses, logit_law, matrix
from kvfloor.floors.measured.levels import Demand
from kvfloor.floors.measured.limit import Enough, Limit, Stopped, unwatched
from kvfloor.floors.measured.search import Sight, find_groups
from kvfloor.floors.measured.shares import ordered_shares
from kvfloor.floors.measured.spread import Spread
from kvfloor.validation import one_of, positive

OTHERS = ("absent", "present")
Law = tuple[float, float | None]  # scale and softcap of the logits
_SETTLED_UP_TO = 2**32  # groups x tokens x d up to which weights are bounded again once groups without bits are dropped
_SETTLINGS = 4
_KEPT = 0.8  # share of its estimated bits that a candidate must reach to end the search


@dataclasses.dataclass(frozen=True, eq=False)
class Readable:
    """Hold a read floor: after the tokens of `stream`, any method that meets `demand` holds at least `bits` bits.

    `demand` is the accuracy required of answers. Groups of tokens are numbered in the order in which Bob decodes them.
    The module defines group, weight, leak, levels, grain and Bob.
    stream      (n,) int64, the tokens of the stream, as indices into the given keys, in order
    group       (n,) int64, the group of each token of the stream, -1 for tokens whose values are 0
    queries     (G, d), the query that reads each group
    asked       (G,) int64, the source of each query: an index into the given queries, or for `readable_within` the
                token of the given keys for which the query was made
    weights     (G,) float64, softmax weight of query g on group g, rounded down
    leaks       (G,) float64, softmax weight of query g on the groups decoded after g, rounded so that the floor cannot
                rise
    levels      (G,) int64, the number of levels in each group: the largest whole number for which (levels - 1)(eta +
                grain + leak) < weight, eta of `demand`
    later_mass  (G,) float64 or None, log-sum-exp of the logits of query g on tokens outside the stream
    scale, softcap   define the logits: scale q.k, then softcap tanh(logit / softcap) unless softcap is None
    stopped     how far the search came, if a `Limit` stopped it; None: it came to its end
    """

    bits: float
    stream: Tensor
    group: Tensor
    queries: Tensor
    asked: Tensor
    weights: Tensor
    leaks: Tensor
    levels: Tensor
    later_mass: Tensor | None
    scale: float
    softcap: float | None
    demand: Demand
    stopped: Stopped | None = None

    @property
    def n(self) -> int:
        """Return the number of tokens in the stream."""
        return len(self.stream)

    @property
    def groups(self) -> int:
        """Return the number G of groups of tokens, each read by one query."""
        return len(self.levels)

    @property
    def bytes(self) -> int:
        """Return the floor in whole bytes: `bits` / 8, rounded up."""
        return math.ceil(self.bits / 8.0 * (1.0 - 1e-12))

    def as_dict(self) -> dict[str, Any]:
        """Return the floor's numbers as a dict of plain JSON types, name -> number, without the tensors."""
        demand = self.demand
        return {
            "bits": self.bits, "bytes": self.bytes, "n": self.n, "groups": self.groups,
            "grouped_tokens": int((self.group >= 0).sum()), "eta": demand.eta, "p": demand.p, "dv": demand.dv,
            "stopped_after": None if self.stopped is None else self.stopped.weighed,
            "mean_weight": float(self.weights.mean()) if self.groups else None,
            "mean_log2_levels": float(self.levels.double().log2().mean()) if self.groups else None,
        }  # fmt: skip


def readable_by(
    k: Tensor,
    q: Tensor,
    *,
    eta: float,
    dv: int,
    p: float = 0.9,
    scale: float = 1.0,
    softcap: float | None = None,
    later_mass: Tensor | float | None = None,
    dtype: torch.dtype = torch.float32,
    most_levels: int | None = None,
) -> Readable:
    """Return a lower bound on the bits S of a state that answers the queries `q` over the stored keys `k`.

    With probability p, an answer must be within eta of exact attention in each of its dv values, for values in [-1, 1].
    Law: S >= sum over groups g of max(0, p dv log2 L_g - H2(p)). H2 is the binary entropy. weight_g is the softmax
    weight of query g on group g, and leak_g that on groups decoded after g. L_g is the most levels for which (L_g -
    1)(eta + grain + leak_g) < weight_g. The module defines group, decoding and grain. The bound is for the worst
    values, given these keys: it is no claim about recorded values.
    k, q         (n, d) stored keys; (m, d) queries, each of which the state must be able to answer
    later_mass   log-sum-exp of a query's logits on tokens after the stored ones, its own token included: (m,), or one
                 number; None: no such tokens. `causal_mass` computes it from recorded tokens
    scale, softcap   define the logits: scale q.k, then softcap tanh(logit / softcap) unless softcap is None
    dtype        the values' number format
    most_levels  a further cap on L_g, or None
    A search chooses the groups, their queries and their order. Any choice gives a valid floor; a better one, a higher
    floor. Returns a `Readable`: the floor in bits, and the groups and queries that prove it. Raises ValueError naming
    the argument. Source: derived here, docs/floors.md, "Readable tokens".
    """
    k = matrix("k", k)
    q = matrix("q", q, k.shape[1])
    demand, law = Demand(eta, p, dv, dtype, most_levels), logit_law(scale, softcap)
    later = log_masses("later_mass", later_mass, len(q))
    return _read_by(k, q, law, later, demand)


def readable_within(
    k: Tensor,
    *,
    radius: float,
    eta: float,
    dv: int,
    p: float = 0.9,
    scale: float = 1.0,
    softcap: float | None = None,
    others: str = "absent",
    later_mass: float | None = None,
    dtype: torch.dtype = torch.float32,
    most_levels: int | None = None,
    limit: Limit | None = None,
) -> Readable:
    """Return a lower bound on the bits of a state that answers all queries of length at most `radius` over keys of `k`.

    k (n, d) holds the keys from which the stream is made. With probability p, an answer must be within eta of exact
    attention in each of its dv values, for values in [-1, 1]. A search finds queries within the radius, and the bound
    is computed from these as in `readable_by`. `others` says whether keys that no query reads are in the stream:
        "absent"   the floor is for a stream of only those tokens that some query reads: fewer than the given keys
        "present"  all given keys are in the stream, with value 0 where they are not read. Near-duplicates, which no
                   query tells apart, are read as one group
    later_mass   log-sum-exp of every query's logits on tokens outside the stream, such as its own token; None: the
                 queries see the stream only
    dtype        the values' number format
    most_levels  a cap on the number of levels, or None
    scale, softcap   define the logits: scale q.k, then softcap tanh(logit / softcap) unless softcap is None
    limit        when to stop the search, by seconds or by tokens; None: never. Stopped at any moment, it returns the
                 largest floor proved by then, which is valid, and says in `stopped` how far it came. It never falls
                 with more seconds, nor with more tokens for "present" (for "absent", from 512 to 512). Not stopped, the
                 floor is at least that without a limit
    Returns a `Readable`: the floor in bits, and the stream, groups and queries that prove it. Raises ValueError naming
    the argument. Source: derived here, docs/floors.md, "Readable tokens".
    """
    k = matrix("k", k)
    demand, law = Demand(eta, p, dv, dtype, most_levels), logit_law(scale, softcap)
    radius, others = positive("radius", radius), one_of("others", others, OTHERS)
    later = log_masses("later_mass", later_mass, len(k))
    beyond = None if later is None else float(later[0])
    if limit is None:
        return max(_within(k, radius, law, later, demand, others, unwatched), key=_bits)
    watch = limit.started()
    proved = proved_by_then(k, radius, law, beyond, demand, others == "absent", watch)
    mass = None if later is None else later[proved.asked]
    levels = demand.levels(proved.weights, proved.leaks)
    found, stopped = [Readable(*proved, levels, mass, *law, demand)], watch.weighed < len(k)
    try:
        if not stopped:
            for one in _within(k, radius, law, later, demand, others, watch.look):
                found.insert(0, one)  # of equal floors that of the longer search is returned
    except Enough:
        stopped = True
    best = max(found, key=_bits)
    return dataclasses.replace(best, stopped=Stopped(watch.weighed, len(k)) if stopped else None)


def _within(
    k: Tensor, radius: float, law: Law, later: Tensor | None, demand: Demand, others: str, look: Callable[[], None]
) -> Iterator[Readable]:
    """Yield the floors of `readable_within` that a search finds, of which the largest counts.

    `look` is called again and again, and may raise an error to end the search.
    """
    beyond = None if later is None else float(later[0])
    if others == "present":
        yield _read_by(k, towards_each(k.float(), radius, *law, beyond, look), law, later, demand, look)
        return
    for tokens, q, promise in Spread(k.float(), radius, *law, beyond, demand, look).candidates():
        one = _read_alone(k, q, tokens, law, later, demand, look)
        yield one
        if one.bits >= _KEPT * promise:
            return


def _bits(floor: Readable) -> float:
    return floor.bits


def readable_by_rows(
    k: Tensor, q: Tensor, *, present: Tensor | None = None, asked: Tensor | None = None,
    later_mass: Tensor | None = None, **demand: Any,
) -> list[Readable]:  # fmt: skip
    """Compute the read floor of every row (stream of one kv head) of k (rows, n, d), given its queries q (rows, m, d).

    Returns one `Readable` per row: the lower bound on the bits of a state that answers the row's queries.
    present, asked  (rows, n) and (rows, m), bool: True for real tokens and queries, False for padding; None: no padding
    later_mass      (rows, m), log-sum-exp of each query's logits on tokens after the stored ones, or None
    demand          further arguments of `readable_by`. Required are eta, the largest error allowed in a value of an
                    answer, and dv, the width of a value; p, scale, softcap, dtype and most_levels have defaults
    In the results, `stream` and `asked` are indices into all tokens and queries of the row, padding included. Rows have
    independent values, so the bits of all rows add up.
    """
    rows = _rows("k", k)
    if _rows("q", q) != rows:
        raise ValueError(f"k and q must have the same rows, got {rows} and {len(q)}")
    found = []
    for row in range(rows):
        tokens, queries = _marked("present", present, k, row), _marked("asked", asked, q, row)
        mass = None if later_mass is None else later_mass[row][queries]
        one = readable_by(k[row][tokens], q[row][queries], later_mass=mass, **demand)
        found.append(dataclasses.replace(one, stream=tokens[one.stream], asked=queries[one.asked]))
    return found


def readable_within_rows(
    k: Tensor, *, radius: Tensor | float, present: Tensor | None = None, **demand: Any
) -> list[Readable]:
    """Compute the read floor of every row of keys k (rows, n, d), for all queries of length at most `radius`.

    A row is the stream of one kv head. Returns one `Readable` per row: the lower bound on the bits of a state that
    answers these queries.
    radius   the greatest length of a query, one number or (rows,)
    present  (rows, n), bool: True for real tokens, False for padding; None: no padding
    demand   further arguments of `readable_within`. Required are eta, the largest error allowed in a value of an
             answer, and dv, the width of a value; p, scale, softcap, others, later_mass, dtype, most_levels
             and limit have defaults. A limit is that of each row
    In the results, `stream` and `asked` are indices into all tokens of the row, padding included.
    """
    rows = _rows("k", k)
    radii = torch.as_tensor(radius, dtype=torch.float64).expand(rows).tolist()
    found = []
    for row in range(rows):
        tokens = _marked("present", present, k, row)
        one = readable_within(k[row][tokens], radius=radii[row], **demand)
        found.append(dataclasses.replace(one, stream=tokens[one.stream], asked=tokens[one.asked]))
    return found


def _read_by(
    k: Tensor, q: Tensor, law: Law, later: Tensor | None, demand: Demand, look: Callable[[], None] = unwatched
) -> Readable:
    """Compute the read floor for the queries q when all keys k are in the stream, from groups that a search finds.

    `law` is (scale, softcap). `later` (m,) is the log-sum-exp of each query's logits on tokens outside the stream, or
    None.
    """
    order, reader = find_groups(Sight(q, k, *law, later, look), demand)
    place = torch.full((len(q) + 1,), -1, device=k.device)
    place[order] = torch.arange(len(order), device=k.device)
    group = place[reader]
    everything = torch.arange(len(k), device=k.device)
    for settling in range(1, _SETTLINGS + 1):
        mass = None if later is None else later[order]
        weights, leaks = ordered_shares(q[order], k, group, scale=law[0], softcap=law[1], later_mass=mass, look=look)
        stays = demand.bits(weights, leaks) > 0.0
        order, group = order[stays], renumbered(group, stays)
        # Dropped groups no longer leak: the bounds hold as they are, and are tighter when computed again.
        if bool(stays.all()) or settling == _SETTLINGS or len(order) * k.numel() > _SETTLED_UP_TO:
            break
    return _readable(everything, group, q[order], order, weights[stays], leaks[stays], later, law, demand)


def _read_alone(
    k: Tensor, q: Tensor, tokens: Tensor, law: Law, beyond: Tensor | None, demand: Demand, look: Callable[[], None]
) -> Readable:
    """Compute the read floor of a stream of `tokens` alone, in which each token is a group with a query of its own.

    `tokens` are indices into k, in the order in which Bob decodes them, and q holds the query of each. `law` is (scale,
    softcap). `beyond` (n,) is, for each key of k, the log-sum-exp of the logits of the key's query on tokens outside
    the stream, or None.
    """
    for settling in range(1, _SETTLINGS + 1):
        group = torch.arange(len(tokens), device=k.device)
        mass = None if beyond is None else beyond[tokens]
        weights, leaks = ordered_shares(q, k[tokens], group, scale=law[0], softcap=law[1], later_mass=mass, look=look)
        stays = demand.bits(weights, leaks) > 0.0
        # Tokens without bits are dropped from the stream, or stay in it with value 0 where computing again takes long.
        if bool(stays.all()) or settling == _SETTLINGS or len(tokens) ** 2 * k.shape[1] > _SETTLED_UP_TO:
            break
        tokens, q = tokens[stays], q[stays]
    stream, at = tokens.sort()
    group = renumbered(group, stays)[at]
    return _readable(stream, group, q[stays], tokens[stays], weights[stays], leaks[stays], beyond, law, demand)


def _readable(
    stream: Tensor, group: Tensor, queries: Tensor, asked: Tensor, weights: Tensor, leaks: Tensor,
    later: Tensor | None, law: Law, demand: Demand,
) -> Readable:  # fmt: skip
    mass = None if later is None else later[asked]
    bits, levels = float(demand.bits(weights, leaks).sum()), demand.levels(weights, leaks)
    return Readable(bits, stream, group, queries, asked, weights, leaks, levels, mass, *law, demand)


def _rows(name: str, value: Tensor) -> int:
    if not isinstance(value, Tensor) or value.ndim != 3:
        raise ValueError(f"{name} must be a tensor (rows, n, d), got {getattr(value, 'shape', type(value).__name__)}")
    return len(value)


def _marked(name: str, mask: Tensor | None, like: Tensor, row: int) -> Tensor:
    """Return the indices (t,) of the True entries of row `row` of `mask`, or all indices if `mask` is None.

    `like` holds the keys or queries that the mask is for: (rows, n, d). Raises ValueError with `name` unless the mask
    is bool of shape (rows, n).
    """
    if mask is None:
        return torch.arange(like.shape[1], device=like.device)
    if mask.dtype != torch.bool or mask.shape != like.shape[:2]:
        raise ValueError(f"{name} must be bool {tuple(like.shape[:2])}, got {mask.dtype} {tuple(mask.shape)}")
    return mask[row].nonzero()[:, 0]
