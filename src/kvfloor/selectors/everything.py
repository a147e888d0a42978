"""Everything: a query reads all held tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvfloor.method import Spec
from kvfloor.selectors.selector import Selector
from kvfloor.slots import View


@dataclass(frozen=True)
class Everything(Selector):
    """The default: nothing held is left unread."""

    name: ClassVar[str] = "everything"

    def hide(self, q: Tensor, view: View, spec: Spec, hide: Tensor | None) -> Tensor | None:
        del q, view, spec
        return hide

    def bytes_read(self, held: Tensor, spec: Spec) -> int:
        return int(held.sum()) * (spec.d + spec.dv) * spec.dtype.itemsize
