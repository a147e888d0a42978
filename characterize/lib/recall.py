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
    return share_of_best(tokens_read(selector, q, k, seed), q, k, top)


def tokens_read(selector: Selector, q: Tensor, k: Tensor, seed: int = 0) -> Tensor:
    """Return the mask (rows, m, n) of the keys k (rows, n, d) that each later query of q (rows, m, d) reads."""
    rows, n, d = k.shape
    state = Exact(selector).open(Spec(rows, d, 1, dtype=k.dtype, device=k.device, seed=seed))
    state.append(k, k.new_zeros(rows, n, 1))
    unread = state.unread(q)
    if unread is None:
        return torch.ones(rows, q.shape[1], n, dtype=torch.bool, device=q.device)
    return ~unread.expand(rows, q.shape[1], n)


def share_of_best(read: Tensor, q: Tensor, k: Tensor, top: int) -> Tensor:
    """Return the share (rows, m), float64, of the `top` keys of largest q.k that lie in the mask `read` (rows, m, n).

    Raises ValueError if top exceeds n.
    """
    n = k.shape[1]
    if not 1 <= top <= n:
        raise ValueError(f"top must lie in 1..{n}, the number of keys, got {top}")
    best = (q.double() @ k.double().mT).topk(top, dim=-1).indices
    return read.gather(2, best).double().mean(-1)
