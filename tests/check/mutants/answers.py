"""Wrong lines about what an answer weighs."""

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
    """A causal mask off by one: every token sees the one after it."""

    state = FutureLeakState


class CrowdTemperatureState(BoundedState):
    def _read(self, q: Tensor) -> Partial:
        limit, largest = 8.0, float(q.abs().max()) if q.numel() else 0.0
        return super()._read(q * (limit / max(limit, largest)))


class CrowdTemperature(Small):
    """Limits a query by the largest entry of all queries that are asked with it."""

    state = CrowdTemperatureState


class CountsTwiceState(ValueSumState):
    def absorb(self, row: Tensor, k: Tensor, v: Tensor, position: Tensor) -> None:
        super().absorb(row, k, v, position)
        self.count = self.count.index_add(0, row, torch.ones_like(row))


@dataclass(frozen=True)
class CountingTwice(ValueSum):
    """Counts an evicted token once with its value and once more."""

    def open(self, spec: Spec) -> ValueSumState:
        return CountsTwiceState(spec)


@dataclass(frozen=True)
class CountsTwice(Small):
    """An unmasked window whose summary counts each evicted token twice."""

    summary: Summary = field(default_factory=CountingTwice)


@dataclass(frozen=True)
class Ghostly(TopK):
    """Forgets what was hidden once rows differ in how much they hold."""

    def hide(self, q: Tensor, view: View, spec: Spec, hide: Tensor | None) -> Tensor | None:
        return super().hide(q, view, spec, hide if view.live is None else None)


@dataclass(frozen=True)
class ReadsGhosts(Small):
    """Its selector reads slots whose tokens have left."""

    selector: Selector = field(default_factory=lambda: Ghostly(k=6))


@dataclass(frozen=True)
class Starving(TopK):
    """Reads only what is strictly above the threshold among what is not hidden."""

    def hide(self, q: Tensor, view: View, spec: Spec, hide: Tensor | None) -> Tensor | None:
        unread = super().hide(q, view, spec, hide)
        if hide is None or unread is None:
            return unread
        few = (~hide).sum(-1, keepdim=True) <= 2
        return unread | (few & (view.k.shape[1] > self.k))


@dataclass(frozen=True)
class ReadsNothing(Small):
    """Its selector reads nothing where little is left to choose from."""

    selector: Selector = field(default_factory=lambda: Starving(k=6))


class AllBoxesState(PagesState):
    def choose(self, q: Tensor, slots: Slots, visible: Tensor, rows: Tensor | None = None) -> Chosen:
        return super().choose(q, slots, torch.full_like(visible, int(slots.held.max())), rows)


@dataclass(frozen=True)
class AllBoxes(Pages):
    """Chooses among all slots, whatever a query may see of them."""

    def open(self, spec: Spec, slots: Slots, shared: dict[str, Tensor], in_order: bool) -> PagesState:
        return AllBoxesState(spec, slots, self)


@dataclass(frozen=True)
class ReadsAhead(Small):
    """Its index chooses among slots whose tokens come later, too."""

    selector: Selector = field(default_factory=lambda: AllBoxes(pages=1, page=2))


class NoSoftcapState(BoundedState):
    def _answer(self, q: Tensor, new_k: Tensor, new_v: Tensor, before: Tensor) -> Partial:
        capped, self.spec = self.spec, replace(self.spec, softcap=None)
        try:
            return super()._answer(q, new_k, new_v, before)
        finally:
            self.spec = capped


class NoSoftcap(Small):
    """Forgets the softcap in `step`."""

    state = NoSoftcapState


class MassOffState(BoundedState):
    def _read(self, q: Tensor) -> Partial:
        part = super()._read(q)
        return Partial(part.mean, part.log_mass + 0.5)


class MassOff(Small):
    """Its log-mass is off by a constant: the mean is right, every merge is wrong."""

    state = MassOffState
