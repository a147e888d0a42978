"""Define the interface of a selector, which picks the held tokens that a query reads.

The methods `Exact` (keeps all tokens) and `Bounded` (keeps at most a budget of tokens) call this interface.
A row is one (batch item, kv head) stream, and a slot the place of one held token; `Slots` stores the held keys and
values, and the spec has the sizes, dtype and constants that a method was opened for. An index is what a selector stores
about the held keys to find the tokens of large logit. A query sees a slot if the causal mask allows it, and reads the
slots that the selector chooses among these. A block is a fixed number of consecutive tokens of a row. In shapes, r are
the rows of a call, m queries per row, g query heads per kv head, a new tokens, s slots, d the width of a key.
"""

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
    """Hold the slots that each query reads: index (r, m, c) int64, at most c different slots for each of m queries.

    dead (r, m, c), bool, is True for entries of index that are padding and name no slot.
    """

    index: Tensor
    dead: Tensor

    def unread(self, width: int) -> Tensor:
        """Return the choice as a mask (r, m, width) over slots 0 .. width - 1: True where a slot is not read."""
        r, m, _ = self.index.shape
        hide = torch.ones(r, m, width + 1, dtype=torch.bool, device=self.index.device)
        return hide.scatter_(2, self.index.masked_fill(self.dead, width), False)[..., :width]


class SelectorState(Memory, ABC):
    """Store a selector's index of the held tokens, which is updated whenever tokens enter or leave the slots.

    `spec` has the sizes, dtype and constants that the index was opened for. Rows are the first axis of every tensor; a
    subclass with other tensors defines its own `select_rows`, which keeps some of the rows. To choose slots, a subclass
    ranks them by scores in float64, and slots of equal score by slot number. So the choice for a query does not depend
    on how many queries or rows a call has.
    """

    spec: Spec

    @abstractmethod
    def append(self, slots: Slots, before: Tensor) -> None:
        """Add each row's new tokens to the index: the tokens in slots before[r] .. slots.held[r] - 1 of row r.

        before and slots.held (rows,) are the numbers of tokens that a row held before and holds now.
        """

    @abstractmethod
    def evict(self, slots: Slots, leaving: Tensor) -> None:
        """Update the index after the tokens in the slots marked by the mask `leaving` (rows, width) were evicted.

        `slots` has changed already: tokens from the end of each row have moved into the emptied slots.
        """

    def require_fitting(self, fields: dict[str, Any], slots: dict[str, Any]) -> None:
        """Raise ValueError if, in a saved state that is being loaded, the index contradicts the held tokens.

        fields  name -> saved value of this index, such as the number of items that it has per row
        slots   name -> saved value of the held tokens, such as `held`, their number per row
        """

    def resize(self, slots: Slots) -> None:
        """Adapt the index after rows got more or fewer slots (`slots.capacity`); the held tokens have not changed."""

    def reserve(self, g: int) -> None:
        """Allocate all memory that the index will need for g query heads per kv head; the default needs no more."""

    def close(self, slots: Slots, rows: Tensor | None) -> None:
        """Update the index of these rows (None: all) at the end of a block of tokens, after the block's evictions."""

    def seal(self) -> None:
        """Update the index at the end of the prompt."""

    @abstractmethod
    def choose(self, q: Tensor, slots: Slots, visible: Tensor, rows: Tensor | None = None) -> Chosen:
        """Choose the slots that each query of q (r, m, d) reads among the slots of its row that it sees.

        visible  (r, m): query j of row i sees slots 0 .. visible[i, j] - 1. These include all tokens that remained
                 after the last eviction
        rows     (r,): the queries' rows in the state; None: all
        A query that sees any slot reads at least one. The call changes nothing, and a query's choice does not depend on
        the other queries.
        """

    def follow(self, q: Tensor, slots: Slots, visible: Tensor, position: Tensor) -> Chosen:
        """Choose the slots to read for queries q (rows, g, a, d) of newly appended tokens: a `Chosen` with m = g * a.

        visible   (rows, a) number of slots that a token's queries see, that of the token itself included
        position  (rows, a) index of the token in the stream, or -1 for padding, whose queries are 0 and whose choice is
                  not used
        Unlike `choose`, the call may store a choice in the index, so that the queries of later tokens use it too.
        """
        del position
        return self.choose(q.flatten(1, 2), slots, visible.repeat(1, q.shape[1]))

    @abstractmethod
    def bytes_read(self, held: Tensor) -> int:
        """Return the bytes of index, keys and values that one query per row reads, summed over all rows.

        `held` (rows,) is the number of tokens that each row holds.
        """


class Selector(ABC):
    """Define a rule by which a query reads only some of the held tokens: a frozen configuration.

    A selector that keeps an index of the held tokens derives from `Indexed`.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = ""

    @abstractmethod
    def hide(self, q: Tensor, view: View, spec: Spec, hide: Tensor | None) -> Tensor | None:
        """Return a mask, bool (rows or 1, m or 1, s), True for slots that q (rows, m, d) does not read.

        view  keys, values and arrival indices of the tokens in the first s slots of the rows
        spec  sizes and constants, such as the factor on q.k
        hide  mask of the slots that a query may not see; the result is True there as well. None: it sees all
        The result is None if q reads all s slots.
        """

    @abstractmethod
    def bytes_read(self, held: Tensor, spec: Spec) -> int:
        """Return the bytes of keys and values that one query per row reads, summed over all rows.

        `held` (rows,) is the number of tokens that each row holds.
        """


class Indexed(Selector):
    """Define a selector that keeps an index of the held tokens; its `SelectorState` makes the choices."""

    @abstractmethod
    def open(self, spec: Spec, slots: Slots, shared: dict[str, Tensor], in_order: bool) -> SelectorState:
        """Return an empty index for the rows of `spec`, whose `slots` hold no token yet.

        shared    dictionary of the method's state, to which this call may add tensors that depend on selector and spec
                  alone, not on the stream
        in_order  True: tokens stay in the slots in order of arrival, as none is ever evicted
        """

    def block(self) -> int | None:
        """Return the number of a row's tokens between two updates of the index (`SelectorState.close`).

        None: any number will do. The method `Exact` uses this number. The method `Bounded` updates the index at the end
        of each of its own blocks instead.
        """
        return None

    def hide(self, q: Tensor, view: View, spec: Spec, hide: Tensor | None) -> Tensor | None:
        del q, view, spec, hide
        raise TypeError(f"{self.name} keeps an index: its state chooses, given the slots")

    def bytes_read(self, held: Tensor, spec: Spec) -> int:
        del held, spec
        raise TypeError(f"{self.name} keeps an index: its state knows what it reads")


@dataclass(frozen=True)
class Everything(Selector):
    """Let every query read every held token that it sees; the default selector."""

    name: ClassVar[str] = "everything"

    def hide(self, q: Tensor, view: View, spec: Spec, hide: Tensor | None) -> Tensor | None:
        del q, view, spec
        return hide

    def bytes_read(self, held: Tensor, spec: Spec) -> int:
        return int(held.sum()) * (spec.d + spec.dv) * spec.dtype.itemsize
