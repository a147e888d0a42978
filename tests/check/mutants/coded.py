"""Break the coding of held tokens in few bits per number."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvfloor import Spec
from kvfloor.core.bounded import Bounded, BoundedState
from kvfloor.core.budget import Budget
from kvfloor.core.policy import Policy
from kvfloor.core.store import Store
from kvfloor.methods.policies.heavy_hitters import HeavyHitters
from kvfloor.methods.policies.random import Random
from kvfloor.methods.stores.coded import Coded, CodedSlots
from kvfloor.methods.stores.codes import TokenCodes
from mutants.base import Small


@dataclass(frozen=True)
class SmallCoded(Small):
    """Keep 48 heavy hitters in 4 bits per number, evicting in blocks of 8: so many that several groups are coded."""

    policy: Policy = field(default_factory=lambda: HeavyHitters(sinks=2, recent=4))
    budget: Budget | None = 48
    block: int = 8
    store: Store = field(default_factory=lambda: Coded(4, 4, first=0))


@dataclass(frozen=True)
class DenseCoded(SmallCoded):
    """Keep 8 random tokens in 4 bits per number, of a prompt that is kept whole, and coded, until it ends."""

    policy: Policy = field(default_factory=Random)
    budget: Budget | None = 8
    block: int = 1
    prefill: Any = "dense"


def storing(slots: type[CodedSlots], like: type[SmallCoded] = SmallCoded) -> Callable[[], SmallCoded]:
    """Make the small method whose tokens are in these slots, under their name and docstring."""

    class Storing(BoundedState):
        def __init__(self, method: Bounded, spec: Spec, budgets: Sequence[int]) -> None:
            super().__init__(method, spec, list(budgets))
            assert isinstance(method.store, Coded) and isinstance(self.slots, CodedSlots)
            self.slots = slots(
                spec, self.slots.capacity.tolist(), method.store, self.slots.group, method.policy.columns
            )

    named = {"__module__": slots.__module__, "__qualname__": slots.__qualname__, "__doc__": slots.__doc__}
    return type(slots.__name__, (like,), named | {"state": Storing})


@storing
class CodedAgain(CodedSlots):
    """Break coding once and for good: at every block's end code the keys anew, about the mean of those held now."""

    def settle(self, seen: Tensor, rows: Tensor | None) -> None:
        super().settle(seen, rows)
        part, first = self.key_codes, torch.zeros(1, dtype=torch.int64)
        for row in range(self.spec.rows) if rows is None else rows.tolist():
            here, held = torch.tensor([row]), int(self.held[row])
            k = self.numbers("k", here, held).to(self.spec.compute_dtype)
            for name, entries in part.encode(here, first, k, torch.ones(held, dtype=torch.bool)).items():
                getattr(part, name)[self.live(here)] = entries[0]


@storing
class CodedPerCall(CodedSlots):
    """Break chunking: round the new tokens at once, by the largest number that came in the same call."""

    def push(self, k: Tensor, v: Tensor, position: Tensor, take: Tensor, bare: Tensor | None = None) -> None:
        step = v.abs().amax((1, 2), keepdim=True).clamp_min(1e-9) / 8
        super().push(k, (v / step).round() * step, position, take, bare)

    def put(self, k: Tensor, v: Tensor, position: int, bare: Tensor | None = None) -> None:
        step = v.abs().amax((1, 2), keepdim=True).clamp_min(1e-9) / 8
        super().put(k, (v / step).round() * step, position, bare)


@storing
class SharedLength(CodedSlots):
    """Break the independence of rows: give the coded keys of all rows one length, the mean of theirs."""

    def settle(self, seen: Tensor, rows: Tensor | None) -> None:
        before = self.coded
        super().settle(seen, rows)
        if isinstance(self.key_codes, TokenCodes) and bool((self.coded > before).any()):
            self.key_codes.scale[self.live()] = self.key_codes.scale[self.live()].mean()


@storing
class CodedInMessage(CodedSlots):
    """Break messages: round the newest values where a message is made of them, and nowhere else."""

    def export(self) -> dict[str, Any]:
        sent = super().export()
        return sent | {"fresh_v": sent["fresh_v"].bfloat16().to(self.spec.dtype)}


@partial(storing, like=DenseCoded)
class LeftBehind(CodedSlots):
    """Break evictions: move the position of a token that fills a freed slot, but leave its codes where they were."""

    def evict(self, leaving: Tensor, count: Tensor | None = None) -> None:
        codes = [(getattr(part, name), getattr(part, name).clone()) for part in self.parts for name in part.own]
        super().evict(leaving, count)
        for moved, before in codes:
            moved.copy_(before)
