"""Plan one forward of the engine: which requests begin, which end their prompt, which take in tokens.

A request is named by its block, i.e. the index of the engine's block of memory that holds its state. The engine
reserves block 0 for padding.
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
    """Hold the plan of one forward, the same for all layers. Every request occurs once among singles and chunks.

    begun      blocks (n,) int64 of requests whose first tokens these are: their blocks still hold what was there before
    over       blocks (n,) int64 of requests whose prompt ended before these tokens, and not before earlier ones
    singles    blocks (n,) int64 of requests with one token each
    seen       (n,) int64, the number of tokens that each of these requests took in before
    places     (n,) int64, the index of that token in the forward
    chunks     (block, start, stop) of each other request: its tokens are those with start <= index < stop
    report     True if a log line about what the requests hold is due
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
        """Return the step of one token of each request in `singles`, prepared once, by the first layer's pool."""
        if self._step is None:
            self._step = pool.batch(self.singles, self.seen)
        return self._step

    def places_on(self, device: torch.device) -> Tensor:
        """Return `places` on the device of the forward, where they are copied to once."""
        if self._there is None:
            self._there = self.places.to(device, non_blocking=True)
        return self._there

    def require_finite(self) -> None:
        """Raise ValueError if a query, key or value of this forward was NaN or infinite and no pool has said so yet.

        The call waits until a device is done with the forward.
        """
        if self._step is not None:
            self._step.require_finite()

    @property
    def blocks(self) -> Tensor:
        """Return the blocks (n,) of all requests."""
        return torch.cat([self.singles, torch.tensor([chunk[0] for chunk in self.chunks], dtype=torch.int64)])


class Planner:
    """Plan each forward from the engine's own numbers, and remember which prompts are over."""

    def __init__(self) -> None:
        self._over = torch.zeros(0, dtype=torch.bool)  # per block: the prompt of its request is over

    def plan(self, starts: Tensor, lengths: Tensor, blocks: Tensor, prompting: Tensor, report: bool = False) -> Plan:
        """Return the plan of a forward of n requests.

        starts     (n + 1,) index of each request's first token in the forward, and the end of the last
        lengths    (n,) tokens of each request, those of this forward included
        blocks     (n,) block of each request
        prompting  (n,) bool, True where the first of these tokens belongs to the prompt
        report     passed on to the plan
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
