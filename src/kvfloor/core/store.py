"""Define stores: how a state (the cache of one layer) keeps keys and values, as they are given or coded in few bits.

A slot is the place of one held token, a row one (batch item, kv head) stream. A code is a small integer that stands for
a number. A column is a tensor with one number per slot, which an eviction policy keeps. A spec holds the sizes, dtype
and constants of a cache.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from kvfloor.core.slots import Slots
from kvfloor.core.spec import Spec


class Store(ABC):
    """Define how slots keep keys and values. A store is an immutable configuration; `open` makes the slots of a state.

    name   short name, such as "full"
    paper  the source, or ""
    plain  True if keys and values are kept as they are given
    """

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    plain: ClassVar[bool] = False

    @property
    def loses(self) -> bool:
        """Return True if tokens may leave the slots while others stay; else only methods that keep every token fit."""
        return True

    @abstractmethod
    def open(
        self,
        spec: Spec,
        capacities: Sequence[int],
        block: int,
        columns: dict[str, torch.dtype] | None = None,
        lose: bool = True,
    ) -> Slots:
        """Return empty slots for the rows of `spec`.

        capacities  slots of each row
        block       number of a row's tokens from one call of `Slots.settle` to the next
        columns     name -> dtype of the policy's columns
        lose        True if tokens may leave the slots while others stay
        """

    def block(self, block: int) -> int:
        """Return how many tokens' queries the method `exact`, which keeps every token, answers at a time.

        block: the number that it takes if keys and values are kept as they are given.
        """
        return block


@dataclass(frozen=True)
class Full(Store):
    """Keep keys and values as they are given, in the dtype of the cache."""

    name: ClassVar[str] = "full"
    plain: ClassVar[bool] = True

    def open(
        self,
        spec: Spec,
        capacities: Sequence[int],
        block: int,
        columns: dict[str, torch.dtype] | None = None,
        lose: bool = True,
    ) -> Slots:
        del block
        return Slots(spec, capacities, columns, lose)

    def __str__(self) -> str:
        return self.name
