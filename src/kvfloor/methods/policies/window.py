"""Keep the newest tokens. This is also called recency, or sliding-window attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvfloor.core.policy import Held, Policy


@dataclass(frozen=True)
class Window(Policy):
    """Evict the oldest token."""

    name: ClassVar[str] = "window"
    paper: ClassVar[str] = "Beltagy et al. 2020 (arXiv 2004.05150)"

    def priority(self, held: Held) -> Tensor:
        return held.position
