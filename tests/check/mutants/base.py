"""Define the small correct methods that most mutants derive from; their state class can be replaced."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

from kvfloor import Bounded, Spec
from kvfloor.core.bounded import BoundedState
from kvfloor.core.budget import Budget, tokens
from kvfloor.core.policy import Policy
from kvfloor.methods.policies.heavy_hitters import HeavyHitters
from kvfloor.methods.policies.window import Window
from kvfloor.methods.summaries.value_sum import ValueSum, ValueSumState


class Named:
    """Write a method's text as the place of its class."""

    def __str__(self) -> str:
        return f"{type(self).__module__}:{type(self).__qualname__}"


@dataclass(frozen=True)
class Small(Named, Bounded):
    """Keep a window of 16 tokens, evicting in blocks of 4."""

    state: ClassVar[type[BoundedState]] = BoundedState
    policy: Policy = field(default_factory=Window)
    budget: Budget | None = 16
    block: int = 4

    def open(self, spec: Spec) -> BoundedState:
        return self.state(self, spec, tokens(self.budget, spec.rows))


@dataclass(frozen=True)
class SmallObserving(Small):
    """Keep 16 heavy hitters, evicting in blocks of 4."""

    policy: Policy = field(default_factory=lambda: HeavyHitters(sinks=2, recent=4))


def small(state: type[BoundedState], like: type[Small] = Small) -> Callable[[], Small]:
    """Make the small method that has these states, under their name and docstring."""
    named = {"__module__": state.__module__, "__qualname__": state.__qualname__, "__doc__": state.__doc__}
    return type(state.__name__, (like,), named | {"state": state})


def small_observing(state: type[BoundedState]) -> Callable[[], Small]:
    return small(state, SmallObserving)


def summing(state: type[ValueSumState]) -> type[ValueSum]:
    """Make the sum of values that has these states, under their name and docstring."""
    named = {"__module__": state.__module__, "__qualname__": state.__qualname__, "__doc__": state.__doc__}
    return type(state.__name__, (ValueSum,), named | {"open": lambda self, spec: state(spec)})
