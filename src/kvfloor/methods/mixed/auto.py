"""Define the request to choose each layer's method for a number of bytes, from costs measured on the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, NoReturn

from kvfloor.core.budget import size_bytes
from kvfloor.core.method import Budget, Method, Traits
from kvfloor.core.spec import Spec

COMMAND = "kvfloor measure-layers --model MODEL --out ROWS.json"


@dataclass(frozen=True)
class Auto(Method):
    """Ask for the methods of all layers that cost the fewest nats in a number of bytes.

    rows    path of the file of measured costs (`kvfloor.methods.mixed.costs`)
    budget  bytes of one request's whole cache after a context whose length the user of the method states, e.g. "64MiB"
    `kvfloor.hf.mixed.chosen` makes a `Layered` method of it, for a model and a context. Raises ValueError for a budget
    in tokens or as a share.
    """

    name: ClassVar[str] = "auto"
    rows: str = ""
    budget: Budget | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.rows, str):
            raise TypeError(f"auto: rows is the path of a file of measured costs, got {self.rows!r}")
        if self.budget is not None and (not isinstance(self.budget, str) or size_bytes(self.budget) is None):
            raise ValueError(f"auto divides bytes among the layers: give a size such as @64MiB, not @{self.budget}")

    @property
    def traits(self) -> Traits:
        return Traits()

    @property
    def kinds(self) -> tuple[Method, ...]:
        """Return an empty tuple: no layer's method is chosen yet."""
        return ()

    def each(self, change: Callable[[Method], Method]) -> NoReturn:
        """Raise ValueError: no layer's method is chosen yet."""
        del change
        raise ValueError(_not_chosen(self))

    def with_budget(self, budget: Budget) -> Auto:
        return replace(self, budget=budget)

    def open(self, spec: Spec) -> NoReturn:
        """Raise ValueError: the methods of the layers are chosen for a model first."""
        del spec
        raise ValueError(_not_chosen(self))

    def capacity(self, n: int, prompt: int | None = None, pinned: int = 0) -> None:
        """Return None: no tokens are bounded before the methods are chosen."""
        del n, prompt, pinned


def _not_chosen(asked: Auto) -> str:
    return f"{asked} is chosen for a model: give it to CompressedCache(model, ..., context=TOKENS) or to kvfloor audit"
