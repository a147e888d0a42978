"""Wrong lines about what an answer weighs."""

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
    """A causal mask off by one: every token sees the one after it."""

    def _answer(self, q: Tensor, new_k: Tensor, new_v: Tensor, before: Tensor) -> Partial:
        return self._among_all(q.flatten(1, 2), q.shape[1], before + 1).shaped(*q.shape[:3])


@small
class TurnsByAge(BoundedState):
    """Takes a query's place for its token's number in the stream instead of among what is held."""

    def _newest(self, q: Tensor) -> Tensor:
        newest = (self.seen - 1).clamp_min(0).unsqueeze(1)
        return self._turned(q.unsqueeze(1), newest, int(self.seen.max()) + 1).squeeze(1)


@small
class CrowdTemperature(BoundedState):
    """Limits a query by the largest entry of all queries that are asked with it."""

    def _read(self, q: Tensor) -> Partial:
        limit, largest = 8.0, float(q.abs().max()) if q.numel() else 0.0
        return super()._read(q * (limit / max(limit, largest)))


@summing
class CountsTwice(ValueSumState):
    """A sum of values that counts each evicted token twice."""

    def absorb(self, row: Tensor, k: Tensor, v: Tensor, position: Tensor) -> None:
        super().absorb(row, k, v, position)
        self.count = self.count.index_add(0, row, torch.ones_like(row))


@dataclass(frozen=True)
class ReadsGhosts(TopK):
    """Reads slots whose tokens have left, once rows differ in how much they hold."""

    def hide(self, q: Tensor, view: View, spec: Spec, hide: Tensor | None) -> Tensor | None:
        return super().hide(q, view, spec, hide if view.live is None else None)


@dataclass(frozen=True)
class ReadsNothing(TopK):
    """Reads nothing where little is left to choose from."""

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
    """Chooses among slots whose tokens come later, too."""

    def open(self, spec: Spec, slots: Slots, shared: dict[str, Tensor], in_order: bool) -> PagesState:
        return ReadsAheadState(spec, slots, self)


@small
class NoSoftcap(BoundedState):
    """Forgets the softcap in `step`."""

    def _answer(self, q: Tensor, new_k: Tensor, new_v: Tensor, before: Tensor) -> Partial:
        capped, self.spec = self.spec, replace(self.spec, softcap=None)
        try:
            return super()._answer(q, new_k, new_v, before)
        finally:
            self.spec = capped


@small
class MassOff(BoundedState):
    """Its log-mass is off by a constant: the mean is right, every merge is wrong."""

    def _read(self, q: Tensor) -> Partial:
        part = super()._read(q)
        return Partial(part.mean, part.log_mass + 0.5)
