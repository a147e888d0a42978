"""Plan each forward of the engine: which requests begin, which have ended their prompt, and which get tokens.

A forward is one run of the model over the new tokens of several requests. A request is named by its block, i.e. the
index of the engine's block of memory that holds the request's KV cache. The engine reserves block 0 for padding.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvfloor.core.decoding import DecodeBatch
from kvfloor.core.pool import Pool

PADDING = 0
"""The block of padding rows, which belong to no request."""


@dataclass
class Plan:
    """Hold the plan of one forward, the same for all layers.

    begun    blocks (n,) int64 of requests whose first tokens are in this forward; the blocks must be cleared, as they
             still hold the bytes of earlier requests
    over     blocks (n,) int64 of requests whose prompt ended before this forward, and is not marked as ended yet; the
             end must be marked before the tokens of this forward are appended
    singles  blocks (n,) int64 of requests with one token in this forward
    seen     (n,) int64, number of earlier tokens of each request in `singles`
    places   (n,) int64, index of each such request's token among all tokens of the forward
    chunks   (block, start, stop) of each request with several tokens, which are those with index start .. stop - 1
             among all tokens of the forward
    report   True if a log line about the tokens that requests hold is due
    All tensors are on the CPU. n differs from tensor to tensor, except that `singles`, `seen` and `places` have one n.
    """

    begun: Tensor
    over: Tensor
    singles: Tensor
    seen: Tensor
    places: Tensor
    chunks: tuple[tuple[int, int, int], ...]
    report: bool = False
    _step: DecodeBatch | None = field(default=None, repr=False)
    _there: Tensor | None = field(default=None, repr=False)

    def step_of(self, pool: Pool) -> DecodeBatch:
        """Return the decode step of the requests in `singles`: their block indices and token counts.

        The first call lets `pool`, which holds the states of one layer, prepare it. Later calls, with the pools of
        other layers, return the same object.
        """
        if self._step is None:
            self._step = pool.batch(self.singles, self.seen)
        return self._step

    def places_on(self, device: torch.device) -> Tensor:
        """Return a copy of `places` on `device`; later calls return the same copy, as all layers are on one device."""
        if self._there is None:
            self._there = self.places.to(device, non_blocking=True)
        return self._there

    def require_finite(self) -> None:
        """Raise ValueError if a query, key or value of the requests in `singles` was NaN or infinite in this forward.

        This covers the case that pools have only recorded it on their device. Elsewhere they raised at once, and the
        call does nothing. It waits until the device has done the forward.
        """
        if self._step is not None:
            self._step.require_finite()

    @property
    def blocks(self) -> Tensor:
        """Return the block indices (n,) of all requests that have tokens in this forward."""
        return torch.cat([self.singles, torch.tensor([chunk[0] for chunk in self.chunks], dtype=torch.int64)])


class Planner:
    """Make the plan of each forward from vLLM's data, and remember which requests have ended their prompt."""

    def __init__(self) -> None:
        self._over = torch.zeros(0, dtype=torch.bool)  # per block: True if the prompt of its request has ended

    def plan(self, starts: Tensor, lengths: Tensor, blocks: Tensor, prompting: Tensor, report: bool = False) -> Plan:
        """Return the plan of a forward of n requests.

        starts     (n + 1,) index of each request's first token among all tokens of the forward, then their number
        lengths    (n,) tokens of each request so far, those of this forward included
        blocks     (n,) block of each request
        prompting  (n,) bool, True where the request's first token in this forward belongs to the prompt
        report     True if a log line about the tokens that requests hold is due; stored in the plan
        Requests without a token in this forward, and those in block 0, which are padding, are left out of the plan.
        """
        starts, blocks = starts.to("cpu", torch.int64), blocks.to("cpu", torch.int64)
        new = starts[1:] - starts[:-1]
        live = (new > 0) & (blocks != PADDING)
        begins = live & (lengths.to("cpu", torch.int64) == new)
        if len(blocks) and int(blocks.max()) >= len(self._over):
            self._over = torch.cat([self._over, torch.zeros(int(blocks.max()) + 1, dtype=torch.bool)])
        self._over[blocks[begins]] = False
        ends = live & ~prompting.to("cpu") & ~self._over[blocks]
        self._over[blocks[ends]] = True
        alone = live & (new == 1)
        several = (live & (new > 1)).nonzero().flatten().tolist()
        edges = starts.tolist()
        chunks = tuple((int(blocks[i]), edges[i], edges[i + 1]) for i in several)
        before = (lengths.to("cpu", torch.int64) - new)[alone]
        return Plan(blocks[begins], blocks[ends], blocks[alone], before, starts[:-1][alone], chunks, report)
