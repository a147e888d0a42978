"""Compute the volume floor: a lower bound on the bits of a state, from the volume of all answers to given queries.

A state is the memory that a KV-cache method keeps of a stream of tokens. Let values be uniform in [-1, 1]. The answers
to k queries then fill a part of space whose volume follows from the queries' attention rows, and a state that answers
within eta leaves boxes of side 2 eta. The state must tell apart as many boxes as fill the volume.
    attention row  the softmax weights of a query on the stored tokens, (n,)
    residual       distance of an attention row from the span of the rows chosen before it
    later_mass     log-sum-exp of a query's logits on tokens outside the stream, which also enter its softmax
Where the read floor (`readable_by`) hides values in groups of tokens that single queries can tell apart, this floor
takes the queries as they mix. It is the larger one for small errors. The proof is in docs/floors.md, "Volume".
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kvfloor.floors.measured.inputs import log_masses, logit_law, matrix
from kvfloor.floors.measured.levels import Demand
from kvfloor.logits import capped

_MOST_ENTRIES = 2**27  # of the matrix of attention rows among which the search chooses
_QUERIES_AT_ONCE = 512
_ROWS_AT_ONCE = 16  # rows chosen before residuals are computed again


@dataclass(frozen=True, eq=False)
class VolumeFloor:
    """Hold a volume floor: any method that meets `demand` holds at least `bits` bits.

    asked   (R,) int64, the queries that prove it, as indices into the given ones, in their order
    demand  the accuracy required of answers
    """

    bits: float
    asked: Tensor
    demand: Demand

    @property
    def bytes(self) -> int:
        """Return the floor in whole bytes: `bits` / 8, rounded up."""
        return math.ceil(self.bits / 8.0 * (1.0 - 1e-12))


def volume_by(
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
) -> VolumeFloor:
    """Return a lower bound on the bits S of a state that answers the queries `q` over the stored keys `k`.

    With probability p, an answer must be within eta of exact attention in each of its dv values, for values in [-1, 1].
    Law: S >= sum over chosen queries of dv log2 r - p' dv log2(eta + u) - (1 - p') dv log2 w - H2(p'). Here r is the
    residual of the query's attention row, w the sum of the row, u the values' rounding error in `dtype`, H2 the binary
    entropy, and p' that number from p to 1 for which the term is least. The bound is for the worst values, given these
    keys and queries: it is no claim about recorded values.
    k, q        (n, d) stored keys; (m, d) queries, each of which the state must be able to answer
    later_mass  (m,), or one number; None: no tokens outside the stream. `causal_mass` computes it from recorded tokens
    scale, softcap  define the logits: scale q.k, then softcap tanh(logit / softcap) unless softcap is None
    Queries are chosen by pivoted Gram-Schmidt; any choice gives a valid floor. Of more queries than fit 2^27 weights,
    evenly spaced ones are looked at. Raises ValueError naming the argument. Source: Zamir and Feder 1993 for the
    entropy of linear functions; the floor is derived here, docs/floors.md, "Volume".
    """
    k = matrix("k", k)
    q = matrix("q", q, k.shape[1])
    demand, (scale, softcap) = Demand(eta, p, dv, dtype), logit_law(scale, softcap)
    later = log_masses("later_mass", later_mass, len(q))
    among = torch.arange(0, len(q), max(1, -(-len(q) * len(k) // _MOST_ENTRIES)), device=k.device)

    def rows(of: Tensor, kind: torch.dtype) -> Tensor:
        mass = None if later is None else later[of]
        return attention_rows(k, q[of], kind, scale, softcap, mass)

    asked = among[_chosen(rows(among, torch.float32), demand)]
    exact = rows(asked, torch.float64)
    reach = (
        float(q[asked].double().norm(dim=1).max() * k.double().norm(dim=1).max()) * abs(scale) if len(asked) else 0.0
    )
    gained = torch.cumsum(demand.dv * _log_residuals(exact, k.shape[1], reach), 0)
    gained = gained - torch.cumsum(_cost(exact.sum(1), demand)[: len(gained)], 0)
    if not len(gained) or float(gained.max()) <= 0.0:
        return VolumeFloor(0.0, asked[:0], demand)
    best = int(gained.argmax())
    return VolumeFloor(float(gained[best]) * (1.0 - 1e-12), asked[: best + 1], demand)


def attention_rows(
    k: Tensor, q: Tensor, dtype: torch.dtype, scale: float, softcap: float | None, later: Tensor | None
) -> Tensor:
    """Return the softmax weights (m, n) of queries q (m, d) on the keys k (n, d), computed in `dtype`.

    later: (m,) log-sum-exp of the logits on tokens outside the stream, or None.
    """
    found = []
    for start in range(0, len(q), _QUERIES_AT_ONCE):
        at = slice(start, start + _QUERIES_AT_ONCE)
        logits = capped(scale * (q[at].to(dtype) @ k.to(dtype).T), softcap)
        if later is not None:
            logits = torch.cat([logits, later[at].to(logits).unsqueeze(1)], 1)
        found.append(torch.softmax(logits, 1)[:, : len(k)])
    return torch.cat(found) if found else k.new_zeros(0, len(k), dtype=dtype)


def _cost(sums: Tensor, demand: Demand) -> Tensor:
    """Return the bits (m,) that come off a query's dv log2 r; inf where w <= eta + u, as nothing need be told there.

    sums: (m,) the sum w of each attention row.
    """
    sums = sums.double().clamp(demand.error, 1.0)
    told = demand.dv * torch.log2(sums / demand.error)  # bits of an answer that is right
    share = torch.special.expit(-told * math.log(2.0)).clamp_min(demand.p)
    doubt = (torch.special.entr(share) + torch.special.entr(1.0 - share)) / math.log(2.0)
    return torch.where(told > 0.0, demand.dv * torch.log2(sums) - share * told + doubt, torch.inf)


def _chosen(rows: Tensor, demand: Demand) -> Tensor:
    """Choose rows of the matrix (m, n) by pivoted Gram-Schmidt, as long as they add bits: (R,) indices in their order.

    Several rows are chosen before all residuals are computed again. Within these, each has its residual to the others.
    """
    cost = _cost(rows.sum(1), demand)
    square = rows.square().sum(1)
    basis, order = rows.new_zeros(0, rows.shape[1]), []
    while len(order) < min(rows.shape):
        worth = demand.dv * 0.5 * torch.log2(square.double()) - cost
        worth[order] = -torch.inf
        first = worth.topk(min(_ROWS_AT_ONCE, len(worth)))
        candidates = first.indices[first.values > 0.0]
        if not len(candidates):
            break
        rest = rows[candidates]
        for _ in range(2):  # the second time removes what rounding left
            rest = rest - (rest @ basis.T) @ basis
        kept = _picked(rest, cost[candidates], demand)
        if not kept:
            break
        order += candidates[kept].tolist()
        new = torch.linalg.qr(rest[kept].T).Q.T
        basis = torch.cat([basis, new])
        square = (square - (rows @ new.T).square().sum(1)).clamp_min(0.0)
    return torch.tensor(order, dtype=torch.int64, device=rows.device)


def _picked(rest: Tensor, cost: Tensor, demand: Demand) -> list[int]:
    """Choose rows of `rest` (c, n) one after the other, each by its residual to those before: a list of indices."""
    gram = (rest @ rest.T).double()
    square, left, picked = gram.diagonal().clone(), torch.ones(len(rest), dtype=torch.bool), []
    factor = gram.new_zeros(len(rest), 0)  # columns of the pivoted Cholesky factor
    while bool(left.any()):
        worth = (demand.dv * 0.5 * torch.log2(square.clamp_min(0.0)) - cost).masked_fill(~left, -torch.inf)
        best = int(worth.argmax())
        if not float(worth[best]) > 0.0:
            break
        column = (gram[:, best] - factor @ factor[best]) / square[best].sqrt()
        factor, left[best] = torch.cat([factor, column.unsqueeze(1)], 1), False
        square = square - column.square()
        picked.append(best)
    return picked


def _log_residuals(rows: Tensor, d: int, reach: float) -> Tensor:
    """Return log2 r of rows (R, n) one after the other, such that sums of the first ones are at most the true sums.

    The determinant of a Gram matrix is the product of the squared residuals. It falls when a multiple of the identity
    is taken off; the multiple here exceeds what rounding adds. The result ends where the factorisation breaks down.
    d      width of a key; reach: bound on the size of a logit
    """
    count, n = rows.shape
    lost = torch.finfo(torch.float64).eps * count * (2.0 * d * (reach + 1.0) + 3.0 * n + count + 64.0)
    gram = rows @ rows.T
    gram.diagonal().sub_(lost)
    factor, broken = torch.linalg.cholesky_ex(gram)
    sound = int(broken) - 1 if int(broken) else count
    return torch.log2(factor.diagonal()[:sound])
