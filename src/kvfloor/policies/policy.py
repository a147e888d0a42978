"""The policy's interface, declared for its caller `Bounded`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvfloor.method import Spec


@dataclass(frozen=True)
class Ledger:
    """What a policy may look at: position (r, s) of each slot, its columns (r, s), seen (r, 1) tokens, row ids.

    Slots beyond a row's held tokens hold arbitrary numbers; Bounded never evicts them.
    """

    position: Tensor
    columns: dict[str, Tensor]
    seen: Tensor
    row_ids: Tensor
    spec: Spec


class Policy(ABC):
    """Frozen configuration of an eviction rule. The lowest priority leaves first; ties let the older one go."""

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    observes: ClassVar[bool] = False  # True: wants the attention that held tokens receive
    columns: ClassVar[dict[str, torch.dtype]] = {}  # numbers kept per slot, zero for a new token

    def protected_first(self) -> int:
        """How many first tokens of a row never leave."""
        return 0

    def protected_last(self, budget: int) -> int:
        """How many newest tokens of a row never leave, under this budget."""
        del budget
        return 0

    @abstractmethod
    def priority(self, ledger: Ledger) -> Tensor:
        """One number per slot (r, s): the smallest leaves first."""

    def observe(self, ledger: Ledger, weights: Tensor) -> dict[str, Tensor]:
        """New columns, given the block's softmax weights (r, g, b, s) over held tokens; queries in order.

        A query that asked nothing (a row's block that was only appended) has weight zero everywhere.
        """
        del weights
        return ledger.columns
