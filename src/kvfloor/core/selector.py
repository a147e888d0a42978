"""Define the interface of a selector, which `Exact` and `Bounded` call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvfloor.core.memory import Memory
from kvfloor.core.slots import Slots, View
from kvfloor.core.spec import Spec


@dataclass(frozen=True)
class Chosen:
    """Hold the slots that queries read: index (r, m, c) int64, each at most once; dead (r, m, c) marks no choice."""

    index: Tensor
    dead: Tensor

    def unread(self, width: int) -> Tensor:
        """Return the choice as a mask (r, m, width): True where a slot is not read."""
        r, m, _ = self.index.shape
        hide = torch.ones(r, m, width + 1, dtype=torch.bool, device=self.index.device)
        return hide.scatter_(2, self.index.masked_fill(self.dead, width), False)[..., :width]


class SelectorState(Memory, ABC):
    """Store a selector's index of the held tokens, kept in step with the slots; `spec` is the state's spec.

    Rows are the first axis of every tensor, or the part that holds the tensor selects rows itself. Choices rest on
    float64 scores and break ties by the slot, so that they do not depend on the shape of the call.
    """

    spec: Spec

    @abstractmethod
    def append(self, slots: Slots, before: Tensor) -> None:
        """Index the new tokens: slots before[r] <= slot < held[r] of each row."""

    @abstractmethod
    def evict(self, slots: Slots, leaving: Tensor) -> None:
        """Update the index after the slots marked in leaving (rows, width) were emptied and refilled.

        Tokens from the end of each row have been moved into the emptied slots.
        """

    def require_fitting(self, fields: dict[str, Any], slots: dict[str, Any]) -> None:
        """Raise ValueError where the fields of a message do not belong to the fields of its slots."""

    def resize(self, slots: Slots) -> None:
        """Adapt to the rows' new capacities; no token came or was evicted."""

    def close(self, slots: Slots, rows: Tensor | None) -> None:
        """Act on the completed block of these rows (None: all), after the block's evictions."""

    def seal(self) -> None:
        """Handle the end of the prompt."""

    @abstractmethod
    def choose(self, q: Tensor, slots: Slots, visible: Tensor, rows: Tensor | None = None) -> Chosen:
        """Choose the slots that each query of q (r, m, d) reads among the first visible (r, m) slots of `rows`.

        The call changes nothing, and each query's choice is its own. A query sees all slots that were held at the last
        eviction, or more. It reads at least one slot if it sees any.
        """

    def follow(self, q: Tensor, slots: Slots, visible: Tensor, position: Tensor) -> Chosen:
        """Choose as `choose` does, flattened to (rows, g*a), for the queries q (rows, g, a, d) of the newest tokens.

        visible and position are (rows, a): a query sees up to its own token, whose place in the stream is
        `position`, or -1 where the row has no such token. The state may remember a choice.
        """
        del position
        return self.choose(q.flatten(1, 2), slots, visible.repeat(1, q.shape[1]))

    @abstractmethod
    def bytes_read(self, held: Tensor) -> int:
        """Return the bytes of index, keys and values that one query per row reads of held (rows,) tokens."""


class Selector(ABC):
    """Define a choice among held tokens by a frozen configuration.

    A selector that keeps an index of the held tokens derives from `Indexed`.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = ""

    @abstractmethod
    def hide(self, q: Tensor, view: View, spec: Spec, hide: Tensor | None) -> Tensor | None:
        """Return the mask of slots that q (rows, m, d) does not read: bool (rows or 1, m or 1, s), or None for no slot.

        The mask contains all of `hide`.
        """

    @abstractmethod
    def bytes_read(self, held: Tensor, spec: Spec) -> int:
        """Return the bytes of keys and values that one query per row reads of held (rows,) tokens."""


class Indexed(Selector):
    """Define a selector that keeps an index of the held tokens; its state makes the choices."""

    @abstractmethod
    def open(self, spec: Spec, slots: Slots, shared: dict[str, Tensor], in_order: bool) -> SelectorState:
        """Return an index of these empty slots, which stay in order of arrival for ever if `in_order`.

        Public tensors, which follow from selector and spec alone, go into the owner's `shared`.
        """

    def block(self) -> int | None:
        """Return the tokens between two calls of `close` where no policy sets them; None if any number will do."""
        return None

    def hide(self, q: Tensor, view: View, spec: Spec, hide: Tensor | None) -> Tensor | None:
        del q, view, spec, hide
        raise TypeError(f"{self.name} keeps an index: its state chooses, given the slots")

    def bytes_read(self, held: Tensor, spec: Spec) -> int:
        del held, spec
        raise TypeError(f"{self.name} keeps an index: its state knows what it reads")


@dataclass(frozen=True)
class Everything(Selector):
    """Read every held token for every query; the default."""

    name: ClassVar[str] = "everything"

    def hide(self, q: Tensor, view: View, spec: Spec, hide: Tensor | None) -> Tensor | None:
        del q, view, spec
        return hide

    def bytes_read(self, held: Tensor, spec: Spec) -> int:
        return int(held.sum()) * (spec.d + spec.dv) * spec.dtype.itemsize
