"""Describe a step of one token of each of n requests, once for the pools of all layers.

A pool keeps the states of requests of one layer in blocks of bytes, one block per request, on a device. What a step
needs to know of its requests is the same in all layers. So it is worked out and checked once, on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


class FiniteCheck:
    """Gather on the device which requests brought a NaN or an infinity, so that the host waits for it once.

    To read a number from a device is to wait until all work before it is done. A check of every layer's tokens at once
    would make the host wait in every layer.
    """

    def __init__(self) -> None:
        self._bad: Tensor | None = None  # (n,) on the device, True for requests with such an entry
        self._read: list[int] | None = []  # their indices, None if they were not read since the last `add`

    def add(self, *tensors: Tensor) -> None:
        """Take in tensors (n, ...) whose entries should be finite; nothing is waited for."""
        for x in tensors:
            bad = ~torch.isfinite(x).flatten(1).all(1)
            self._bad = bad if self._bad is None else self._bad | bad
        self._read = None

    def failed(self) -> list[int]:
        """Return the indices of requests with an entry that was not finite; waits for the device if that is needed."""
        if self._read is None:
            assert self._bad is not None
            self._read = [i for i, bad in enumerate(self._bad.tolist()) if bad]
        return self._read


@dataclass(frozen=True)
class DecodeBatch:
    """Hold what a step of one token of each of n requests needs to know of them; the same in all layers.

    ids       (n,) their blocks, on the CPU: different indices below `blocks`
    named     the same as numbers
    blocks    number of blocks of the pool that made this batch; only pools with as many take it
    index     `ids` for indexing, on the blocks' device: a slice if the blocks follow one another
    rows      (n,) `ids` as a tensor on the blocks' device
    seen      (n,) tokens that each request saw before the step; `held` are those that each kv head kept
    fill      (n,) number of these tokens in the open block of tokens
    longest   most tokens that a request has seen after the step
    width     most tokens that a head holds with the new one
    visible   bool (n, 1, 1, width), True for slots that hold a token; None: all do
    complete  (c,) blocks of the requests whose block of tokens the step completes; None: there are none
    check     gathers which requests brought numbers that are not finite; None: every pool reads at once whether any did
    """

    ids: Tensor
    named: tuple[int, ...]
    blocks: int
    index: Tensor | slice
    rows: Tensor
    seen: Tensor
    held: Tensor
    fill: Tensor
    longest: int
    width: int
    visible: Tensor | None
    complete: Tensor | None
    check: FiniteCheck | None

    @classmethod
    def of(
        cls, ids: Tensor, blocks: int, seen: Tensor, held: Tensor, block: int, device: torch.device, deferred: bool
    ) -> DecodeBatch:
        """Return the batch for requests with these clocks; ids, seen and held (n,) are on the CPU.

        ids       different indices below `blocks`, which the caller has checked
        block     number of tokens from one block end to the next
        deferred  True: a check of numbers waits until it is asked for
        """

        def there(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=True)

        named, counts, fill = tuple(ids.tolist()), held.tolist(), seen % block
        width = max(counts) + 1
        visible = None
        if min(counts) + 1 < width:
            visible = there((torch.arange(width) <= held.unsqueeze(1)).view(-1, 1, 1, width))
        rows, ends = there(ids), fill == block - 1
        return cls(
            ids=ids,
            named=named,
            blocks=blocks,
            index=slice(named[0], named[-1] + 1) if all(b == a + 1 for a, b in pairwise(named)) else rows,
            rows=rows,
            seen=there(seen),
            held=there(held),
            fill=there(fill),
            longest=max(seen.tolist()) + 1,
            width=width,
            visible=visible,
            complete=ids[ends] if bool(ends.any()) else None,
            check=FiniteCheck() if deferred else None,
        )

    def bad(self) -> list[int]:
        """Return the blocks of the requests that brought a NaN or an infinity to a pool that put off its check.

        The call waits for the device if tokens came since the last call.
        """
        return [] if self.check is None else [self.named[i] for i in self.check.failed()]

    def require_finite(self) -> None:
        """Raise ValueError if a request brought a NaN or an infinity to a pool that put off its check."""
        bad = self.bad()
        if bad:
            raise ValueError(f"q, k or v of the requests in the blocks {bad} had NaN or infinite entries")
