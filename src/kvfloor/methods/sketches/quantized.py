"""Quantise keys and values to a few bits per number, as a baseline for eviction (KIVI).

In this file a row is one (batch item, kv head) stream. A group is `group` consecutive tokens of a row, which are
quantised together once the last of them has come. The newest tokens of a row, fewer than a group, stay unquantised
until then; a slot is the place of one of them. A code is the small integer that stands for a quantised number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvfloor.core.arena import grown
from kvfloor.core.attend import compute_dtype
from kvfloor.core.blocked import Blocked
from kvfloor.core.fields import Field, require_equal
from kvfloor.core.memory import Memory
from kvfloor.core.method import Method, Traits
from kvfloor.core.partial import Partial
from kvfloor.core.slots import Slots
from kvfloor.core.spec import Spec
from kvfloor.validation import count


@dataclass(frozen=True)
class Quantized(Method):
    """Quantise keys per channel over groups of `group` tokens, and values per token.

    Quantisation is asymmetric and rounds to nearest, after KIVI (Liu et al. 2024, arXiv 2402.02750): a code stands for
    the number offset + step * code. Keys have one offset and step per channel of a group, values one per token; both
    are kept in the cache's own dtype. The newest tokens, up to group - 1 of them, stay unquantised. No token is
    evicted, so memory grows with the stream.
    bits   bits per code: 8, 4 or 2
    group  tokens that are quantised together
    """

    name: ClassVar[str] = "quant"
    paper: ClassVar[str] = "Liu et al. 2024, KIVI (arXiv 2402.02750)"
    bits: int = 8
    group: int = 32

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or self.bits not in (8, 4, 2):
            raise ValueError(f"quant: bits must be 8, 4 or 2, got {self.bits!r}")
        count("quant", least=1, group=self.group)

    @property
    def traits(self) -> Traits:
        return Traits(normalised=False, value_linear=False, lossy_values=True, constant_memory=False)

    def open(self, spec: Spec) -> QuantizedState:
        return QuantizedState(self, spec)

    def capacity(self, n: int, prompt: int | None = None, pinned: int = 0) -> int | None:
        del n, prompt, pinned
        return None


class QuantizedState(Blocked[Quantized]):
    """Hold each row's full groups of `group` tokens as packed codes, and the newer tokens unquantised in slots."""

    def __init__(self, method: Quantized, spec: Spec) -> None:
        super().__init__(method, spec, Slots(spec, [method.group] * spec.rows), method.group)
        self.keys = Codes(spec, spec.d, method.bits, method.group, per_channel=True)
        self.values = Codes(spec, spec.dv, method.bits, method.group, per_channel=False)
        self.groups = torch.zeros(spec.rows, dtype=torch.int64)  # full groups per row

    def require_sound(self, fields: dict[str, Any]) -> None:
        super().require_sound(fields)
        require_equal(fields["groups"], fields["seen"] // self.block, "full groups")
        require_equal(fields["slots"]["held"], fields["seen"] % self.block, "tokens of the open group")
        for name in ("keys", "values"):
            if int(fields["groups"].max()) > fields[name]["packed"].shape[1]:
                raise ValueError(f"{name} has fewer groups than {fields['groups'].tolist()}")

    @property
    def held(self) -> Tensor:
        return self.slots.held + self.groups * self.block

    @property
    def bytes_read(self) -> int:
        return self.nbytes

    def _rest(self, q: Tensor) -> Partial | None:
        most = int(self.groups.max())
        if most == 0:
            return None
        dead = torch.arange(most * self.block) >= (self.groups * self.block).unsqueeze(1)
        hide = dead.unsqueeze(1).to(q.device) if bool(dead.any()) else None
        k, v = self.keys.decode(most, self.spec), self.values.decode(most, self.spec)
        return Partial.over(q, k, v, self.spec, hide=hide)

    def _close(self, rows: Tensor | None) -> None:
        rows = torch.arange(self.spec.rows) if rows is None else rows
        view = self.slots.view(rows, self.block)
        order = view.position.argsort(1).unsqueeze(-1)
        self.keys.write(rows, self.groups[rows], view.k.gather(1, order.expand_as(view.k)))
        self.values.write(rows, self.groups[rows], view.v.gather(1, order.expand_as(view.v)))
        self.groups[rows] += 1
        width = int(self.slots.held.max())
        leaving = torch.zeros(self.spec.rows, width, dtype=torch.bool)
        leaving[rows] = True
        self.slots.evict(leaving & (torch.arange(width) < self.slots.held.unsqueeze(1)))


class Codes(Memory):
    """Hold the quantised keys, or the quantised values, of full groups: codes with an offset and a step.

    There is one offset and step per channel of a group (keys) or per token (values). The number that a code stands for
    is offset + step * code. These numbers have the shape (rows, groups, group, width), with the width of a key or
    value.
    packed     (rows, groups, group, bytes) uint8: the codes of the width axis, one or more per byte
    low, step  offset and step: (rows, groups, 1, width) per channel, or (rows, groups, group, 1) per token
    """

    def __init__(self, spec: Spec, width: int, bits: int, group: int, per_channel: bool) -> None:
        self.width, self.bits, self.group, self.per_channel = width, bits, group, per_channel
        per_byte = 8 // bits
        shape = (1, width) if per_channel else (group, 1)
        self.packed = torch.zeros(spec.rows, 1, group, -(-width // per_byte), dtype=torch.uint8, device=spec.device)
        self.low = torch.zeros(spec.rows, 1, *shape, dtype=spec.dtype, device=spec.device)
        self.step = torch.zeros(spec.rows, 1, *shape, dtype=spec.dtype, device=spec.device)

    def fields(self) -> dict[str, Any]:
        tensors = {name: getattr(self, name) for name in ("packed", "low", "step")}
        return {name: Field(x.dtype, (x.shape[0], "groups", *x.shape[2:])) for name, x in tensors.items()}

    def write(self, rows: Tensor, at: Tensor, x: Tensor) -> None:
        """Quantise x (r, group, width) and store it: x[i] becomes group number at[i] of row rows[i]."""
        self._grow(int(at.max()) + 1)
        x = x.to(compute_dtype(x.dtype))
        axis = 1 if self.per_channel else 2
        low, high = x.amin(axis, keepdim=True).to(self.low.dtype), x.amax(axis, keepdim=True)
        step = ((high - low.to(x.dtype)) / (2**self.bits - 1)).to(self.step.dtype)
        code = (x - low.to(x.dtype)) / step.to(x.dtype).clamp_min(torch.finfo(x.dtype).tiny)
        code = code.round().clamp(0, 2**self.bits - 1).to(torch.uint8)
        at, rows = at.to(x.device), rows.to(x.device)
        self.packed[rows, at], self.low[rows, at], self.step[rows, at] = self._pack(code), low, step

    def decode(self, groups: int, spec: Spec) -> Tensor:
        """Return the dequantised numbers of every row's first `groups` groups: (rows, groups * group, width).

        The result has the dtype of the cache, which `spec` (the cache's sizes and constants) tells.
        """
        code = self.packed[:, :groups]
        if self.bits < 8:
            shifts = torch.arange(8 // self.bits, dtype=torch.uint8, device=code.device) * self.bits
            code = ((code.unsqueeze(-1) >> shifts) & (2**self.bits - 1)).flatten(-2)[..., : self.width]
        dtype = spec.compute_dtype
        low, step = self.low[:, :groups].to(dtype), self.step[:, :groups].to(dtype)
        return torch.addcmul(low, code.to(dtype), step).to(spec.dtype).flatten(1, 2)

    def _pack(self, code: Tensor) -> Tensor:
        per_byte = 8 // self.bits
        pad = -code.shape[-1] % per_byte
        code = torch.nn.functional.pad(code, (0, pad)).unflatten(-1, (-1, per_byte))
        shifts = torch.arange(per_byte, dtype=torch.uint8, device=code.device) * self.bits
        return (code << shifts).sum(-1).to(torch.uint8)

    def _grow(self, needed: int) -> None:
        have = self.packed.shape[1]
        if needed <= have:
            return
        for name in ("packed", "low", "step"):
            old: Tensor = getattr(self, name)
            wider = old.new_zeros(old.shape[0], max(needed, grown(have)), *old.shape[2:])
            wider[:, :have] = old
            self.move(name, wider)
