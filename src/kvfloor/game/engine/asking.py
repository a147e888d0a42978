"""How Bob asks. Every way leaves the state as it was and answers row by row, a bounded number at a time."""

import torch
from torch import Tensor

from kvfloor.core.state import State

_QUERIES_AT_ONCE = 256
_FORK_BYTES = 2**28  # copies of the state that may live at once


def by_reading(state: State, copy: Tensor, queries: Tensor) -> Tensor:
    """Answers (m, dv), float32, to queries (m, d) of streams copy (m,): nothing is appended."""
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
    """The same, each query on its own copy of the state to which one token was appended: k (m, d), v (m, dv).

    Zeros unless given: the form in which the theorems let Bob go on with the stream.
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
