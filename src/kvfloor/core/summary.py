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
        on it, so products over tokens are taken row by row (`lots`).
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

    def open(self, spec: Spec) -> None:
        del spec


def lots(row: Tensor, *columns: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """What `absorb` takes, by rows: (at, column...) with at (r,) rows that each got c tokens, and columns (r, c, ...).

    A product over a lot has the shape of its own row's tokens, so it rounds alike beside any neighbours.
    """
    at, counts = torch.unique_consecutive(row, return_counts=True)
    start = counts.cumsum(0) - counts
    for count in counts.unique().tolist():
        same = counts == count
        index = start[same].unsqueeze(1) + torch.arange(count, device=row.device)
        yield at[same], *(column[index] for column in columns)
