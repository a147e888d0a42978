"""The selector's interface, declared for its callers `Exact` and `Bounded`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from kvfloor.method import Spec
from kvfloor.slots import View


class Selector(ABC):
    """Frozen configuration of a choice among held tokens."""

    name: ClassVar[str]
    paper: ClassVar[str] = ""

    @abstractmethod
    def hide(self, q: Tensor, view: View, spec: Spec, hide: Tensor | None) -> Tensor | None:
        """What q (rows, m, d) does not read: bool (rows or 1, m or 1, s), a superset of `hide`, or None."""

    @abstractmethod
    def bytes_read(self, held: Tensor, spec: Spec) -> int:
        """Bytes of keys and values that one query per row touches when held (rows,) tokens are kept."""
