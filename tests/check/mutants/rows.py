"""Break the independence of rows and the sources of randomness."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kvfloor import Partial, Spec
from kvfloor.core.bounded import BoundedState
from kvfloor.core.policy import Held, Policy
from kvfloor.core.randomness import row_keys, uniform
from kvfloor.methods.policies.random import Random
from mutants.base import Small


@dataclass(frozen=True)
class PlacePolicy(Random):
    """Draw by the row's place in the batch."""

    def priority(self, held: Held) -> Tensor:
        return super().priority(replace(held, row_ids=torch.arange(len(held.row_ids))))


@dataclass(frozen=True)
class KeyedByPlace(Small):
    """Break row order: a random sample depends on the row's place in the batch."""

    policy: Policy = field(default_factory=PlacePolicy)


@dataclass(frozen=True)
class RelativePolicy(Random):
    """Draw by the distance to the batch's smallest row id."""

    def priority(self, held: Held) -> Tensor:
        keys = row_keys(held.spec.seed, held.row_ids - min(held.spec.row_ids or (0,)), "relative")
        return uniform(keys.unsqueeze(1), held.position)


@dataclass(frozen=True)
class RelativeIds(Small):
    """Break the independence of rows: a random sample depends on which other rows are in the batch."""

    policy: Policy = field(default_factory=RelativePolicy)


class SharedStabiliserState(BoundedState):
    def _answer(self, q: Tensor, new_k: Tensor, new_v: Tensor, before: Tensor) -> Partial:
        part = super()._answer(q, new_k, new_v, before)
        largest = self.slots.view().k.abs().max()
        return Partial((part.mean + largest) - largest, part.log_mass)


class SharedStabiliser(Small):
    """Break row isolation: shift answers by the largest key entry of the batch and back, which rounds them."""

    state = SharedStabiliserState


class IdsStayState(BoundedState):
    def select_rows(self, index: Tensor) -> None:
        super().select_rows(index)
        self.spec = replace(self.spec, row_ids=None)


class IdsStay(Small):
    """Break `select_rows`: number the selected rows anew."""

    state = IdsStayState


class GlobalDraw(Small):
    """Break seeding: draw from torch's global generator."""

    def open(self, spec: Spec) -> BoundedState:
        torch.randn(spec.d)
        return super().open(spec)
