"""Query a state for hidden rows, either as it is or after appending a token to a copy of it.

A state is the memory that a KV-cache method keeps of its streams; it holds several independent streams side by side. A
hidden row is the dv values that one query reads. The given state is never changed. Queries are asked in batches, so
that memory is bounded.
"""

import torch
from torch import Tensor

from kvfloor.core.state import State

_QUERIES_AT_ONCE = 256
_FORK_BYTES = 2**28  # bytes that copies of the state may take at once


def by_reading(state: State, copy: Tensor, queries: Tensor) -> Tensor:
    """Return a state's answers (m, dv), float32, to queries (m, d), without appending a token.

    copy (m,) holds, for each query, the index of the stream that it is for.
    """
    rows, m = state.spec.rows, len(queries)
    order = torch.argsort(copy, stable=True)
    count = torch.bincount(copy, minlength=rows)
    place = torch.arange(m) - (count.cumsum(0) - count)[copy[order]]  # among the queries of the same stream
    table = queries.new_zeros(rows, int(count.max()), queries.shape[1])
    table[copy[order], place] = queries[order]
    means = [state.read(part).mean.float() for part in table.split(_QUERIES_AT_ONCE, dim=1)]
    answers = torch.empty(m, state.spec.dv)
    answers[order] = torch.cat(means, dim=1)[copy[order], place]
    return answers


def by_appending(
    state: State, copy: Tensor, queries: Tensor, k: Tensor | None = None, v: Tensor | None = None
) -> Tensor:
    """Return the answers (m, dv), float32, to queries (m, d), each asked after one token was appended to the state.

    Each query has a fresh copy of the state, to which its own token is appended. copy (m,) holds, for each query, the
    index of the stream that it is for. k (m, d) and v (m, dv) are the keys and values of the appended tokens, zero
    unless given. Some theorems need this: in their proofs the receiver (Bob) continues the stream by a token before he
    asks.
    """
    spec = state.spec
    k = queries.new_zeros(len(queries), spec.d) if k is None else k
    v = queries.new_zeros(len(queries), spec.dv) if v is None else v
    at_once = max(1, min(_QUERIES_AT_ONCE, _FORK_BYTES * spec.rows // max(1, state.nbytes)))
    answers = []
    for part in torch.arange(len(queries)).split(at_once):
        fork = state.clone()
        fork.select_rows(copy[part])
        fork.append(k[part].unsqueeze(1), v[part].unsqueeze(1))
        answers.append(fork.read(queries[part].unsqueeze(1)).mean[:, 0].float())
    return torch.cat(answers)
