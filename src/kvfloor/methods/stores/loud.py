"""Code each channel of a group of tokens in equal steps, and those of the widest ranges in finer ones.

A channel is one entry of a key. In shapes, r are rows, t tokens of one row, w the width of a key.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvfloor.core.fields import Field
from kvfloor.core.spec import Spec
from kvfloor.methods.stores.codes import SteppedChannels, ranges, unpacked
from kvfloor.methods.stores.packing import pack, size


class LoudChannels(SteppedChannels):
    """Code numbers as `ChannelCodes` does, in `bits` bits, and the half of the channels with the wider ranges in more.

    Of channels with equal ranges, the first is taken for the wider one. An error of a logit is a sum over channels, and
    the wide ones cause most of it: `extra` bits for half of the channels lessen it more than half as many for all.

    extra      bits that the wider half of the channels gets beyond `bits`, 1 to 8
    fine       (places, bytes) uint8, these bits of each slot's key, the lowest ones, in the order of `loud`
    loud       (rows, groups, w // 2) the channels with further bits, by falling ranges: they follow from the ranges,
               but sorting these again for every read would take longer than reading the codes
    low, high, range   as in `SteppedChannels`
    """

    own = ("packed", "fine")
    shared = ("low", "high", "range", "loud")

    def __init__(
        self, spec: Spec, width: int, bits: int, extra: int, places: int, group: int, dithered: bool = False
    ) -> None:
        super().__init__(spec, width, bits, places, group, dithered=dithered)
        self.extra = extra
        self.fine = torch.zeros(places, size(width // 2, extra), dtype=torch.uint8, device=spec.device)
        index = torch.uint8 if width <= 256 else torch.int16
        self.loud = torch.zeros(spec.rows, 0, width // 2, dtype=index, device=spec.device)

    def _ranged(self, low: Tensor, high: Tensor) -> tuple[Tensor, ...]:
        ends = super()._ranged(low, high)
        width = ranges(*ends)[1]
        loud = torch.sort(width, dim=-1, descending=True, stable=True).indices[..., : self.width // 2]
        return *ends, loud.to(self.loud.dtype)

    def _steps(self, *shared: Tensor) -> tuple[Tensor, Tensor]:
        start, width = ranges(*shared[:3])
        return start, width / self._largest([*shared])

    def _largest(self, shared: list[Tensor]) -> Tensor:
        low, _, range_, loud = shared
        most = torch.full(low.shape, float(self.last), dtype=range_.dtype, device=low.device)
        return most.scatter(-1, loud.long(), 2.0 ** (self.bits + self.extra) - 1)

    def _packed(self, number: Tensor, shared: list[Tensor]) -> dict[str, Tensor]:
        loud = shared[-1].long().expand(-1, number.shape[1], -1)
        code = number.clamp_min(0).minimum(self._largest(shared)).int()
        fine = code.gather(-1, loud)
        code = code.scatter(-1, loud, fine >> self.extra)
        fine = fine & (2**self.extra - 1)
        return {"packed": pack(code.to(torch.uint8), self.bits), "fine": pack(fine.to(torch.uint8), self.extra)}

    def _steps_above(self, entries: dict[str, Tensor], shared: list[Tensor]) -> Tensor:
        dtype = self.spec.compute_dtype
        number = unpacked(entries["packed"], self.width, self.bits, dtype)
        fine = unpacked(entries["fine"], self.width // 2, self.extra, dtype)
        loud = shared[-1].long().expand_as(fine)
        return number.scatter(-1, loud, torch.add(fine, number.gather(-1, loud), alpha=2**self.extra))

    def fields(self) -> dict[str, Any]:
        shape = (self.loud.shape[0], "groups", self.loud.shape[2])
        return super().fields() | {"loud": Field(self.loud.dtype, shape, least=0, most=self.width - 1)}
