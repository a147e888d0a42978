"""Store tokens with log-weights, which every query adds to their logits.

A row is one (batch item, kv head) stream, and a slot the place of one held token. In shapes, r are rows, s slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from kvfloor.core.slots import Slots, View
from kvfloor.core.spec import Spec

LOG_WEIGHT = "log_weight"


class WeightedSlots(Slots):
    """Store tokens, each with a log-weight, in the column `LOG_WEIGHT`: one of log(c) makes a token count as c tokens.

    New tokens have 0.
    weighted  True if some token may have another log-weight
    """

    weighted = False

    def __init__(self, spec: Spec, capacities: Sequence[int]) -> None:
        super().__init__(spec, capacities, {LOG_WEIGHT: spec.compute_dtype})

    def _viewed(self, rows: Tensor | None, width: int, live: Tensor | None) -> View:
        view = super()._viewed(rows, width, live)
        return replace(view, log_weight=self.column(LOG_WEIGHT, rows, width)) if self.weighted else view

    def newest(self, q: Tensor) -> Tensor:
        return self.view().newest(q, self.spec) if self.weighted else super().newest(q)

    def adopt(self, fields: dict[str, Any]) -> None:
        super().adopt(fields)
        if bool(fields["columns"][LOG_WEIGHT].any()):
            self.weighted = True
