"""Code keys or values in few bits per number: each token by itself, or each channel of a group of tokens.

A row is one (batch item, kv head) stream, a place the index of a slot in flat tensors over all rows, a channel one
entry of a key or value. A code is the small integer that stands for a number. Tokens of a row are coded in groups of
consecutive ones. In shapes, r are the rows of a call, t tokens of one row, w the width of a key or value. The compute
dtype is float64 for a float64 cache, float32 for all others.
"""

from __future__ import annotations

from abc import abstractmethod
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvfloor.core.fields import Field
from kvfloor.core.memory import Memory
from kvfloor.core.rowwise import length, total
from kvfloor.core.spec import Spec
from kvfloor.methods.stores.dither import dither, steps_with
from kvfloor.methods.stores.errors import of_token
from kvfloor.methods.stores.levels import levels
from kvfloor.methods.stores.packing import looked_up, pack, size, unpack
from kvfloor.methods.stores.turn import rotated, turned, turned_back

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

    @abstractmethod
    def bounds(self, entries: dict[str, Tensor], group: Tensor) -> tuple[Tensor, Tensor]:
        """Return upper bounds on (|x|, |y - x|), each (r, t), for tokens x of all rows that are decoded as y.

        entries  the tokens' entries of the attributes in `own`, name -> (r, t, ...)
        group    (r, t) index of each token's group in its row
        The bounds follow from what is stored alone, and hold up to rounding in the compute dtype. Those of tokens that
        are not coded yet are arbitrary.
        """

    coarse: tuple[str, ...] = ()
    """Names of those attributes in `own` that are enough for a coarser reading: then `decode` gets their entries alone.
    Empty: there is no coarser reading."""

    turns = False
    """True if `decode` can return rotated numbers, without the work of rotating them back."""

    dithered = False
    """True if codes have a dither, which is subtracted on decoding (`shift`)."""

    def shift(self, entries: dict[str, Tensor], rows: Tensor | None, position: Tensor, turn: bool = False) -> Tensor:
        """Return what the dither adds to decoded numbers, (r, t, w): for codes that are `dithered` alone.

        entries, rows, turn  as for `decode`
        position             (r, t) the tokens' positions in their rows
        """
        raise NotImplementedError("these codes have no dither")

    rounded = False
    """True if all decoded numbers are numbers of the cache's dtype."""

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
            x = x + (rotated(centre) if turn else centre).unsqueeze(1)
        return x

    def bounds(self, entries: dict[str, Tensor], group: Tensor) -> tuple[Tensor, Tensor]:
        del group
        packed, dtype = entries["packed"], self.spec.compute_dtype
        level = levels(self.bits, self.width, str(packed.device)).to(dtype)
        c = unpack(packed, self.width, self.bits).long()
        size, error = of_token(c, level, self.unbiased)
        rounding = torch.finfo(SCALE).eps / 2
        # The length of y before its scale was rounded is at most this.
        most = entries["scale"].to(dtype) * level[c].square().sum(-1).sqrt() / (1 - rounding)
        size, error = (torch.where(most > 0, x, 0) for x in (size * most, (error + rounding) * most))
        if self.centred:
            size = size + self.centre.to(dtype).square().sum(-1).sqrt().unsqueeze(1)
        return size, error

    def select_rows(self, index: Tensor) -> None:
        """Keep only the rows `index` (r,) of the centres. The owner of the slots selects the attributes in `own`."""
        self.spec = self.spec.select(index)
        if self.centred:
            self.centre = self.centre[index.to(self.centre.device)]

    def fields(self) -> dict[str, Any]:
        return super().fields() | {"centre": Field(self.centre.dtype, tuple(self.centre.shape), finite=True)}


class SharedCodes(SlotCodes):
    """Keep the codes of tokens, and beside them some numbers that the tokens of a group share.

    shared  names of the attributes that are tensors (rows, groups, n): what the tokens of a group share
    lead    number of tokens that a row's first group lacks: group i has those at the positions from i * group - lead
    """

    own = ("packed",)
    shared: ClassVar[tuple[str, ...]]
    lead = 0  # an attribute of the object, with its bytes, only where it is not 0

    def __init__(
        self, spec: Spec, width: int, bits: int, places: int, group: int, lead: int = 0, dithered: bool = False
    ) -> None:
        super().__init__(spec, width, bits, places)
        self.group = group
        if lead:
            self.lead = lead
        if dithered:
            self.dithered = True

    @property
    def _groups(self) -> int:
        """Return the number of groups per row for which there is room in the attributes in `shared`."""
        return getattr(self, self.shared[0]).shape[1]

    def sent(self, groups: int) -> dict[str, Any]:
        shared = {name: getattr(self, name)[:, :groups] for name in self.shared}
        return super().sent(groups) | shared

    def reserve(self, groups: int) -> None:
        have = self._groups
        if groups <= have:
            return
        for name in self.shared:
            old: Tensor = getattr(self, name)
            wider = old.new_zeros(old.shape[0], groups, old.shape[2])
            wider[:, :have] = old
            self.move(name, wider)

    @property
    def shared_bytes(self) -> float:
        """Return one token's equal part of the bytes of the numbers that its group shares."""
        shared = [getattr(self, name) for name in self.shared]
        return sum(x.shape[2] * x.element_size() for x in shared) / self.group

    @property
    def token_bytes(self) -> float:
        return super().token_bytes + self.shared_bytes

    def select_rows(self, index: Tensor) -> None:
        """Keep only the rows `index` (r,) of what groups share; the owner of the slots selects the attributes in `own`.

        The object's spec is changed likewise.
        """
        self.spec = self.spec.select(index)
        for name in self.shared:
            shared: Tensor = getattr(self, name)
            setattr(self, name, shared[index.to(shared.device)])

    def fields(self) -> dict[str, Any]:
        shared = {name: getattr(self, name) for name in self.shared}
        return super().fields() | {
            name: Field(x.dtype, (x.shape[0], "groups", x.shape[2]), finite=x.is_floating_point())
            for name, x in shared.items()
        }


class GroupCodes(SharedCodes):
    """Code the numbers of each channel of a group of tokens in equal steps: a code stands for offset + step code.

    `_steps` computes the offset and the step of each channel from what the tokens of a group share.
    """

    @abstractmethod
    def _ranged(self, low: Tensor, high: Tensor) -> tuple[Tensor, ...]:
        """Return the entries (r, ...) of the attributes in `shared` for r groups.

        low, high: (r, w) the least and largest number of each channel in the group.
        """

    @abstractmethod
    def _steps(self, *shared: Tensor) -> tuple[Tensor, Tensor]:
        """Return (offset, step), each (..., w), in the compute dtype, from entries (..., n) of what groups share."""

    def encode(self, rows: Tensor, group: Tensor, x: Tensor, real: Tensor) -> dict[str, Tensor]:
        self.reserve(int(group.max()) + 1)
        unread = ~real.unsqueeze(-1)
        low, high = x.masked_fill(unread, torch.inf).amin(1), x.masked_fill(unread, -torch.inf).amax(1)
        none = torch.isinf(low)  # a group without a token that is read
        at = (rows.to(x.device), group.to(x.device))
        entries = self._ranged(low.masked_fill(none, 0), high.masked_fill(none, 0))
        for name, entry in zip(self.shared, entries, strict=True):
            getattr(self, name)[at] = entry
        shared = [getattr(self, name)[at].unsqueeze(1) for name in self.shared]
        start, step = self._steps(*shared)
        least = torch.finfo(x.dtype).tiny
        if not self.dithered:
            return self._packed(((x - start) / step.clamp_min(least)).round(), shared)
        position = (at[1] * self.group - self.lead).unsqueeze(1) + torch.arange(x.shape[1], device=x.device)
        u = dither(self.spec, rows, position, self.width, "keys")
        above = (x.double() - start.double()) / step.double().clamp_min(least)
        return self._packed(steps_with(u, above, self._largest(shared).double()).to(x.dtype), shared)

    def _largest(self, shared: list[Tensor]) -> Tensor:
        """Return the largest code, for every channel alike or (r, 1, w), from entries (r, 1, ...) of the groups."""
        return torch.tensor(2.0**self.bits - 1, device=shared[0].device)

    def shift(self, entries: dict[str, Tensor], rows: Tensor | None, position: Tensor, turn: bool = False) -> Tensor:
        del turn
        u = dither(self.spec, rows, position, self.width, "keys")
        if not self._groups:
            return torch.zeros_like(u)
        group = ((position + self.lead) // self.group).clamp(0, self._groups - 1)
        every = torch.arange(len(u), device=u.device).unsqueeze(1)
        return (0.5 - u) * self.steps(rows)[every, group]

    def _packed(self, number: Tensor, shared: list[Tensor]) -> dict[str, Tensor]:
        """Return the entries of the attributes in `own` for numbers (r, t, w) of steps above the offset.

        shared: entries (r, 1, ...) of what their groups share.
        """
        del shared
        return {"packed": pack(number.clamp(0, 2**self.bits - 1).to(torch.uint8), self.bits)}

    def decode(
        self, entries: dict[str, Tensor], rows: Tensor | None, group: Tensor | None, turn: bool = False
    ) -> Tensor:
        del turn
        packed, device = entries["packed"], entries["packed"].device
        groups = self._groups
        if not groups:
            return torch.zeros(*packed.shape[:2], self.width, dtype=self.spec.compute_dtype, device=device)
        if group is None:
            return self._decoded_in_order(entries, rows)
        every = torch.arange(len(packed), device=device) if rows is None else rows.to(device)
        at = (every.unsqueeze(1), group.clamp(0, groups - 1))
        return self._numbers(entries, [getattr(self, name)[at] for name in self.shared])

    def bounds(self, entries: dict[str, Tensor], group: Tensor) -> tuple[Tensor, Tensor]:
        y = self.decode(entries, None, group)
        if not self._groups:
            return y.sum(-1), y.sum(-1)
        every = torch.arange(len(y), device=y.device).unsqueeze(1)
        shared = [getattr(self, name)[every, group.clamp(0, self._groups - 1)] for name in self.shared]
        start, step = self._steps(*shared)
        error = self._half_steps(start, step).square().sum(-1).sqrt()
        away = 2 * error if self.dithered else error  # y is without its shift
        return y.square().sum(-1).sqrt() + away, error

    def _half_steps(self, start: Tensor, step: Tensor) -> Tensor:
        """Return the largest error (..., w) of numbers that are coded with this offset and step, each (..., w)."""
        del start
        return step / 2

    def _decoded_in_order(self, entries: dict[str, Tensor], rows: Tensor | None) -> Tensor:
        """Decode the first t tokens of each of `rows` (None: all), from entries (r, t, ...): return (r, t, w)."""
        every = [getattr(self, name) for name in self.shared]
        shared = every if rows is None else [x[rows.to(x.device)] for x in every]
        short = (self.group - self.lead) % self.group  # tokens of the first group, where it is not whole
        if not short:
            return self._whole_groups(entries, shared)
        head, rest = ({name: x[:, part] for name, x in entries.items()} for part in (slice(short), slice(short, None)))
        first = self._numbers(head, [x[:, :1] for x in shared])
        return torch.cat((first, self._whole_groups(rest, [x[:, 1:] for x in shared])), 1)

    def _whole_groups(self, entries: dict[str, Tensor], shared: list[Tensor]) -> Tensor:
        """Decode t tokens of groups that are whole, from their entries (r, t, ...): return (r, t, w).

        shared: (r, groups, ...) what the tokens of each of these groups share.
        """
        t, have = entries["packed"].shape[1], shared[0].shape[1]
        groups = min(have, t // self.group)
        whole = groups * self.group
        inside = {name: x.narrow(1, 0, whole).unflatten(1, (groups, self.group)) for name, x in entries.items()}
        x = self._numbers(inside, [x[:, :groups].unsqueeze(2) for x in shared])
        x = x.flatten(1, 2)
        if whole == t:
            return x
        x = torch.nn.functional.pad(x, (0, 0, 0, t - whole))
        if groups < have:  # the t tokens end within a group
            after = {name: x[:, whole:] for name, x in entries.items()}
            x[:, whole:] = self._numbers(after, [x[:, groups].unsqueeze(1) for x in shared])
        return x

    def _numbers(self, entries: dict[str, Tensor], shared: list[Tensor]) -> Tensor:
        """Return the numbers (..., w) of tokens, from their entries and from what their groups share, each (..., n)."""
        start, step = self._steps(*shared)
        above = self._steps_above(entries, shared)
        return torch.addcmul(start, above, step, out=above)

    def _steps_above(self, entries: dict[str, Tensor], shared: list[Tensor]) -> Tensor:
        """Return how many steps (..., w) above the offset each number is, in the compute dtype: a new tensor."""
        del shared
        return unpacked(entries["packed"], self.width, self.bits, self.spec.compute_dtype)

    def steps(self, rows: Tensor | None) -> Tensor:
        """Return the steps of each channel, (r, groups, w), for all groups of `rows` (None: all rows)."""
        shared = (getattr(self, name) for name in self.shared)
        return self._steps(*(x if rows is None else x[rows.to(x.device)] for x in shared))[1]


class SteppedChannels(GroupCodes):
    """Code each channel of a group in equal steps from the least to the largest of its numbers.

    Both ends are rounded to 8 bits, the least number downwards and the largest upwards.

    low, high  (rows, groups, w) uint8, the codes of the ends
    range      (rows, groups, 4) in the compute dtype: (offset of low, step of low, offset of high, step of high). A
               code of `low` stands for offset + step code, with the same offset and step for all channels of the group
    """

    shared = ("low", "high", "range")

    def __init__(
        self, spec: Spec, width: int, bits: int, places: int, group: int, lead: int = 0, dithered: bool = False
    ) -> None:
        super().__init__(spec, width, bits, places, group, lead, dithered)
        self.low = torch.zeros(spec.rows, 0, width, dtype=torch.uint8, device=spec.device)
        self.high = torch.zeros_like(self.low)
        self.range = torch.zeros(spec.rows, 0, 4, dtype=spec.compute_dtype, device=spec.device)

    @property
    def last(self) -> int:
        """Return the largest code of a number, which stands for the upper end of its channel's range."""
        return 2**self.bits - 1

    def _ranged(self, low: Tensor, high: Tensor) -> tuple[Tensor, ...]:
        return ranged(low, high)

    def _steps(self, *shared: Tensor) -> tuple[Tensor, Tensor]:
        start, width = ranges(*shared)
        return start, width / self.last


class ChannelCodes(SteppedChannels):
    """Code the numbers of each channel of a group in equal steps between its least and largest one (after KIVI).

    A code stands for the number low + (high - low) code / (2^bits - 1). Here low and high are the ends of the
    channel's range (`SteppedChannels`).
    """


def ranged(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the codes of the ends of channels' ranges, and the range of all ends: `ChannelCodes` says what they are.

    low, high: (r, w) the least and largest number of each channel. The results are (r, w), (r, w) and (r, 4).
    """
    codes, all_ends = [], []
    for bound, rounded in ((low, torch.floor), (high, torch.ceil)):
        start = bound.amin(-1, keepdim=True)
        step = (bound.amax(-1, keepdim=True) - start) / 255
        step = step.clamp_min(torch.finfo(bound.dtype).tiny)
        codes.append(rounded((bound - start) / step).clamp(0, 255).to(torch.uint8))
        all_ends += [start, step]
    return codes[0], codes[1], torch.cat(all_ends, -1)


def ranges(low: Tensor, high: Tensor, range_: Tensor) -> tuple[Tensor, Tensor]:
    """Return the least number of channels, and the width of their range, (..., w), from what `ranged` returned."""
    dtype = range_.dtype
    start, least, end, most = range_.split(1, -1)
    start, end = start + low.to(dtype) * least, end + high.to(dtype) * most
    return start, (end - start).clamp_min(0)


def unpacked(packed: Tensor, width: int, bits: int, dtype: torch.dtype) -> Tensor:
    """Return packed codes (..., bytes) as numbers (..., width) in `dtype`."""
    return looked_up(packed, width, bits, counting(2**bits, dtype, str(packed.device)))


@lru_cache(maxsize=64)
def counting(n: int, dtype: torch.dtype, device: str) -> Tensor:
    """Return the numbers 0 .. n - 1, (n,), made once."""
    return torch.arange(n, dtype=dtype, device=device)
