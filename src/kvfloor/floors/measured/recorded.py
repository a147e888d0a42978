"""Compute the read floor of a recorded stream of keys and queries that is cut in two at a token.

The read floor is a lower bound on the bits of a state, the memory that a KV-cache method keeps. Here the state holds
the tokens before the cut, and must answer the queries that come after the cut.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvfloor.floors.measured.products import Factors
from kvfloor.floors.measured.readable import Readable, readable_by_rows
from kvfloor.validation import whole


def causal_mass(
    q: Tensor,
    k: Tensor,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    present: Tensor | None = None,
    sink: Tensor | None = None,
) -> Tensor:
    """Return the log-sum-exp of each query's logits on the tokens from a cut up to its own token: (g * t,) float64.

    `readable_by`, which computes the read floor, takes the result as its argument `later_mass`. There it stands for the
    tokens that come after the stored ones.
    q        (g, t, d), the queries at the t tokens after the cut, g per token (a GQA group); the query at token i sees
             tokens 0..i of the t
    k        (t, d), the keys of the same tokens
    present  (t,) bool, True for real tokens, False for padding; None: no padding
    scale, softcap   define the logits: scale q.k, then softcap tanh(logit / softcap) unless softcap is None
    sink     (g,), one more logit of each query head, that of a sink without a value; None: no sinks
    The result is in the order of q.reshape(g * t, d). It is -inf where a query sees no real token and no sink.
    """
    g, t, d = q.shape
    everything = slice(None)
    logits = Factors.of(q.reshape(g * t, d), k, scale, softcap, torch.float64).logits(everything, everything)
    hidden = torch.ones(t, t, dtype=torch.bool, device=q.device).triu(1)
    if present is not None:
        hidden = hidden | ~present
    mass = torch.logsumexp(logits.view(g, t, t).masked_fill(hidden, -torch.inf), -1)
    return (mass if sink is None else torch.logaddexp(mass, sink.to(mass).unsqueeze(1))).reshape(g * t)


def readable_after(
    q: Tensor,
    k: Tensor,
    cut: int,
    *,
    present: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    sink: Tensor | None = None,
    **demand: Any,
) -> list[Readable]:
    """Compute the read floor of each row of a recorded stream: of the first `cut` tokens, for all queries after them.

    Returns one `Readable` per row: the floor in bits, and the groups of tokens and the queries that prove it. A row is
    the stream of one kv head. The first `cut` tokens are stored, and all later queries are asked. Each later query also
    attends to its own token and to the tokens between the cut and its own.
    q        (rows, g, n, d), with g queries per token (a GQA group)
    k        (rows, n, d)
    present  (rows, n) bool, True for real tokens, False for padding; None: no padding
    scale, softcap   define the logits: scale q.k, then softcap tanh(logit / softcap) unless softcap is None
    sink     (rows, g), the logit of a sink without a value that each query head also attends to; None: no sinks
    demand   the accuracy required: eta, the largest error allowed in a value of an answer, for values in [-1, 1], and
             dv, the width of a value. Three more may be given: p, the probability that a whole answer is within eta
             (0.9); dtype, the values' number format; and most_levels, a cap on the number of levels of a value, such as
             16 for 4-bit values
    In the results `asked` indexes a row's later queries, flattened as q[row, :, cut:].reshape(-1, d), and `stream`
    indexes the row's tokens. Bits of rows add up, because the values of different rows are independent.
    """
    if q.ndim != 4 or k.ndim != 3 or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[1:]:
        raise ValueError(f"q must be (rows, g, n, d) and k (rows, n, d), got {tuple(q.shape)} and {tuple(k.shape)}")
    if not 1 <= whole("cut", cut) < k.shape[1]:
        raise ValueError(f"cut must lie in 1..{k.shape[1] - 1}, so that tokens stand on both sides, got {cut}")
    rows, g = q.shape[:2]
    real = torch.ones(k.shape[:2], dtype=torch.bool, device=k.device) if present is None else present
    sinks = [None] * rows if sink is None else list(sink)
    masses = [
        causal_mass(q[row, :, cut:], k[row, cut:], scale=scale, softcap=softcap, present=real[row, cut:], sink=one)
        for row, one in enumerate(sinks)
    ]
    return readable_by_rows(
        k[:, :cut],
        q[:, :, cut:].flatten(1, 2),
        present=real[:, :cut],
        asked=real[:, cut:].repeat(1, g),
        later_mass=torch.stack(masses),
        scale=scale,
        softcap=softcap,
        **demand,
    )


def longest_query(q: Tensor, present: Tensor | None = None) -> Tensor:
    """Return the length (rows,), float64, of each row's longest query.

    `readable_within_rows`, called with this length as `radius`, computes the read floor for all queries up to it. A row
    is the stream of one kv head. q (rows, g, n, d) has g queries per token (a GQA group). present (rows, n), bool, is
    True for real tokens and False for padding; None: no padding.
    """
    length = q.double().norm(dim=-1)
    if present is not None:
        length = length.masked_fill(~present.unsqueeze(1), 0.0)
    return length.flatten(1).amax(1)
