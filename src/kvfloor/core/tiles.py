"""Compute softmax weights over many keys in two passes, one tile (a range of consecutive keys) after another.

In shapes, rows are (batch item, kv head) streams, with m queries and s keys each. The compute dtype is float64 for
float64 keys, float32 for all others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from kvfloor.core.attend import compute_dtype
from kvfloor.core.rowwise import aligned
from kvfloor.logits import cap_

TILE_SLOTS = 4096  # bounds the weights that exist at once: queries x this many keys per row


def weights_by_tile(
    q: Tensor,
    k: Tensor,
    scale: float,
    softcap: float | None,
    hide: Callable[[slice], Tensor],
    clear: int = 0,
    held: Sequence[int] | None = None,
    tile: int | None = None,
) -> Iterator[tuple[slice, Tensor]]:
    """Yield the softmax weights (rows, m, tile) of q (rows, m, d) over k (rows, s, d), tile by tile.

    The first pass finds each query's largest logit and its sum of exponentials; the second turns each tile's logits
    into weights. So at most rows x m x tile weights exist at a time. Keys that fit in one tile take one pass.

    scale    factor on q.k, which gives the logits
    softcap  c in c * tanh(logit / c); None: logits are not capped
    hide     function from a slice of keys to a mask, bool (rows or 1, m, keys), True for keys that queries do not see
    clear    number of first keys that all queries see; `hide` is not called for them
    held     number of first keys of each row that its queries may see (None: all); the other keys have weight 0,
             whatever `hide` returns for them
    tile     number of keys in a tile (None: TILE_SLOTS, 4096)
    Yields (at, weights), where the slice `at` names the keys of the tile. Weights are in the compute dtype. A query
    that sees no key has weight 0 everywhere. The bits of a row's weights depend on the row's own queries and held keys
    alone.
    """
    tile = tile or TILE_SLOTS
    dtype, (rows, m, _), width = compute_dtype(k.dtype), q.shape, k.shape[1]
    asked = [aligned(q[row : row + 1]).to(dtype) * scale for row in range(rows)]
    own = [width] * rows if held is None else list(held)
    pieces = [slice(start, min(start + tile, width)) for start in range(0, width, tile)]

    def logits(at: slice, among: Iterable[int]) -> Iterator[tuple[int, Tensor]]:
        """Yield (row, logits) for each row of `among` that has keys in the slice `at`.

        The logits are (1, m, c), for the row's m queries and its c keys in the slice; -inf where a query does not see a
        key.
        """
        behind = slice(max(at.start, clear), at.stop)
        hidden = hide(behind) if behind.start < behind.stop else None
        for row in among:
            stop = min(at.stop, own[row])
            if at.start >= stop:
                continue
            keys = aligned(k[row : row + 1, at.start : stop]).to(dtype)
            raw = cap_(torch.matmul(asked[row], keys.transpose(-1, -2)), softcap)
            if hidden is not None and behind.start < stop:
                mine = hidden[row if hidden.shape[0] > 1 else 0, :, : stop - behind.start]
                raw[..., behind.start - at.start :].masked_fill_(mine, -torch.inf)
            yield row, raw

    # A row that fits in one tile takes one pass, whatever the others need.
    long = [row for row in range(rows) if own[row] > tile]
    shift = {row: q.new_full((1, m, 1), -torch.inf, dtype=dtype) for row in long}
    mass = {row: q.new_zeros(1, m, 1, dtype=dtype) for row in long}
    for at in pieces if long else ():
        for row, raw in logits(at, long):
            top = torch.maximum(shift[row], raw.amax(-1, keepdim=True))
            finite = torch.where(top == -torch.inf, torch.zeros_like(top), top)
            before = mass[row] * torch.exp(shift[row] - finite)
            mass[row] = before + raw.sub_(finite).exp_().sum(-1, keepdim=True)
            shift[row] = top
    for row in long:
        shift[row] = torch.where(shift[row] == -torch.inf, torch.zeros_like(shift[row]), shift[row])
        mass[row] = mass[row].clamp_min(torch.finfo(dtype).tiny)
    for at in pieces:
        weights = q.new_zeros(rows, m, at.stop - at.start, dtype=dtype)
        for row, raw in logits(at, range(rows)):
            raw = raw.sub_(shift[row]).exp_().div_(mass[row]) if row in mass else torch.softmax(raw, -1)
            weights[row, :, : raw.shape[2]] = raw[0]
        blind = weights[..., :1].isnan()
        waits = weights.device.type != "cpu"  # for the answer whether any query is blind
        yield at, weights.masked_fill_(blind, 0.0) if waits or bool(blind.any()) else weights
