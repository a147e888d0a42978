"""The selector's interface, declared for its callers `Exact` and `Bounded`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvfloor.core.memory import Memory
from kvfloor.core.slots import Slots, View
from kvfloor.core.spec import Spec


@dataclass(frozen=True)
class Chosen:
    """The slots that queries read: index (r, m, c) int64, each slot at most once; dead (r, m, c) marks no choice."""

    index: Tensor
    dead: Tensor

    def unread(self, width: int) -> Tensor:
        """The same as a mask (r, m, width): True where a slot is not read."""
        r, m, _ = self.index.shape
        hide = torch.ones(r, m, width + 1, dtype=torch.bool, device=self.index.device)
        return hide.scatter_(2, self.index.masked_fill(self.dead, width), False)[..., :width]


class SelectorState(Memory, ABC):
    """What a selector remembers of the held tokens, kept in step with the slots; `spec` says for what.

    Rows are the first axis of every tensor, or the part that holds it selects rows itself. Choices rest on float64
    scores and break ties by the slot, so that they do not depend on the shape of the call.
    """

    spec: Spec

    @abstractmethod
    def append(self, slots: Slots, before: Tensor) -> None:
        """Slots before[r] <= slot < held[r] of each row are new."""

    @abstractmethod
    def evict(self, slots: Slots, leaving: Tensor) -> None:
        """The slots marked in leaving (rows, width) have been emptied, and tokens from the end moved into them."""

    def resize(self, slots: Slots) -> None:
        """The rows' capacities have changed while no token came or went."""

    def close(self, slots: Slots, rows: Tensor | None) -> None:
        """A block of these rows (None: all) is complete, and what had to leave has left."""

    def seal(self) -> None:
        """The prompt is over."""

    @abstractmethod
    def choose(self, q: Tensor, slots: Slots, visible: Tensor, rows: Tensor | None = None) -> Chosen:
        """What each query of q (r, m, d) reads by itself of the first visible (r, m) slots of `rows`; pure.

        It sees all slots that were held when tokens last left, or more; if it sees any, it reads one.
        """

    def follow(self, q: Tensor, slots: Slots, visible: Tensor, position: Tensor) -> Chosen:
        """As `choose`, flattened to (rows, g*a), for the queries q (rows, g, a, d) of the newest tokens.

        visible and position are (rows, a): a query sees up to its own token, whose place in the stream is
        `position`, or -1 where the row has no such token. A choice may be remembered.
        """
        del position
        return self.choose(q.flatten(1, 2), slots, visible.repeat(1, q.shape[1]))

    @abstractmethod
    def bytes_read(self, held: Tensor) -> int:
        """Bytes of index, keys and values that one query per row touches when held (rows,) tokens are kept."""


class Selector(ABC):
    """Frozen configuration of a choice among held tokens. One that keeps an index of them derives from `Indexed`."""

    name: ClassVar[str]
    paper: ClassVar[str] = ""

    @abstractmethod
    def hide(self, q: Tensor, view: View, spec: Spec, hide: Tensor | None) -> Tensor | None:
        """What q (rows, m, d) does not read: bool (rows or 1, m or 1, s), a superset of `hide`, or None."""

    @abstractmethod
    def bytes_read(self, held: Tensor, spec: Spec) -> int:
        """Bytes of keys and values that one query per row touches when held (rows,) tokens are kept."""


class Indexed(Selector):
    """A selector that remembers something of the held tokens: its state chooses."""

    @abstractmethod
    def open(self, spec: Spec, slots: Slots, shared: dict[str, Tensor], in_order: bool) -> SelectorState:
        """Memory for these empty slots, which stay in order of arrival for ever if `in_order`.

        Public tensors, which follow from selector and spec alone, go into the owner's `shared`.
        """

    def block(self) -> int | None:
        """Tokens between two calls of `close` where no policy sets them; None if that does not matter."""
        return None

    def hide(self, q: Tensor, view: View, spec: Spec, hide: Tensor | None) -> Tensor | None:
        del q, view, spec, hide
        raise TypeError(f"{self.name} keeps an index: its state chooses, given the slots")

    def bytes_read(self, held: Tensor, spec: Spec) -> int:
        del held, spec
        raise TypeError(f"{self.name} keeps an index: its state knows what it reads")


@dataclass(frozen=True)
class Everything(Selector):
    """The default: nothing held is left unread."""

    name: ClassVar[str] = "everything"

    def hide(self, q: Tensor, view: View, spec: Spec, hide: Tensor | None) -> Tensor | None:
        del q, view, spec
        return hide

    def bytes_read(self, held: Tensor, spec: Spec) -> int:
        return int(held.sum()) * (spec.d + spec.dv) * spec.dtype.itemsize
