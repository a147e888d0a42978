"""Measure recall: the share of the tokens with the largest logits that a selector reads."""

from __future__ import annotations

import torch
from torch import Tensor

from kvfloor.core.exact import Exact
from kvfloor.core.selector import Selector
from kvfloor.core.spec import Spec


def recall(selector: Selector, q: Tensor, k: Tensor, top: int, seed: int = 0) -> Tensor:
    """Return the share (rows, m) of the `top` keys of largest q.k that each query reads, in float64.

    Queries q (rows, m, d) come after all of k (rows, n, d). Raises ValueError if top exceeds n.
    """
    rows, n, d = k.shape
    if not 1 <= top <= n:
        raise ValueError(f"top must lie in 1..{n}, the number of keys, got {top}")
    state = Exact(selector).open(Spec(rows, d, 1, dtype=k.dtype, device=k.device, seed=seed))
    state.append(k, k.new_zeros(rows, n, 1))
    best = (q.double() @ k.double().transpose(1, 2)).topk(top, dim=-1).indices
    unread = state.unread(q)
    if unread is None:
        return torch.ones(q.shape[:2], dtype=torch.float64, device=q.device)
    read = ~unread.expand(rows, q.shape[1], n)
    return read.gather(2, best).double().mean(-1)
