"""Code each token by itself, in equal steps of its rotated entries.

A row is one (batch item, kv head) stream. In shapes, r are rows, t tokens of one row, w the width of a vector.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvfloor.core.spec import Spec
from kvfloor.methods.stores.codes import SCALE, SlotCodes
from kvfloor.methods.stores.packing import looked_up, pack
from kvfloor.methods.stores.turn import turned, turned_back


class SteppedTokens(SlotCodes):
    """Code each entry of a token's rotated vector in equal steps between minus and plus its largest entry.

    A code c stands for (c - (2^bits - 1) / 2) steps. A step is 2 / (2^bits - 1) of the largest entry, which is rounded
    up to 16 bits. With 4 bits and more this errs about as little as the levels of `TokenCodes`, and a code is turned
    into its number without a table.

    widest  (places,) the largest size of an entry of each slot's rotated vector
    """

    own = ("packed", "widest")
    turns = True

    def __init__(self, spec: Spec, width: int, bits: int, places: int) -> None:
        super().__init__(spec, width, bits, places)
        self.widest = torch.zeros(places, dtype=SCALE, device=spec.device)

    def encode(self, rows: Tensor, group: Tensor, x: Tensor, real: Tensor) -> dict[str, Tensor]:
        del real
        y = turned(x)
        largest = y.abs().amax(-1)
        widest = largest.to(SCALE)
        above = torch.nextafter(widest, torch.full_like(widest, torch.inf))
        widest = torch.where(widest.to(x.dtype) < largest, above, widest)
        step = self.step(widest).double().unsqueeze(-1)
        number = (y.double() + widest.double().unsqueeze(-1)) / torch.where(step > 0, step, 1)
        code = self._rounded(number, rows, group)
        return {"packed": pack(code.to(torch.uint8), self.bits), "widest": widest}

    def _rounded(self, number: Tensor, rows: Tensor, group: Tensor) -> Tensor:
        """Return the codes of numbers of steps (r, t, w) above the least one."""
        del rows, group
        return number.round().clamp(0, self._most)

    def decode(
        self, entries: dict[str, Tensor], rows: Tensor | None, group: Tensor | None, turn: bool = False
    ) -> Tensor:
        del rows, group
        dtype = self.spec.compute_dtype
        steps = torch.arange(2**self.bits, dtype=dtype, device=entries["packed"].device) - self._most / 2
        x = looked_up(entries["packed"], self.width, self.bits, steps)
        x = x.mul_(self.step(entries["widest"]).unsqueeze(-1))
        return x if turn else turned_back(x)

    def step(self, widest: Tensor) -> Tensor:
        """Return the steps (...) of tokens with these largest entries (...), in the compute dtype."""
        return widest.to(self.spec.compute_dtype) * (2 / self._most)

    def bounds(self, entries: dict[str, Tensor], group: Tensor) -> tuple[Tensor, Tensor]:
        """Return upper bounds on (|x|, |y - x|): a number lies within half a step of what its code stands for."""
        del group
        y = self.decode(entries, None, None, turn=True)
        error = self.step(entries["widest"]) * (self.width**0.5 / 2)
        return y.square().sum(-1).sqrt() + error, error

    @property
    def _most(self) -> int:
        return 2**self.bits - 1

    def select_rows(self, index: Tensor) -> None:
        """Keep only the rows `index` (r,) of the spec. The owner of the slots selects the attributes in `own`."""
        self.spec = self.spec.select(index)
