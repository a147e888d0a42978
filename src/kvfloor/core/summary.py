"""The summary's interface, declared for its caller `Bounded`."""

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
    """What is remembered of evicted tokens: tensors with rows as first axis.

    `shared` are tensors fixed by (method, spec) alone (trained kernels, tables): public and uncounted. Once opened
    by `Bounded` it is the dictionary that the whole state shows as its own, so names in it start with the summary's.
    """

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.shared: dict[str, Tensor] = {}

    @abstractmethod
    def absorb(self, row: Tensor, k: Tensor, v: Tensor, position: Tensor) -> None:
        """Take in evicted tokens, each once: row (e,) int64 ascending, k (e, d), v (e, dv), position (e,) int64.

        A row's tokens come in the same lots whatever the caller's chunking; which other rows come along does depend
        on it, so what is computed from tokens is computed row by row (`lots`).
        """

    @abstractmethod
    def read(self, q: Tensor) -> Partial:
        """Attention of q (rows, m, d) over the absorbed tokens, under the summary's law; pure."""

    def on_queries(self, q: Tensor) -> None:
        """Queries q (rows, g, a, d) were asked with tokens, or by `attend`; zeros stand where a row asked nothing."""

    def guarantee(self, stated: Guarantee) -> Guarantee:
        """What the configuration states, evaluated on what was absorbed and noticed; withdrawn where that fails."""
        return stated


class Summary(ABC):
    """Frozen configuration of a summary."""

    name: ClassVar[str]
    paper: ClassVar[str] = ""

    @property
    def traits(self) -> Traits:
        """What answers promise that this summary has a part in."""
        return Traits()

    @abstractmethod
    def open(self, spec: Spec) -> SummaryState | None:
        """Empty memory, or None if nothing is remembered."""

    def guarantee(self, spec: Spec) -> Guarantee | None:
        """What holds whatever the policy evicts, or None; epsilon 0 means that its law is followed exactly."""
        del spec
        return None

    def sized_for(self, epsilon: float, delta: float, spec: Spec) -> Summary:
        """The least size whose guarantee promises this, for `Method.budget_for`; itself if there is none to choose."""
        del epsilon, delta, spec
        return self


@dataclass(frozen=True)
class Drop(Summary):
    """The default: nothing stays, so the summary's partial is empty."""

    name: ClassVar[str] = "drop"

    @property
    def traits(self) -> Traits:
        return Traits(turns=True)

    def open(self, spec: Spec) -> None:
        del spec


def lots(row: Tensor, *columns: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield what `absorb` takes, one row after another: (at, column...), at (1,) and columns (1, c, ...).

    A lot is contiguous and aligned like every other one of c tokens, and holds no other row's numbers: whatever is
    computed from it has the same bits beside any neighbours, on any BLAS and any instruction set.
    """
    at, counts = torch.unique_consecutive(row, return_counts=True)
    pieces = [column.split(counts.tolist()) for column in columns]
    for i, lot in enumerate(zip(*pieces, strict=True)):
        yield at[i : i + 1], *(aligned(part.unsqueeze(0)) for part in lot)


def equal_lots(row: Tensor, *columns: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """As `lots`, the rows that each got c tokens side by side: at (r,) and columns (r, c, ...).

    Fewer, larger operations; products and sums over tokens then go through `core.rowwise`.
    """
    at, counts = torch.unique_consecutive(row, return_counts=True)
    start = counts.cumsum(0) - counts
    for count in counts.unique().tolist():
        same = counts == count
        index = start[same].unsqueeze(1) + torch.arange(count, device=row.device)
        yield at[same], *(column[index] for column in columns)
