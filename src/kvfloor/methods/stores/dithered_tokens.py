"""Code each token by itself, in equal steps of its rotated entries, with a dither that is subtracted on decoding.

A row is one (batch item, kv head) stream, a channel one entry of a vector. In shapes, r are rows, t tokens of one row,
w the width of a vector.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvfloor.core.spec import Spec
from kvfloor.methods.stores.codes import SCALE, SlotCodes
from kvfloor.methods.stores.dither import dither, steps_with
from kvfloor.methods.stores.packing import looked_up, pack
from kvfloor.methods.stores.turn import turned, turned_back


class DitheredTokens(SlotCodes):
    """Code each entry of a token's rotated vector in equal steps between minus and plus its scale, with dither.

    A code c stands for scale (2 c / (2^bits - 1) - 1), plus (1/2 - u) steps with the dither u of the position and the
    entry. So the residual is uniform and independent of the vector, up to rounding. The scale is the largest entry of
    the rotated vector, rounded up to 16 bits.

    scale  (places,) of each slot
    group  number of tokens that are coded together, of which the position follows
    """

    own = ("packed", "scale")
    turns = True
    dithered = True

    def __init__(self, spec: Spec, width: int, bits: int, places: int, group: int) -> None:
        super().__init__(spec, width, bits, places)
        self.group = group
        self.scale = torch.zeros(places, dtype=SCALE, device=spec.device)

    def encode(self, rows: Tensor, group: Tensor, x: Tensor, real: Tensor) -> dict[str, Tensor]:
        del real
        y = turned(x)
        largest = y.abs().amax(-1)
        scale = largest.to(SCALE)
        above = torch.nextafter(scale, torch.full_like(scale, torch.inf))
        scale = torch.where(scale.to(x.dtype) < largest, above, scale)
        position = group.to(x.device).unsqueeze(1) * self.group + torch.arange(x.shape[1], device=x.device)
        u = dither(self.spec, rows, position, self.width, "values")
        step = self.step(scale).double().unsqueeze(-1)
        number = (y.double() + scale.double().unsqueeze(-1)) / torch.where(step > 0, step, 1)
        code = steps_with(u, number, self._most).to(torch.uint8)
        return {"packed": pack(code, self.bits), "scale": scale}

    def decode(
        self, entries: dict[str, Tensor], rows: Tensor | None, group: Tensor | None, turn: bool = False
    ) -> Tensor:
        del rows, group
        dtype = self.spec.compute_dtype
        level = torch.arange(2**self.bits, dtype=dtype, device=entries["packed"].device) * (2 / self._most) - 1
        x = looked_up(entries["packed"], self.width, self.bits, level)
        x = x.mul_(entries["scale"].to(dtype).unsqueeze(-1))
        return x if turn else turned_back(x)

    def shift(self, entries: dict[str, Tensor], rows: Tensor | None, position: Tensor, turn: bool = False) -> Tensor:
        u = dither(self.spec, rows, position, self.width, "values")
        x = (0.5 - u) * self.step(entries["scale"]).unsqueeze(-1)
        return x if turn else turned_back(x)

    def step(self, scale: Tensor) -> Tensor:
        """Return the steps (...) of tokens with these scales (...), in the compute dtype."""
        return scale.to(self.spec.compute_dtype) * (2 / self._most)

    def bounds(self, entries: dict[str, Tensor], group: Tensor) -> tuple[Tensor, Tensor]:
        """Return upper bounds on (|x|, |y - x|): a number lies within a step of what its code stands for undithered."""
        middle = self.decode(entries, None, group, turn=True)
        error = self.step(entries["scale"]) * (self.width**0.5 / 2)
        return middle.square().sum(-1).sqrt() + 2 * error, error

    @property
    def _most(self) -> int:
        return 2**self.bits - 1

    def select_rows(self, index: Tensor) -> None:
        """Keep only the rows `index` (r,) of the spec. The owner of the slots selects the attributes in `own`."""
        self.spec = self.spec.select(index)
