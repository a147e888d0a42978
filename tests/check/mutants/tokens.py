"""Break the choice of held tokens, and the handling of evicted ones."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvfloor import Spec
from kvfloor.core.bounded import Bounded, BoundedState
from kvfloor.core.partial import Partial
from kvfloor.core.policy import Held
from kvfloor.core.slots import Slots
from mutants.base import Small


class EvictsPerCallState(BoundedState):
    def _feed(self, k: Tensor, v: Tensor, q: Tensor | None, count: Tensor) -> Partial | None:
        answers = super()._feed(k, v, q, count)
        self._evict(torch.arange(self.spec.rows))
        return answers


class EvictsPerCall(Small):
    """Break chunking: evict at the end of every call rather than at the end of every block."""

    state = EvictsPerCallState


class PadsEnterState(BoundedState):
    def _arrange(self, k: Tensor, v: Tensor, q: Tensor | None, present: Tensor | None) -> tuple[Tensor, Tensor | None]:
        take, order = super()._arrange(k, v, q, present)
        return torch.full_like(take, k.shape[1]), order


class PadsEnter(Small):
    """Break padding: store the pads too, after the real tokens."""

    state = PadsEnterState


class OneTooManyState(BoundedState):
    def __init__(self, method: Bounded, spec: Spec, budgets: list[int]) -> None:
        super().__init__(method, spec, budgets)
        self.budget = self.budget - 1


class OneTooMany(Small):
    """Break the budget: evict one token too many."""

    state = OneTooManyState


class OneTooFewState(BoundedState):
    def __init__(self, method: Bounded, spec: Spec, budgets: list[int]) -> None:
        super().__init__(method, spec, budgets)
        self.budget = self.budget + 1


class OneTooFew(Small):
    """Break the budget: evict one token too few."""

    state = OneTooFewState


class LazySlots(Slots):
    def evict(self, leaving: Tensor) -> None:
        values = self.v.clone()
        super().evict(leaving)
        self.v = values


class ValuesStayState(BoundedState):
    def __init__(self, method: Bounded, spec: Spec, budgets: Sequence[int]) -> None:
        super().__init__(method, spec, list(budgets))
        self.slots = LazySlots(spec, [budget + method.block for budget in budgets])


class ValuesStay(Small):
    """Break eviction: move keys and positions into the freed slots, but not the values."""

    state = ValuesStayState


class PinsForgottenState(BoundedState):
    def _protected(self, held: Held) -> Tensor:
        return torch.zeros_like(held.position, dtype=torch.bool)


class PinsForgotten(Small):
    """Break pins: evict pinned tokens as well."""

    state = PinsForgottenState


class AbsorbedTwiceState(BoundedState):
    def _evict(self, rows: Tensor) -> None:
        if self.summary is not None:
            slots = self.slots
            oldest = slots.position.view(self.spec.rows, -1) == (self.seen - 16).unsqueeze(1)
            held = torch.arange(oldest.shape[1]) < slots.held.unsqueeze(1)
            self.summary.absorb(*slots.flat(oldest & held))
        super()._evict(rows)


class AbsorbedTwice(Small):
    """Break the summary: absorb the token at the window's edge once before its eviction and once at it."""

    state = AbsorbedTwiceState
