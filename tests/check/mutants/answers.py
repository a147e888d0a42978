"""Break the weights of answers."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kvfloor import Partial, Spec
from kvfloor.core.bounded import BoundedState
from kvfloor.core.selector import Chosen, Selector
from kvfloor.core.slots import Slots, View
from kvfloor.core.summary import Summary
from kvfloor.methods.selectors.pages import Pages, PagesState
from kvfloor.methods.selectors.top_k import TopK
from kvfloor.methods.summaries.value_sum import ValueSum, ValueSumState
from mutants.base import Small


class FutureLeakState(BoundedState):
    def _answer(self, q: Tensor, new_k: Tensor, new_v: Tensor, before: Tensor) -> Partial:
        return self._among_all(q.flatten(1, 2), q.shape[1], before + 1).shaped(*q.shape[:3])


class FutureLeak(Small):
    """Break causality: the mask is off by one, so that every token attends to the next one."""

    state = FutureLeakState


class TurnsByAgeState(BoundedState):
    def _newest(self, q: Tensor) -> Tensor:
        newest = (self.seen - 1).clamp_min(0).unsqueeze(1)
        return self._turned(q.unsqueeze(1), newest, int(self.seen.max()) + 1).squeeze(1)


class TurnsByAge(Small):
    """Break rotation: place a query at its token's number in the stream instead of its place among the held tokens."""

    state = TurnsByAgeState


class CrowdTemperatureState(BoundedState):
    def _read(self, q: Tensor) -> Partial:
        limit, largest = 8.0, float(q.abs().max()) if q.numel() else 0.0
        return super()._read(q * (limit / max(limit, largest)))


class CrowdTemperature(Small):
    """Break the independence of queries: scale each one by the largest entry of all queries in the call."""

    state = CrowdTemperatureState


class CountsTwiceState(ValueSumState):
    def absorb(self, row: Tensor, k: Tensor, v: Tensor, position: Tensor) -> None:
        super().absorb(row, k, v, position)
        self.count = self.count.index_add(0, row, torch.ones_like(row))


@dataclass(frozen=True)
class CountingTwice(ValueSum):
    """Sum each evicted token's value once, but count the token twice."""

    def open(self, spec: Spec) -> ValueSumState:
        return CountsTwiceState(spec)


@dataclass(frozen=True)
class CountsTwice(Small):
    """Break the count of evicted tokens: the summary counts each of them twice."""

    summary: Summary = field(default_factory=CountingTwice)


@dataclass(frozen=True)
class Ghostly(TopK):
    """Choose among hidden slots too, once rows hold different numbers of tokens."""

    def hide(self, q: Tensor, view: View, spec: Spec, hide: Tensor | None) -> Tensor | None:
        return super().hide(q, view, spec, hide if view.live is None else None)


@dataclass(frozen=True)
class ReadsGhosts(Small):
    """Break selection: the selector reads slots whose tokens were evicted."""

    selector: Selector = field(default_factory=lambda: Ghostly(k=6))


@dataclass(frozen=True)
class Starving(TopK):
    """Read nothing for a query that may attend to two slots at most, once more than k slots are there."""

    def hide(self, q: Tensor, view: View, spec: Spec, hide: Tensor | None) -> Tensor | None:
        unread = super().hide(q, view, spec, hide)
        if hide is None or unread is None:
            return unread
        few = (~hide).sum(-1, keepdim=True) <= 2
        return unread | (few & (view.k.shape[1] > self.k))


@dataclass(frozen=True)
class ReadsNothing(Small):
    """Break selection: the selector reads nothing for a query with few tokens to choose from."""

    selector: Selector = field(default_factory=lambda: Starving(k=6))


class AllBoxesState(PagesState):
    def choose(self, q: Tensor, slots: Slots, visible: Tensor, rows: Tensor | None = None) -> Chosen:
        return super().choose(q, slots, torch.full_like(visible, int(slots.held.max())), rows)


@dataclass(frozen=True)
class AllBoxes(Pages):
    """Choose among all slots, also those that a query may not attend to."""

    def open(self, spec: Spec, slots: Slots, shared: dict[str, Tensor], in_order: bool) -> PagesState:
        return AllBoxesState(spec, slots, self)


@dataclass(frozen=True)
class ReadsAhead(Small):
    """Break selection: the index also chooses slots of tokens after the query's own."""

    selector: Selector = field(default_factory=lambda: AllBoxes(pages=1, page=2))


class NoSoftcapState(BoundedState):
    def _answer(self, q: Tensor, new_k: Tensor, new_v: Tensor, before: Tensor) -> Partial:
        capped, self.spec = self.spec, replace(self.spec, softcap=None)
        try:
            return super()._answer(q, new_k, new_v, before)
        finally:
            self.spec = capped


class NoSoftcap(Small):
    """Break the attention law: `step` leaves out the softcap."""

    state = NoSoftcapState


class MassOffState(BoundedState):
    def _read(self, q: Tensor) -> Partial:
        part = super()._read(q)
        return Partial(part.mean, part.log_mass + 0.5)


class MassOff(Small):
    """Break merging: the log-mass is off by a constant, so that the mean is right and every merge is wrong."""

    state = MassOffState
