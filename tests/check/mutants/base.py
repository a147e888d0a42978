"""Define the small correct methods that most mutants derive from; their state class can be replaced."""

from dataclasses import dataclass, field
from typing import ClassVar

from kvfloor import Bounded, Spec
from kvfloor.core.bounded import BoundedState
from kvfloor.core.budget import Budget, tokens
from kvfloor.core.policy import Policy
from kvfloor.methods.policies.heavy_hitters import HeavyHitters
from kvfloor.methods.policies.window import Window


@dataclass(frozen=True)
class Small(Bounded):
    """Keep a window of 16 tokens, evicting in blocks of 4."""

    state: ClassVar[type[BoundedState]] = BoundedState
    policy: Policy = field(default_factory=Window)
    budget: Budget | None = 16
    block: int = 4

    def open(self, spec: Spec) -> BoundedState:
        return self.state(self, spec, tokens(self.budget, spec.rows))

    def __str__(self) -> str:
        return f"{type(self).__module__}:{type(self).__qualname__}"


@dataclass(frozen=True)
class SmallObserving(Small):
    """Keep 16 heavy hitters, evicting in blocks of 4."""

    policy: Policy = field(default_factory=lambda: HeavyHitters(sinks=2, recent=4))
