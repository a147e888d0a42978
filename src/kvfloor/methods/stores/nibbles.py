"""Code numbers in 8 bits that lie in two planes: the upper four bits of all of a token's numbers, and the lower four.

A plane can be read by itself, so the upper one alone is a coarser reading of a token, in half of the bytes. In shapes,
r are rows, t tokens of one row, w the width of a key or value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvfloor.core.fields import Field
from kvfloor.core.rowwise import length, total
from kvfloor.core.spec import Spec
from kvfloor.methods.stores.codes import SCALE, SharedCodes, SteppedChannels, TokenCodes, unpacked
from kvfloor.methods.stores.levels import levels
from kvfloor.methods.stores.packing import looked_up, pack, unpack
from kvfloor.methods.stores.turn import turned, turned_back

_HALF = 4  # bits of a plane
_LEVELS = 1 << _HALF
COARSER = 16
"""How many steps of the whole code a step of the upper plane has."""


class NibbleChannels(SteppedChannels):
    """Code each channel of a group in 8 bits, as `ChannelCodes` does, in an upper and a lower plane.

    The upper plane alone stands for the middle of the 16 codes that share it, so it errs by at most eight steps.

    packed  (places, bytes) uint8, the upper four bits of each slot's numbers
    fine    (places, bytes) uint8, the lower four bits
    low, high, range   as in `SteppedChannels`
    """

    own = ("packed", "fine")
    coarse = ("packed",)

    def __init__(self, spec: Spec, width: int, places: int, group: int) -> None:
        super().__init__(spec, width, _HALF, places, group)
        self.fine = torch.zeros_like(self.packed)

    @property
    def last(self) -> int:
        return _LEVELS**2 - 1

    def _packed(self, number: Tensor, shared: list[Tensor]) -> dict[str, Tensor]:
        del shared
        return planes_of(number.clamp(0, self.last).to(torch.uint8))

    def _steps_above(self, entries: dict[str, Tensor], shared: list[Tensor]) -> Tensor:
        del shared
        dtype = self.spec.compute_dtype
        upper = unpacked(entries["packed"], self.width, _HALF, dtype) * _LEVELS
        if "fine" not in entries:
            return upper + (_LEVELS - 1) / 2
        return upper + unpacked(entries["fine"], self.width, _HALF, dtype)

    @property
    def coarse_bytes(self) -> float:
        """Return the bytes of one token's upper plane, plus its equal part of what its group shares."""
        return self.token_bytes - self.fine[:1].nbytes


class NibbleTokens(SharedCodes):
    """Code each token by itself in 8 bits, as `TokenCodes` does, in two planes, and each group of tokens by its centre.

    The 256 levels ascend, so the upper plane names 16 neighbouring levels; alone it stands for their mean.

    packed   (places, bytes) uint8, the upper four bits of each slot's codes
    fine     (places, bytes) uint8, the lower four bits
    scale    (places,) the scale of each slot, for both readings
    centre   (rows, groups, w), the mean of a group's coded vectors, rotated by `turned`
    longest  (rows, groups, 1), at most the largest norm of a group's vectors
    """

    own = ("packed", "fine", "scale")
    coarse = ("packed", "scale")
    shared = ("centre", "longest")
    turns = True

    def __init__(self, spec: Spec, width: int, places: int, group: int) -> None:
        super().__init__(spec, width, _HALF, places, group)
        self.fine = torch.zeros_like(self.packed)
        self.scale = torch.zeros(places, dtype=SCALE, device=spec.device)
        self.centre = torch.zeros(spec.rows, 0, width, dtype=SCALE, device=spec.device)
        self.longest = torch.zeros(spec.rows, 0, 1, dtype=SCALE, device=spec.device)

    @property
    def _whole(self) -> TokenCodes:
        return TokenCodes(self.spec, self.width, 2 * _HALF, 0, centred=False, unbiased=True)

    def encode(self, rows: Tensor, group: Tensor, x: Tensor, real: Tensor) -> dict[str, Tensor]:
        self.reserve(int(group.max()) + 1)
        at = (rows.to(x.device), group.to(x.device))
        x = x.masked_fill(~real.unsqueeze(-1), 0)
        count = real.sum(-1, keepdim=True).clamp_min(1).to(x.dtype)
        most = torch.finfo(SCALE).max
        self.centre[at] = (turned(total(x, 1) / count)).clamp(-most, most).to(SCALE)
        longest = length(x).amax(1, keepdim=True) * (1 - 2.0**-7)  # bfloat16 rounds by at most 2^-8
        self.longest[at] = torch.where(longest > torch.finfo(SCALE).tiny, longest.clamp_max(most), 0).to(SCALE)
        whole = self._whole.encode(rows, group, x, real)
        return planes_of(whole["packed"]) | {"scale": whole["scale"]}

    def decode(
        self, entries: dict[str, Tensor], rows: Tensor | None, group: Tensor | None, turn: bool = False
    ) -> Tensor:
        if "fine" in entries:
            return self._whole.decode(self._joined(entries), rows, group, turn)
        dtype = self.spec.compute_dtype
        level = levels(2 * _HALF, self.width, str(entries["packed"].device)).to(dtype).view(_LEVELS, _LEVELS).mean(1)
        x = looked_up(entries["packed"], self.width, _HALF, level) * entries["scale"].to(dtype).unsqueeze(-1)
        return x if turn else turned_back(x)

    def bounds(self, entries: dict[str, Tensor], group: Tensor) -> tuple[Tensor, Tensor]:
        return self._whole.bounds(self._joined(entries), group)

    def _joined(self, entries: dict[str, Tensor]) -> dict[str, Tensor]:
        upper, lower = (unpack(entries[name], self.width, _HALF) for name in ("packed", "fine"))
        return {"packed": (upper << _HALF) | lower, "scale": entries["scale"]}

    def fields(self) -> dict[str, Any]:
        longest = Field(SCALE, (self.longest.shape[0], "groups", 1), least=0, finite=True)
        return super().fields() | {"longest": longest}


def planes_of(code: Tensor) -> dict[str, Tensor]:
    """Return the two planes of 8-bit codes (..., w): what `packed` and `fine` hold of them."""
    return {"packed": pack(code >> _HALF, _HALF), "fine": pack(code & (_LEVELS - 1), _HALF)}
