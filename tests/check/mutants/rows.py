"""Wrong lines about rows and about where chance comes from."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvfloor import Partial, Spec
from kvfloor.core.bounded import BoundedState
from kvfloor.core.policy import Held
from kvfloor.core.randomness import row_keys, uniform
from kvfloor.methods.policies.random import Random
from mutants.base import Small, small


@dataclass(frozen=True)
class KeyedByPlace(Random):
    """A random sample that depends on where in the batch a row sits."""

    def priority(self, held: Held) -> Tensor:
        return super().priority(replace(held, row_ids=torch.arange(len(held.row_ids))))


@dataclass(frozen=True)
class RelativeIds(Random):
    """A random sample that depends on which other rows are in the batch, by the distance to their smallest id."""

    def priority(self, held: Held) -> Tensor:
        keys = row_keys(held.spec.seed, held.row_ids - min(held.spec.row_ids or (0,)), "relative")
        return uniform(keys.unsqueeze(1), held.position)


@small
class SharedStabiliser(BoundedState):
    """Shifts by the largest number of the whole batch, which rounds away other bits beside other rows."""

    def _answer(self, q: Tensor, new_k: Tensor, new_v: Tensor, before: Tensor) -> Partial:
        part = super()._answer(q, new_k, new_v, before)
        largest = self.slots.view().k.abs().max()
        return Partial((part.mean + largest) - largest, part.log_mass)


@small
class IdsStay(BoundedState):
    """Numbers the rows anew when some are selected."""

    def select_rows(self, index: Tensor) -> None:
        super().select_rows(index)
        self.spec = replace(self.spec, row_ids=None)


class GlobalDraw(Small):
    """Draws a start value from torch's global generator."""

    def open(self, spec: Spec) -> BoundedState:
        torch.randn(spec.d)
        return super().open(spec)
