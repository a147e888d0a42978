"""Softmax weights over many keys, one tile of them after another: two passes, and never all of them at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kvfloor.core.attend import compute_dtype


def weights_by_tile(
    q: Tensor,
    k: Tensor,
    scale: float,
    softcap: float | None,
    hide: Callable[[slice], Tensor],
    tile: int,
    clear: int = 0,
) -> Iterator[tuple[slice, Tensor]]:
    """The softmax weights (rows, m, tile) of q (rows, m, d) over k (rows, s, d), tile by tile, in the compute dtype.

    The first pass takes each query's largest logit and mass, the second turns each tile's logits into weights, so
    no more than rows x m x tile of them exist at a time; what fits in one tile takes one pass. hide(at) is what the
    queries do not see of the keys `at`, bool (rows, m, keys), and is not asked of the first `clear` keys, which all
    queries see. A query that sees nothing has weight 0 everywhere.
    """
    dtype = compute_dtype(k.dtype)
    q = q.to(dtype) * scale
    width = k.shape[1]
    pieces = [slice(start, min(start + tile, width)) for start in range(0, width, tile)]

    def logits(at: slice) -> Tensor:
        raw = torch.matmul(q, k[:, at].to(dtype).transpose(-1, -2))
        if softcap is not None:
            raw = raw.div_(softcap).tanh_().mul_(softcap)
        behind = slice(max(at.start, clear), at.stop)
        if behind.start < behind.stop:
            raw[..., behind.start - at.start :].masked_fill_(hide(behind), -torch.inf)
        return raw

    if len(pieces) == 1:
        weights = torch.softmax(logits(pieces[0]), -1)
        blind = weights[..., :1].isnan()
        yield pieces[0], weights.masked_fill_(blind, 0.0) if bool(blind.any()) else weights
        return
    top = q.new_full((*q.shape[:2], 1), -torch.inf)
    mass = q.new_zeros(*q.shape[:2], 1)
    for at in pieces:
        raw = logits(at)
        higher = torch.maximum(top, raw.amax(-1, keepdim=True))
        shift = torch.where(higher == -torch.inf, torch.zeros_like(higher), higher)
        mass = mass * torch.exp(top - shift) + raw.sub_(shift).exp_().sum(-1, keepdim=True)
        top = higher
    mass = mass.clamp_min(torch.finfo(dtype).tiny)
    shift = torch.where(top == -torch.inf, torch.zeros_like(top), top)
    for at in pieces:
        yield at, logits(at).sub_(shift).exp_().div_(mass)
