"""Break the weights of answers."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvfloor import Partial, Spec
from kvfloor.core.bounded import BoundedState
from kvfloor.core.selector import Chosen
from kvfloor.core.slots import Slots, View
from kvfloor.methods.selectors.pages import Pages, PagesState
from kvfloor.methods.selectors.top_k import TopK
from kvfloor.methods.summaries.value_sum import ValueSumState
from mutants.base import small, summing


@small
class FutureLeak(BoundedState):
    """Break causality: the mask is off by one, so that every token attends to the next one."""

    def _answer(self, q: Tensor, new_k: Tensor, new_v: Tensor, before: Tensor) -> Partial:
        return self._among_all(q.flatten(1, 2), q.shape[1], before + 1).shaped(*q.shape[:3])


@small
class TurnsByAge(BoundedState):
    """Break rotation: place a query at its token's number in the stream instead of its place among the held tokens."""

    def _newest(self, q: Tensor) -> Tensor:
        newest = (self.seen - 1).clamp_min(0).unsqueeze(1)
        return self._turned(q.unsqueeze(1), newest, int(self.seen.max()) + 1).squeeze(1)


@small
class CrowdTemperature(BoundedState):
    """Break the independence of queries: scale each one by the largest entry of all queries in the call."""

    def _read(self, q: Tensor) -> Partial:
        limit, largest = 8.0, float(q.abs().max()) if q.numel() else 0.0
        return super()._read(q * (limit / max(limit, largest)))


@summing
class CountsTwice(ValueSumState):
    """Break the count of evicted tokens: the summary counts each of them twice."""

    def absorb(self, row: Tensor, k: Tensor, v: Tensor, position: Tensor) -> None:
        super().absorb(row, k, v, position)
        self.count = self.count.index_add(0, row, torch.ones_like(row))


@dataclass(frozen=True)
class ReadsGhosts(TopK):
    """Break selection: the selector reads slots whose tokens were evicted."""

    def hide(self, q: Tensor, view: View, spec: Spec, hide: Tensor | None) -> Tensor | None:
        return super().hide(q, view, spec, hide if view.live is None else None)


@dataclass(frozen=True)
class ReadsNothing(TopK):
    """Break selection: the selector reads nothing for a query with few tokens to choose from."""

    def hide(self, q: Tensor, view: View, spec: Spec, hide: Tensor | None) -> Tensor | None:
        unread = super().hide(q, view, spec, hide)
        if hide is None or unread is None:
            return unread
        few = (~hide).sum(-1, keepdim=True) <= 2
        return unread | (few & (view.k.shape[1] > self.k))


class ReadsAheadState(PagesState):
    def choose(self, q: Tensor, slots: Slots, visible: Tensor, rows: Tensor | None = None) -> Chosen:
        return super().choose(q, slots, torch.full_like(visible, int(slots.held.max())), rows)


@dataclass(frozen=True)
class ReadsAhead(Pages):
    """Break selection: the index also chooses slots of tokens after the query's own."""

    def open(self, spec: Spec, slots: Slots, shared: dict[str, Tensor], in_order: bool) -> PagesState:
        return ReadsAheadState(spec, slots, self)


@small
class NoSoftcap(BoundedState):
    """Break the attention law: `step` leaves out the softcap."""

    def _answer(self, q: Tensor, new_k: Tensor, new_v: Tensor, before: Tensor) -> Partial:
        capped, self.spec = self.spec, replace(self.spec, softcap=None)
        try:
            return super()._answer(q, new_k, new_v, before)
        finally:
            self.spec = capped


@small
class MassOff(BoundedState):
    """Break merging: the log-mass is off by a constant, so that the mean is right and every merge is wrong."""

    def _read(self, q: Tensor) -> Partial:
        part = super()._read(q)
        return Partial(part.mean, part.log_mass + 0.5)
