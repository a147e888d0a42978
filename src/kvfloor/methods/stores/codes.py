"""Code keys or values in few bits per number: each token by itself, or each channel of a group of tokens.

A row is one (batch item, kv head) stream, a place the index of a slot in flat tensors over all rows, a channel one
entry of a key or value. A code is the small integer that stands for a number. Tokens of a row are coded in groups of
consecutive ones. In shapes, r are the rows of a call, t tokens of one row, w the width of a key or value. The compute
dtype is float64 for a float64 cache, float32 for all others.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from kvfloor.core.arena import grown
from kvfloor.core.fields import Field
from kvfloor.core.memory import Memory
from kvfloor.core.rowwise import length, total
from kvfloor.core.spec import Spec
from kvfloor.methods.stores.levels import levels
from kvfloor.methods.stores.packing import looked_up, pack, size
from kvfloor.methods.stores.turn import turned, turned_back

SCALE = torch.bfloat16
"""The dtype of a coded vector's scale: 16 bits with the exponent range of float32."""


class SlotCodes(Memory):
    """Keep the coded keys, or the coded values, of all slots.

    own     names of the attributes that are tensors (places, ...) with one entry per slot
    packed  (places, bytes) uint8, the codes of each slot's key or value
    """

    own: tuple[str, ...]

    def __init__(self, spec: Spec, width: int, bits: int, places: int) -> None:
        """Allocate the codes of `places` slots: `bits` bits for each of `width` numbers."""
        self.spec, self.width, self.bits = spec, width, bits
        self.packed = torch.zeros(places, size(width, bits), dtype=torch.uint8, device=spec.device)

    @abstractmethod
    def encode(self, rows: Tensor, group: Tensor, x: Tensor, real: Tensor) -> dict[str, Tensor]:
        """Code x (r, t, w), one group of tokens of each of `rows` (r,), in the compute dtype.

        group  (r,) index of the group in its row, on the CPU
        real   (t,) or (r, t), bool, True for tokens whose code will be read; the others must not influence this code
        Returns the entries of the attributes in `own`, name -> (r, t, ...). Numbers that the tokens of a group share,
        such as a range, are stored in this object.
        """

    @abstractmethod
    def decode(
        self, entries: dict[str, Tensor], rows: Tensor | None, group: Tensor | None, turn: bool = False
    ) -> Tensor:
        """Return the numbers (r, t, w) that coded tokens stand for, in the compute dtype.

        entries  the tokens' entries of the attributes in `own`, name -> (r, t, ...)
        rows     (r,) the tokens' rows; None: all rows
        group    (r, t) index of each token's group in its row; None: the tokens are each row's first t, in their order
        turn     True: return the vectors rotated (`turned`), if `turns` is True
        The result is arbitrary for tokens that are not coded yet.
        """

    turns = False
    """True if `decode` can return rotated numbers, without the work of rotating them back."""

    def reserve(self, groups: int) -> None:
        """Allocate the numbers that tokens of one group share, for each row's first `groups` groups; here none."""

    def sent(self, groups: int) -> dict[str, Any]:
        """Return {name: value} of the attributes that a saved state keeps, without those in `own`.

        Tensors with one entry per group are cut to each row's first `groups` groups.
        """
        del groups
        return {name: value for name, value in self.export().items() if name not in self.own}

    @property
    def token_bytes(self) -> float:
        """Return the bytes of one token's codes, plus its equal part of the numbers that its group shares."""
        return float(sum(getattr(self, name)[:1].nbytes for name in self.own))

    def fields(self) -> dict[str, Any]:
        entries = {name: getattr(self, name) for name in self.own}
        return {
            name: Field(x.dtype, ("tokens", *x.shape[1:]), finite=x.is_floating_point()) for name, x in entries.items()
        }


class TokenCodes(SlotCodes):
    """Code each token by itself: a scale, and a level for each entry of its rotated vector.

    Let R be the rotation of `turned`, and u = R (x - centre) / |x - centre| for a vector x. Let c be u with each entry
    replaced by the nearest of `levels`. Then x is decoded as centre + s R^T c. If `unbiased`, s = |x - centre| / (c.u):
    the error is orthogonal to x - centre, and has mean 0 over random rotations (EDEN). Otherwise s = |x - centre|
    (c.u) / (c.c), which gives the least squared error. Apart from the centre, which stays fixed, a token's code does
    not depend on other tokens, so tokens may leave in any order.

    scale   (places,) s of each slot
    centre  (rows, w), the mean of the coded tokens of the row's first group, in the dtype of the cache; (0, w) if not
            `centred`, and then 0 in the law above
    """

    own = ("packed", "scale")
    turns = True

    def __init__(self, spec: Spec, width: int, bits: int, places: int, centred: bool, unbiased: bool) -> None:
        super().__init__(spec, width, bits, places)
        self.centred, self.unbiased = centred, unbiased
        self.scale = torch.zeros(places, dtype=SCALE, device=spec.device)
        self.centre = torch.zeros(spec.rows if centred else 0, width, dtype=spec.dtype, device=spec.device)

    def encode(self, rows: Tensor, group: Tensor, x: Tensor, real: Tensor) -> dict[str, Tensor]:
        if self.centred:
            first = (group == 0).nonzero().squeeze(1).to(x.device)
            if len(first):
                count = real.sum(-1, keepdim=True).clamp_min(1).to(x.dtype)
                mean = total(x.masked_fill(~real.unsqueeze(-1), 0), 1) / count
                self.centre[rows.to(x.device)[first]] = mean.to(self.centre.dtype)[first]
            x = x - self.centre[rows.to(x.device)].to(x.dtype).unsqueeze(1)
        largest = x.abs().amax(-1, keepdim=True)
        x = x / torch.where(largest > 0, largest, 1)  # whose square is neither too large nor too small for the dtype
        norm = length(x).unsqueeze(-1)
        unit = turned(x / norm.clamp_min(torch.finfo(x.dtype).tiny))
        level = levels(self.bits, self.width, str(x.device)).to(x.dtype)
        code = torch.bucketize(unit, (level[1:] + level[:-1]) / 2)
        near = level[code]
        along = total(near * unit)
        factor = 1 / along if self.unbiased else along / total(near.square())
        scale = norm.squeeze(-1) * torch.where(along > 0, factor, torch.zeros_like(factor)) * largest.squeeze(-1)
        return {"packed": pack(code.to(torch.uint8), self.bits), "scale": scale.to(SCALE)}

    def decode(
        self, entries: dict[str, Tensor], rows: Tensor | None, group: Tensor | None, turn: bool = False
    ) -> Tensor:
        del group
        dtype = self.spec.compute_dtype
        level = levels(self.bits, self.width, str(entries["packed"].device)).to(dtype)
        x = looked_up(entries["packed"], self.width, self.bits, level)
        x = x.mul_(entries["scale"].to(dtype).unsqueeze(-1))
        if not turn:
            x = turned_back(x)
        if self.centred:
            centre = (self.centre if rows is None else self.centre[rows.to(x.device)]).to(dtype)
            x = x + (turned(centre) if turn else centre).unsqueeze(1)
        return x

    def select_rows(self, index: Tensor) -> None:
        """Keep only the rows `index` (r,) of the centres. The owner of the slots selects the attributes in `own`."""
        self.spec = self.spec.select(index)
        if self.centred:
            self.centre = self.centre[index.to(self.centre.device)]

    def fields(self) -> dict[str, Any]:
        return super().fields() | {"centre": Field(self.centre.dtype, tuple(self.centre.shape), finite=True)}


class ChannelCodes(SlotCodes):
    """Code the numbers of each channel of a group of tokens in equal steps between its least and largest one (KIVI).

    A code stands for the number low + (high - low) code / (2^bits - 1). Here low and high are the least and largest
    number of the channel in the group, rounded to 8 bits: low downwards, high upwards.

    low, high  (rows, groups, w) uint8, the codes of low and high
    range      (rows, groups, 4) in the compute dtype: (offset of low, step of low, offset of high, step of high). A
               code of `low` stands for offset + step code, with the same offset and step for all channels of the group
    """

    own = ("packed",)

    def __init__(self, spec: Spec, width: int, bits: int, places: int, group: int) -> None:
        super().__init__(spec, width, bits, places)
        self.group = group
        self.low = torch.zeros(spec.rows, 0, width, dtype=torch.uint8, device=spec.device)
        self.high = torch.zeros_like(self.low)
        self.range = torch.zeros(spec.rows, 0, 4, dtype=spec.compute_dtype, device=spec.device)

    def encode(self, rows: Tensor, group: Tensor, x: Tensor, real: Tensor) -> dict[str, Tensor]:
        self.reserve(int(group.max()) + 1)
        unread = ~real.unsqueeze(-1)
        low, high = x.masked_fill(unread, torch.inf).amin(1), x.masked_fill(unread, -torch.inf).amax(1)
        none = torch.isinf(low)  # a group without a token that is read
        low, high = low.masked_fill(none, 0), high.masked_fill(none, 0)
        codes, ranges = [], []
        for bound, rounded in ((low, torch.floor), (high, torch.ceil)):
            start = bound.amin(-1, keepdim=True)
            step = (bound.amax(-1, keepdim=True) - start) / 255
            step = step.clamp_min(torch.finfo(x.dtype).tiny)
            codes.append(rounded((bound - start) / step).clamp(0, 255).to(torch.uint8))
            ranges += [start, step]
        at = (rows.to(x.device), group.to(x.device))
        self.low[at], self.high[at], self.range[at] = codes[0], codes[1], torch.cat(ranges, -1)
        start, step = (found.unsqueeze(1) for found in self._steps(self.low[at], self.high[at], self.range[at]))
        code = ((x - start) / step.clamp_min(torch.finfo(x.dtype).tiny)).round().clamp(0, 2**self.bits - 1)
        return {"packed": pack(code.to(torch.uint8), self.bits)}

    def decode(
        self, entries: dict[str, Tensor], rows: Tensor | None, group: Tensor | None, turn: bool = False
    ) -> Tensor:
        del turn
        packed, device = entries["packed"], entries["packed"].device
        groups = self.low.shape[1]
        if not groups:
            return torch.zeros(*packed.shape[:2], self.width, dtype=self.spec.compute_dtype, device=device)
        if group is None:
            return self._decoded_in_order(packed, rows)
        every = torch.arange(len(packed), device=device) if rows is None else rows.to(device)
        at = (every.unsqueeze(1), group.clamp(0, groups - 1))
        start, step = self._steps(self.low[at], self.high[at], self.range[at])
        return torch.addcmul(start, self._numbers(packed), step)

    def _decoded_in_order(self, packed: Tensor, rows: Tensor | None) -> Tensor:
        """Decode the first t tokens of each of `rows` (None: all), packed (r, t, bytes): return (r, t, w)."""
        t, groups = packed.shape[1], min(self.low.shape[1], packed.shape[1] // self.group)
        shared = [x if rows is None else x[rows.to(packed.device)] for x in (self.low, self.high, self.range)]
        start, step = (x.unsqueeze(2) for x in self._steps(*(x[:, :groups] for x in shared)))
        whole = groups * self.group
        codes = self._numbers(packed[:, :whole]).unflatten(1, (groups, self.group))
        x = torch.nn.functional.pad(torch.addcmul(start, codes, step).flatten(1, 2), (0, 0, 0, t - whole))
        if whole < t and groups < self.low.shape[1]:  # the t tokens end within a group
            start, step = (x.unsqueeze(1) for x in self._steps(*(x[:, groups] for x in shared)))
            x[:, whole:] = torch.addcmul(start, self._numbers(packed[:, whole:]), step)
        return x

    def _numbers(self, packed: Tensor) -> Tensor:
        """Unpack codes from packed (r, t, bytes): return (r, t, w) in the compute dtype."""
        numbers = torch.arange(2**self.bits, dtype=self.spec.compute_dtype, device=packed.device)
        return looked_up(packed, self.width, self.bits, numbers)

    def steps(self, rows: Tensor | None) -> Tensor:
        """Return the steps of each channel, (r, groups, w), for all groups of `rows` (None: all rows)."""
        shared = (x if rows is None else x[rows.to(x.device)] for x in (self.low, self.high, self.range))
        return self._steps(*shared)[1]

    def _steps(self, low: Tensor, high: Tensor, range_: Tensor) -> tuple[Tensor, Tensor]:
        """Return (offset, step), each (..., w): a code of a channel stands for the number offset + step code.

        low, high, range_: entries of the attributes `low`, `high` (..., w) and `range` (..., 4).
        """
        dtype = range_.dtype
        start, least, end, most = (x.unsqueeze(-1) for x in range_.unbind(-1))
        start, end = start + low.to(dtype) * least, end + high.to(dtype) * most
        return start, (end - start).clamp_min(0) / (2**self.bits - 1)

    def sent(self, groups: int) -> dict[str, Any]:
        shared = {name: getattr(self, name)[:, :groups] for name in ("low", "high", "range")}
        return super().sent(groups) | shared

    def reserve(self, groups: int) -> None:
        have = self.low.shape[1]
        if groups <= have:
            return
        for name in ("low", "high", "range"):
            old: Tensor = getattr(self, name)
            wider = old.new_zeros(old.shape[0], max(groups, grown(have)), old.shape[2])
            wider[:, :have] = old
            self.move(name, wider)

    @property
    def token_bytes(self) -> float:
        shared = 2 * self.width + 4 * self.range.element_size()
        return super().token_bytes + shared / self.group

    def select_rows(self, index: Tensor) -> None:
        """Keep only the rows `index` (r,) of the ranges. The owner of the slots selects the attributes in `own`."""
        self.spec = self.spec.select(index)
        for name in ("low", "high", "range"):
            setattr(self, name, getattr(self, name)[index.to(self.low.device)])

    def fields(self) -> dict[str, Any]:
        rows, dtype = self.spec.rows, self.range.dtype
        ranges = {name: Field(torch.uint8, (rows, "groups", self.width)) for name in ("low", "high")}
        return super().fields() | ranges | {"range": Field(dtype, (rows, "groups", 4), finite=True)}
