"""Define the interface of a summary of evicted tokens, which `Bounded` calls."""

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

    `shared` are tensors fixed by (method, spec) alone (trained kernels, tables): public and uncounted. Once opened
    by `Bounded` it is the dictionary of the whole state, so names in it start with the summary's name.
    """

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.shared: dict[str, Tensor] = {}

    @abstractmethod
    def absorb(self, row: Tensor, k: Tensor, v: Tensor, position: Tensor) -> None:
        """Take in evicted tokens, each once: row (e,) int64 ascending, k (e, d), v (e, dv), position (e,) int64.

        A row's tokens come in the same lots whatever the caller's chunking, but the other rows in a call depend on it.
        So all numbers derived from tokens must be computed row by row (`lots`).
        """

    @abstractmethod
    def read(self, q: Tensor) -> Partial:
        """Compute attention of q (rows, m, d) over the absorbed tokens, under the summary's law; change nothing."""

    def on_queries(self, q: Tensor) -> None:
        """Handle queries q (rows, g, a, d), given with tokens or by `attend`; zeros stand where a row has no query."""

    def guarantee(self, stated: Guarantee) -> Guarantee:
        """Return the configuration's guarantee, evaluated on the tokens and queries seen; withdrawn if it fails."""
        return stated


class Summary(ABC):
    """Define the compressed form of evicted tokens by a frozen configuration."""

    name: ClassVar[str]
    paper: ClassVar[str] = ""

    @property
    def traits(self) -> Traits:
        """Return the traits of the answers, as far as the summary has a part in them."""
        return Traits()

    @abstractmethod
    def open(self, spec: Spec) -> SummaryState | None:
        """Return empty memory, or None if nothing is kept of evicted tokens."""

    def guarantee(self, spec: Spec) -> Guarantee | None:
        """Return the bound that holds for any evictions, or None; epsilon 0 means that the law is followed exactly."""
        del spec
        return None

    def sized_for(self, epsilon: float, delta: float, spec: Spec) -> Summary:
        """Return the least size whose guarantee reaches epsilon and delta, for `Method.budget_for`.

        A summary without a size to choose returns itself.
        """
        del epsilon, delta, spec
        return self


@dataclass(frozen=True)
class Drop(Summary):
    """Keep nothing of the evicted tokens: answers come from the held tokens alone; the default."""

    name: ClassVar[str] = "drop"

    @property
    def traits(self) -> Traits:
        return Traits(turns=True)

    def open(self, spec: Spec) -> None:
        del spec


def lots(row: Tensor, *columns: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the tokens that `absorb` takes, one row after another: (at, column...), at (1,) and columns (1, c, ...).

    A lot is contiguous and aligned like every other one of c tokens, and holds no other row's numbers. So any result
    computed from a lot has the same bits beside any neighbours, on any BLAS and any instruction set.
    """
    at, counts = torch.unique_consecutive(row, return_counts=True)
    pieces = [column.split(counts.tolist()) for column in columns]
    for i, lot in enumerate(zip(*pieces, strict=True)):
        yield at[i : i + 1], *(aligned(part.unsqueeze(0)) for part in lot)


def equal_lots(row: Tensor, *columns: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield lots as `lots` does, the rows with c tokens each side by side: at (r,) and columns (r, c, ...).

    Fewer, larger operations; products and sums over tokens must then go through `core.rowwise`.
    """
    at, counts = torch.unique_consecutive(row, return_counts=True)
    start = counts.cumsum(0) - counts
    for count in counts.unique().tolist():
        same = counts == count
        index = start[same].unsqueeze(1) + torch.arange(count, device=row.device)
        yield at[same], *(column[index] for column in columns)
