"""Sinks: the first few tokens and the newest ones stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvfloor.core.policy import Held, Policy
from kvfloor.validation import count


@dataclass(frozen=True)
class Sinks(Policy):
    """A window that never gives up a row's first `count` tokens, on which models park attention.

    Keys keep the positions they came with (no re-rotation inside the cache).
    """

    name: ClassVar[str] = "sinks"
    paper: ClassVar[str] = "Xiao et al. 2023, StreamingLLM (arXiv 2309.17453)"
    count: int = 4

    def __post_init__(self) -> None:
        count("sinks", count=self.count)

    def protected_first(self) -> int:
        return self.count

    def priority(self, held: Held) -> Tensor:
        return held.position
