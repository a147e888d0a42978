"""Capture the device's work of a state's decode steps in graphs, and replay them: one launch instead of dozens.

A decode step gives one new token to every row, i.e. to every (batch item, kv head) stream. A CUDA graph repeats
recorded operations on the same addresses, with the numbers that the host gave them when they were recorded. A decode
step has two such numbers: the slot that the new token goes to, and the token's place in its block. Where a method
evicts a block of tokens after a block of tokens, both repeat, so a graph for each pair serves the whole stream.
Evictions are not captured, as the host gives them the counts of tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kvfloor.core.blocked import Blocked


class Captured(Protocol):
    """Define a captured graph: `replay` repeats its operations."""

    def replay(self) -> None:
        """Repeat the recorded operations, on the addresses and with the host's numbers of the recording."""
        ...


Capture = Callable[[Callable[[], Tensor]], tuple[Captured, Tensor]]
"""A function that records the operations of a call without executing them; it returns them and the call's result."""


def capture_cuda(work: Callable[[], Tensor]) -> tuple[Captured, Tensor]:
    """Record the operations of `work` in a CUDA graph; return the graph and the tensor that its replays write."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = work()
    return graph, out


class StepGraphs:
    """Hold the captured decode steps of one state; give it to `Blocked.replay_steps`.

    A captured step is used for the slot and the place in a block that it was captured for, as long as the state's
    memory stays at its addresses. Answers of replays lie in a tensor that later replays overwrite.
    """

    def __init__(self, capture: Capture = capture_cuda) -> None:
        self.capture = capture
        self.captured: dict[tuple[int, int, bool], tuple[Captured, Tensor]] = {}
        self.given: tuple[Tensor, Tensor, Tensor] | None = None  # k, v and q, at the addresses that graphs read
        self.at: list[Any] = []  # the tensors that graphs read and write

    def step(self, state: Blocked[Any], k: Tensor, v: Tensor, q: Tensor, seen: int) -> Tensor:
        """Do what a decode step of `state` does but for counting `seen` and ending the block; return its outputs.

        k (rows, 1, d), v (rows, 1, dv), q (rows, g, 1, d). seen: number of tokens that every row saw before.
        """
        at = state.slots.level
        assert at is not None
        self._require_addresses(state)
        if self.given is None or self.given[2].shape != q.shape:
            self.given, self.captured = (torch.empty_like(k), torch.empty_like(v), torch.empty_like(q)), {}
        for given, x in zip(self.given, (k, v, q), strict=True):
            given.copy_(x)
        key = at, seen % state.block, state.sealed
        if key not in self.captured:
            state._work_one(at, seen, *self.given)  # a first run, which may allocate what a graph may not
            self._require_addresses(state)
            held = self.given
            self.captured[key] = self.capture(lambda: state._work_one(at, seen, *held))
        graph, out = self.captured[key]
        graph.replay()
        state.slots.number_from(at, seen)
        state.slots.count_one()
        state._count_query(seen)
        return out

    def _require_addresses(self, state: Blocked[Any]) -> None:
        """Drop all graphs if a tensor that they read or write has been replaced."""
        now = [state.slots.k, state.slots.v, getattr(state, "queries", None)]
        if len(self.at) != len(now) or any(a is not b for a, b in zip(self.at, now, strict=True)):
            self.at, self.captured = now, {}
