"""Break the independence of rows and the sources of randomness."""

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
    """Break row order: a random sample depends on the row's place in the batch."""

    def priority(self, held: Held) -> Tensor:
        return super().priority(replace(held, row_ids=torch.arange(len(held.row_ids))))


@dataclass(frozen=True)
class RelativeIds(Random):
    """Break the independence of rows: a random sample depends on which other rows are in the batch."""

    def priority(self, held: Held) -> Tensor:
        keys = row_keys(held.spec.seed, held.row_ids - min(held.spec.row_ids or (0,)), "relative")
        return uniform(keys.unsqueeze(1), held.position)


@small
class SharedStabiliser(BoundedState):
    """Break row isolation: shift answers by the largest key entry of the batch and back, which rounds them."""

    def _answer(self, q: Tensor, new_k: Tensor, new_v: Tensor, before: Tensor) -> Partial:
        part = super()._answer(q, new_k, new_v, before)
        largest = self.slots.view().k.abs().max()
        return Partial((part.mean + largest) - largest, part.log_mass)


@small
class IdsStay(BoundedState):
    """Break `select_rows`: number the selected rows anew."""

    def select_rows(self, index: Tensor) -> None:
        super().select_rows(index)
        self.spec = replace(self.spec, row_ids=None)


class GlobalDraw(Small):
    """Break seeding: draw from torch's global generator."""

    def open(self, spec: Spec) -> BoundedState:
        torch.randn(spec.d)
        return super().open(spec)
