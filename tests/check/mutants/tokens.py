"""Break the choice of held tokens, and the handling of evicted ones."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvfloor import Spec
from kvfloor.core.bounded import Bounded, BoundedState
from kvfloor.core.partial import Partial
from kvfloor.core.policy import Held
from kvfloor.core.slots import Slots
from mutants.base import small


@small
class EvictsPerCall(BoundedState):
    """Break chunking: evict at the end of every call rather than at the end of every block."""

    def _feed(self, k: Tensor, v: Tensor, q: Tensor | None, count: Tensor) -> Partial | None:
        answers = super()._feed(k, v, q, count)
        self._evict(torch.arange(self.spec.rows))
        return answers


@small
class PadsEnter(BoundedState):
    """Break padding: store the pads too, after the real tokens."""

    def _arrange(self, k: Tensor, v: Tensor, q: Tensor | None, present: Tensor | None) -> tuple[Tensor, Tensor | None]:
        take, order = super()._arrange(k, v, q, present)
        return torch.full_like(take, k.shape[1]), order


@small
class OneTooMany(BoundedState):
    """Break the budget: evict one token too many."""

    def __init__(self, method: Bounded, spec: Spec, budgets: list[int]) -> None:
        super().__init__(method, spec, budgets)
        self.budget = self.budget - 1


@small
class OneTooFew(BoundedState):
    """Break the budget: evict one token too few."""

    def __init__(self, method: Bounded, spec: Spec, budgets: list[int]) -> None:
        super().__init__(method, spec, budgets)
        self.budget = self.budget + 1


class LazySlots(Slots):
    def evict(self, leaving: Tensor, count: Tensor | None = None) -> None:
        values = self.v.clone()
        super().evict(leaving, count)
        self.v.copy_(values)


@small
class ValuesStay(BoundedState):
    """Break eviction: move keys and positions into the freed slots, but not the values."""

    def __init__(self, method: Bounded, spec: Spec, budgets: Sequence[int]) -> None:
        super().__init__(method, spec, list(budgets))
        self.slots = LazySlots(spec, [budget + method.block for budget in budgets])


@small
class PinsForgotten(BoundedState):
    """Break pins: evict pinned tokens as well."""

    def _protected(self, held: Held) -> Tensor:
        return torch.zeros_like(held.position, dtype=torch.bool)


@small
class AbsorbedTwice(BoundedState):
    """Break the summary: absorb the token at the window's edge once before its eviction and once at it."""

    def _evict(self, rows: Tensor) -> None:
        if self.summary is not None:
            slots = self.slots
            oldest = slots.position.view(self.spec.rows, -1) == (self.seen - 16).unsqueeze(1)
            held = torch.arange(oldest.shape[1]) < slots.held.unsqueeze(1)
            self.summary.absorb(*slots.flat(oldest & held))
        super()._evict(rows)
