"""Code each token by itself, in equal steps of its rotated entries, with a dither that is subtracted on decoding.

A row is one (batch item, kv head) stream, a channel one entry of a vector. In shapes, r are rows, t tokens of one row,
w the width of a vector.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvfloor.core.spec import Spec
from kvfloor.methods.stores.dither import dither, steps_with
from kvfloor.methods.stores.stepped_tokens import SteppedTokens
from kvfloor.methods.stores.turn import turned_back


class DitheredTokens(SteppedTokens):
    """Code tokens as `SteppedTokens`, with a dither before rounding.

    A code stands for what it stands for there, plus (1/2 - u) steps with the dither u of the position and the entry. So
    the residual is uniform and independent of the vector, up to rounding.

    group  number of tokens that are coded together, of which the position follows
    """

    dithered = True

    def __init__(self, spec: Spec, width: int, bits: int, places: int, group: int) -> None:
        super().__init__(spec, width, bits, places)
        self.group = group

    def _rounded(self, number: Tensor, rows: Tensor, group: Tensor) -> Tensor:
        device = number.device
        position = group.to(device).unsqueeze(1) * self.group + torch.arange(number.shape[1], device=device)
        u = dither(self.spec, rows, position, self.width, "values")
        return steps_with(u, number, self._most)

    def shift(self, entries: dict[str, Tensor], rows: Tensor | None, position: Tensor, turn: bool = False) -> Tensor:
        u = dither(self.spec, rows, position, self.width, "values")
        x = (0.5 - u) * self.step(entries["widest"]).unsqueeze(-1)
        return x if turn else turned_back(x)

    def bounds(self, entries: dict[str, Tensor], group: Tensor) -> tuple[Tensor, Tensor]:
        """Return upper bounds on (|x|, |y - x|): a number lies within a step of what its code stands for undithered."""
        size, error = super().bounds(entries, group)
        return size + error, error
