"""The summary's interface, declared for its caller `Bounded`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from kvfloor.memory import Memory
from kvfloor.method import Guarantee, Spec, Traits
from kvfloor.partial import Partial


class SummaryState(Memory, ABC):
    """What is remembered of evicted tokens: tensors with rows as first axis."""

    @abstractmethod
    def absorb(self, row: Tensor, k: Tensor, v: Tensor) -> None:
        """Take in evicted tokens, each once: row (e,) int64, k (e, d), v (e, dv)."""

    @abstractmethod
    def read(self, q: Tensor) -> Partial:
        """Attention of q (rows, m, d) over the absorbed tokens, under the summary's law; pure."""


class Summary(ABC):
    """Frozen configuration of a summary."""

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    traits: ClassVar[Traits] = Traits()

    @abstractmethod
    def open(self, spec: Spec) -> SummaryState | None:
        """Empty memory, or None if nothing is remembered."""

    def guarantee(self) -> Guarantee | None:
        """What holds whatever the policy evicts, or None."""
        return None
