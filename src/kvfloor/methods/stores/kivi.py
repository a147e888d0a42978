"""Code keys per channel over groups of tokens and values per token, with ranges in the cache's own dtype (KIVI).

A row is one (batch item, kv head) stream, a slot the place of one held token, a place its index in flat tensors over
all rows, a channel one entry of a key or value. A code is the small integer that stands for a number. A group is
`group` consecutive tokens of a row, which are coded together when the last of them has come. In shapes, r are the rows
of a call, t tokens of one row, w the width of a key or value.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvfloor.core.method import part_text
from kvfloor.core.spec import Spec
from kvfloor.methods.stores.coded import Coding
from kvfloor.methods.stores.codes import GroupCodes, SlotCodes, counting
from kvfloor.methods.stores.packing import looked_up, pack
from kvfloor.validation import whole

_TEXT = re.compile(r"kivi([0-9]+)")


@dataclass(frozen=True)
class Kivi(Coding):
    """Code keys per channel and values per token in 8, 4 or 2 bits, by rounding: "kivi4" has 4 bits per number.

    Quantisation is asymmetric, after KIVI (Liu et al. 2024): a code stands for the number offset + step * code. Keys
    have one offset and step per channel of a group, values one per token; both are kept in the cache's dtype. The
    tokens of a row's open group, fewer than `group`, are kept as they are given. Ranges belong to a group, so this
    store is for methods that keep every token, such as `exact`. The method `quant` is `exact` with this store.
    bits   bits per number: 8, 4 or 2
    group  number of tokens that are coded together
    first  number of a row's first tokens that are never coded
    """

    name: ClassVar[str] = "kivi"
    paper: ClassVar[str] = "Liu et al. 2024, KIVI (arXiv 2402.02750)"
    bits: int
    group: int = 32
    first: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or self.bits not in (8, 4, 2):
            raise ValueError(f"bits must be 8, 4 or 2, got {self.bits!r}")
        whole("group", self.group)
        whole("first", self.first, least=0)

    @classmethod
    def parsed(cls, text: str, **arguments: Any) -> Kivi | None:
        """Return the store that a text such as "kivi4" names; None if it is no such text.

        arguments: further fields of the store, such as `group`.
        """
        found = _TEXT.fullmatch(text)
        return None if found is None else cls(int(found[1]), **arguments)

    @property
    def loses(self) -> bool:
        return False

    def least_group(self) -> int:
        return self.group

    def key_codes(self, spec: Spec, places: int, group: int, lose: bool) -> SlotCodes:
        if lose:
            raise ValueError(f"{self} codes groups of keys that all stay, so it needs slots that lose no tokens")
        return RangedChannels(spec, spec.d, self.bits, places, group)

    def value_codes(self, spec: Spec, places: int) -> SlotCodes:
        return RangedTokens(spec, spec.dv, self.bits, places)

    def __str__(self) -> str:
        return f"{self.name}{self.bits}{part_text(self, skip=('bits',)).removeprefix(self.name)}"


class RangedChannels(GroupCodes):
    """Code each channel of a group in equal steps from its least number, with offset and step in the cache's dtype.

    low, step: (rows, groups, w), offset and step of each channel.
    """

    shared = ("low", "step")
    rounded = True

    def __init__(self, spec: Spec, width: int, bits: int, places: int, group: int) -> None:
        super().__init__(spec, width, bits, places, group)
        self.low = torch.zeros(spec.rows, 0, width, dtype=spec.dtype, device=spec.device)
        self.step = torch.zeros_like(self.low)

    def _ranged(self, low: Tensor, high: Tensor) -> tuple[Tensor, ...]:
        return _range(low, high, self.bits, self.spec.dtype)

    def _steps(self, *shared: Tensor) -> tuple[Tensor, Tensor]:
        low, step = (x.to(self.spec.compute_dtype) for x in shared)
        return low, step

    def _half_steps(self, start: Tensor, step: Tensor) -> Tensor:
        return _half_step(start, step, self.bits, self.spec.dtype)

    def decode(
        self, entries: dict[str, Tensor], rows: Tensor | None, group: Tensor | None, turn: bool = False
    ) -> Tensor:
        x = super().decode(entries, rows, group, turn)
        return x.to(self.spec.dtype).to(x.dtype)


class RangedTokens(SlotCodes):
    """Code each token by itself, in equal steps from its least number, with offset and step in the cache's dtype.

    low, step: (places,), offset and step of each slot's token.
    """

    own = ("packed", "low", "step")
    rounded = True

    def __init__(self, spec: Spec, width: int, bits: int, places: int) -> None:
        super().__init__(spec, width, bits, places)
        self.low = torch.zeros(places, dtype=spec.dtype, device=spec.device)
        self.step = torch.zeros_like(self.low)

    def encode(self, rows: Tensor, group: Tensor, x: Tensor, real: Tensor) -> dict[str, Tensor]:
        del rows, group, real
        low, step = _range(x.amin(-1), x.amax(-1), self.bits, self.spec.dtype)
        wide = step.to(x.dtype).clamp_min(torch.finfo(x.dtype).tiny).unsqueeze(-1)
        code = ((x - low.to(x.dtype).unsqueeze(-1)) / wide).round().clamp(0, 2**self.bits - 1)
        return {"packed": pack(code.to(torch.uint8), self.bits), "low": low, "step": step}

    def decode(
        self, entries: dict[str, Tensor], rows: Tensor | None, group: Tensor | None, turn: bool = False
    ) -> Tensor:
        del rows, group, turn
        dtype = self.spec.compute_dtype
        numbers = counting(2**self.bits, dtype, str(self.packed.device))
        low, step = (entries[name].to(dtype).unsqueeze(-1) for name in ("low", "step"))
        x = torch.addcmul(low, looked_up(entries["packed"], self.width, self.bits, numbers), step)
        return x.to(self.spec.dtype).to(dtype)

    def bounds(self, entries: dict[str, Tensor], group: Tensor) -> tuple[Tensor, Tensor]:
        y = self.decode(entries, None, group)
        low, step = (entries[name].to(y.dtype) for name in ("low", "step"))
        error = _half_step(low, step, self.bits, self.spec.dtype) * self.width**0.5
        return y.square().sum(-1).sqrt() + error, error

    def select_rows(self, index: Tensor) -> None:
        """Keep the spec of the rows `index` (r,). The owner of the slots selects the attributes in `own`."""
        self.spec = self.spec.select(index)


def _half_step(low: Tensor, step: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Return the largest error of numbers coded with this offset and step, which were rounded to `dtype`.

    It is half a step, and the rounding of the offset, of the step and of the decoded number.
    """
    kind = torch.finfo(dtype)
    return step / 2 + 1.5 * kind.eps * (low.abs() + 2**bits * (step + kind.tiny))


def _range(low: Tensor, high: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return offset and step, in `dtype`, of codes of `bits` bits for numbers from `low` to `high`."""
    offset = low.to(dtype)
    return offset, ((high - offset.to(low.dtype)) / (2**bits - 1)).to(dtype)
