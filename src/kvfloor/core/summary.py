"""Define the interface of a summary, which keeps a compressed form of evicted tokens.

The method `Bounded`, which keeps at most a budget of whole tokens, calls this interface.
A row is one (batch item, kv head) stream; the spec has the number of rows, the sizes, dtype and constants. To absorb
tokens is to add them to the summary. A lot is the evicted tokens of one row in one call of `absorb`. In shapes, e are
evicted tokens of all rows, c those of one row, r the rows of a call, m queries, g query heads per kv head, a new
tokens, d and dv the widths of a key and a value.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvfloor.core.memory import Memory
from kvfloor.core.method import Guarantee, Traits
from kvfloor.core.partial import Partial
from kvfloor.core.rowwise import aligned
from kvfloor.core.spec import Spec


class SummaryState(Memory, ABC):
    """Store a compressed form of evicted tokens, as tensors with rows as first axis.

    `shared` maps names to tensors that are fixed by method and spec alone, such as trained kernels and tables. They do
    not depend on the stream, so they do not count as memory. `Bounded` replaces `shared` by one dictionary for the
    whole state, so a summary's names in it start with the summary's own name.
    """

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.shared: dict[str, Tensor] = {}

    @abstractmethod
    def absorb(self, row: Tensor, k: Tensor, v: Tensor, position: Tensor) -> None:
        """Add evicted tokens to the summary, each once: row (e,) int64 ascending, k (e, d), v (e, dv), position (e,).

        The tokens of one row in one call are a lot. A row's tokens come in the same lots however the stream is split
        into calls, but the split decides which rows share a call. So compute all numbers derived from tokens row by
        row, from one lot at a time (`lots`).
        """

    @abstractmethod
    def read(self, q: Tensor) -> Partial:
        """Return attention of q (rows, m, d) over the absorbed tokens as the summary defines it.

        The result is a `Partial`: the mean (rows, m, dv), i.e. the normalised output, and the log-mass (rows, m), i.e.
        the log-sum-exp of the logits. The call changes nothing.
        """

    def on_queries(self, q: Tensor) -> None:
        """Record queries q (rows, g, a, d) that the state is given, with a new tokens or (a = m) without new tokens.

        The caller has already set the queries of padding to 0.
        A summary needs them only if its error bound assumes something about queries.
        """

    def guarantee(self, stated: Guarantee) -> Guarantee:
        """Return the error bound `stated`, with `holds` False once one of its assumptions has failed.

        `stated` is the bound that is proved for the summary's configuration. The assumptions are tested on the tokens
        and queries that the summary was given.
        """
        return stated


class Summary(ABC):
    """Define how evicted tokens are kept in compressed form: a frozen configuration, which opens a `SummaryState`."""

    name: ClassVar[str]
    paper: ClassVar[str] = ""

    @property
    def traits(self) -> Traits:
        """Return the properties (`Traits`) that answers have with this summary, for example being linear in the values.

        `Traits` lists all of them. By default, answers approximate softmax attention, and are convex combinations of
        the values, linear in them.
        """
        return Traits()

    @abstractmethod
    def open(self, spec: Spec) -> SummaryState | None:
        """Return an empty summary for the rows of `spec`, or None if nothing is kept of evicted tokens."""

    def guarantee(self, spec: Spec) -> Guarantee | None:
        """Return an upper bound on the error of answers that holds whichever tokens are evicted; None: none is proved.

        The error is the difference from the kind of attention that the summary approximates: softmax attention over all
        tokens, unless `traits.reference` names another kind. If the bound's `epsilon` is 0, the only error is rounding.
        """
        del spec
        return None

    def sized_for(self, epsilon: float, delta: float, spec: Spec) -> Summary:
        """Return a copy of this summary with the smallest size for which its error bound is at most `epsilon`.

        delta: probability with which an answer may exceed the bound. The bound is that of `guarantee`. A summary
        without a size to choose returns itself.
        """
        del epsilon, delta, spec
        return self


@dataclass(frozen=True)
class Drop(Summary):
    """Keep nothing of evicted tokens, so that answers come from the held tokens alone; the default summary."""

    name: ClassVar[str] = "drop"

    @property
    def traits(self) -> Traits:
        return Traits(turns=True)

    def open(self, spec: Spec) -> None:
        del spec


def lots(row: Tensor, *columns: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split the evicted tokens of one `absorb` call by row: yield one lot (at, column, ...) per row.

    row      (e,) row of each token, ascending
    columns  (e, ...) each, such as the keys
    at       (1,) row of the lot; its columns are (1, c, ...) for the c tokens of the row
    A lot is contiguous, has the same memory alignment as every other lot of c tokens, and holds no other row's numbers.
    So any result computed from a lot has the same bits whichever rows are in the call, on any BLAS and any instruction
    set.
    """
    at, counts = torch.unique_consecutive(row, return_counts=True)
    pieces = [column.split(counts.tolist()) for column in columns]
    for i, lot in enumerate(zip(*pieces, strict=True)):
        yield at[i : i + 1], *(aligned(part.unsqueeze(0)) for part in lot)


def equal_lots(row: Tensor, *columns: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split the evicted tokens of one `absorb` call by row, and yield all rows with equally many tokens together.

    row      (e,) row of each token, ascending
    columns  (e, ...) each, such as the keys
    Yields (at, column, ...) once for each number c of tokens: at (r,) has the r rows with c tokens, and columns are
    (r, c, ...). This makes fewer, larger operations than `lots`, which yields one row at a time. Products and sums over
    tokens must then be computed row by row (module `core.rowwise`), so that a row's result does not depend on the other
    rows.
    """
    at, counts = torch.unique_consecutive(row, return_counts=True)
    start = counts.cumsum(0) - counts
    for count in counts.unique().tolist():
        same = counts == count
        index = start[same].unsqueeze(1) + torch.arange(count, device=row.device)
        yield at[same], *(column[index] for column in columns)
