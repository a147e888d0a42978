"""Describe a decode step, which gives one new token to each of n requests, once for the pools of all layers.

A state is the KV cache of one request in one layer. A pool keeps the states of one layer in blocks of bytes, one block
per request, on a device. A request has the same block index and the same token counts in all layers. So they are
prepared and checked once, on the CPU.
A token block is a fixed number of consecutive tokens of a request; methods evict tokens where one ends. "Block" alone
always means a block of bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


class FiniteCheck:
    """Record on the device which requests had NaN or infinite entries, for the host to read once for all layers.

    Reading a number from a device waits until the device has done all earlier work. If each layer read its own check,
    the host would wait in every layer.
    """

    def __init__(self) -> None:
        self._bad: Tensor | None = None  # (n,) on the device, True for requests with NaN or infinite entries
        self._read: list[int] | None = []  # indices of these requests; None: not read since the last `add`

    def add(self, *tensors: Tensor) -> None:
        """Check tensors (n, ...), such as the q, k and v of n requests, on their device, without waiting for it."""
        for x in tensors:
            bad = ~torch.isfinite(x).flatten(1).all(1)
            self._bad = bad if self._bad is None else self._bad | bad
        self._read = None

    def failed(self) -> list[int]:
        """Return the indices in 0..n-1 of the requests that had NaN or infinite entries in any `add` so far.

        The call waits for the device if `add` was called since the last time.
        """
        if self._read is None:
            assert self._bad is not None
            self._read = [i for i, bad in enumerate(self._bad.tolist()) if bad]
        return self._read


@dataclass(frozen=True)
class DecodeBatch:
    """Hold the block indices and token counts of a decode step, which gives one new token to each of n requests.

    They are the same in all layers. A slot is the place of one held token.

    ids       (n,) index of each request's block, on the CPU; no index occurs twice
    named     the same indices as integers
    blocks    number of blocks of the pool that made this batch; only pools with as many blocks accept it
    index     the same indices as `ids` on the blocks' device, or a slice if they are consecutive
    rows      (n,) the same indices as a tensor on the blocks' device
    seen      (n,) tokens appended to each request before the step, on the blocks' device
    held      (n,) tokens that each kv head of the request holds before the step, on the blocks' device
    fill      (n,) tokens in the request's last token block before the step, if that is not complete, else 0; on the
              blocks' device
    longest   largest number of tokens appended to a request, the new one included
    width     largest number of tokens that a kv head holds, the new one included
    visible   bool (n, 1, 1, width), True for slots that hold a token once the new one is added; None: all slots do
    complete  (c,) indices, on the CPU, of the blocks of those requests whose token block the new token completes; None:
              there are none
    check     record on the device of the requests with NaN or infinite q, k or v, which pools fill and read later;
              None: every pool reads at once whether they are finite
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
        """Make the batch from the requests' block indices and their token counts before the step.

        ids       (n,) index of each request's block, on the CPU; the caller has checked that they are different and in
                  0..blocks-1
        blocks    number of blocks of the pool
        seen      (n,) tokens appended to each request so far, on the CPU
        held      (n,) tokens that each of its kv heads holds, on the CPU
        block     number of tokens in a token block
        device    that of the blocks
        deferred  True: pools record on the device whether q, k and v are finite, to be read later; False: they read it
                  at once
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
        """Return the block indices of the requests with NaN or infinite q, k or v in a layer stepped so far.

        The list is empty if the check is not deferred, as pools then raise at once. The call waits for the device if a
        pool stepped since the last call.
        """
        return [] if self.check is None else [self.named[i] for i in self.check.failed()]

    def require_finite(self) -> None:
        """Raise ValueError if a request had NaN or infinite q, k or v in a layer stepped so far.

        Do nothing if the check is not deferred, as pools then raise at once.
        """
        bad = self.bad()
        if bad:
            raise ValueError(f"q, k or v of the requests in the blocks {bad} had NaN or infinite entries")
