"""Code each channel of a group of tokens in equal steps, and those of the widest ranges in finer ones.

A channel is one entry of a key. In shapes, r are rows, t tokens of one row, w the width of a key.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvfloor.core.spec import Spec
from kvfloor.methods.stores.codes import GroupCodes, ranged, ranges, unpacked
from kvfloor.methods.stores.packing import pack, size


class LoudChannels(GroupCodes):
    """Code numbers as `ChannelCodes` does, in `bits` bits, and the half of the channels with the wider ranges in more.

    The ranges of a group alone decide which channels these are, so nothing is stored for it. Of channels with equal
    ranges, the first is taken for the wider one. An error of a logit is a sum over channels, and the wide ones cause
    most of it: `extra` bits for half of the channels lessen it more than half as many for all.

    extra      bits that the wider half of the channels gets beyond `bits`, 1 to 8
    fine       (places, bytes) uint8, these bits of each slot's key, the lowest ones, in the order of falling ranges
    low, high, range   as in `ChannelCodes`
    """

    own = ("packed", "fine")
    shared = ("low", "high", "range")

    def __init__(
        self, spec: Spec, width: int, bits: int, extra: int, places: int, group: int, dithered: bool = False
    ) -> None:
        super().__init__(spec, width, bits, places, group, dithered=dithered)
        self.extra = extra
        self.fine = torch.zeros(places, size(width // 2, extra), dtype=torch.uint8, device=spec.device)
        self.low = torch.zeros(spec.rows, 0, width, dtype=torch.uint8, device=spec.device)
        self.high = torch.zeros_like(self.low)
        self.range = torch.zeros(spec.rows, 0, 4, dtype=spec.compute_dtype, device=spec.device)

    def loud(self, width: Tensor) -> Tensor:
        """Return the indices (..., w // 2) of the channels with further bits, from their ranges' widths (..., w)."""
        return torch.sort(width, dim=-1, descending=True, stable=True).indices[..., : self.width // 2]

    def _ranged(self, low: Tensor, high: Tensor) -> tuple[Tensor, ...]:
        return ranged(low, high)

    def _steps(self, *shared: Tensor) -> tuple[Tensor, Tensor]:
        start, width = ranges(*shared)
        return start, width / self._most(width)

    def _most(self, width: Tensor) -> Tensor:
        """Return the largest code (..., w) of each channel."""
        most = torch.full_like(width, 2**self.bits - 1)
        return most.scatter(-1, self.loud(width), 2.0 ** (self.bits + self.extra) - 1)

    def _largest(self, shared: list[Tensor]) -> Tensor:
        return self._most(ranges(*shared)[1])

    def _packed(self, number: Tensor, shared: list[Tensor]) -> dict[str, Tensor]:
        _, width = ranges(*shared)
        loud = self.loud(width).expand(-1, number.shape[1], -1)
        code = number.clamp_min(0).minimum(self._most(width)).int()
        fine = code.gather(-1, loud)
        code = code.scatter(-1, loud, fine >> self.extra)
        fine = fine & (2**self.extra - 1)
        return {"packed": pack(code.to(torch.uint8), self.bits), "fine": pack(fine.to(torch.uint8), self.extra)}

    def _steps_above(self, entries: dict[str, Tensor], shared: list[Tensor]) -> Tensor:
        dtype = self.spec.compute_dtype
        number = unpacked(entries["packed"], self.width, self.bits, dtype)
        fine = unpacked(entries["fine"], self.width // 2, self.extra, dtype)
        loud = self.loud(ranges(*shared)[1]).expand_as(fine)
        return number.scatter(-1, loud, torch.add(fine, number.gather(-1, loud), alpha=2**self.extra))
