"""Pack codes of 1 to 8 bits into bytes, and read them back.

The bits of a code are split into parts of 4, 2 and 1 bits; 8 bits are one part. A code of 3 bits has one part of its
low 2 bits and one of its high bit. A plane holds the parts of one size of all codes of a vector, so each of its bytes
holds 8, 4, 2 or 1 whole parts. A vector's planes lie one after the other, the one with the largest parts first.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

_TOGETHER = {8: torch.float64, 16: torch.complex128}
"""Dtypes of so many bytes, as which several numbers are copied at once."""


def planes(bits: int) -> list[int]:
    """Return the bits per part of each plane, largest first; they add up to `bits`, 1 .. 8."""
    return [plane for plane in (8, 4, 2, 1) if bits & plane]


def size(width: int, bits: int) -> int:
    """Return how many bytes `width` codes of `bits` bits each take when packed."""
    return sum(-(-width * plane // 8) for plane in planes(bits))


def pack(code: Tensor, bits: int) -> Tensor:
    """Pack codes (..., width), uint8 below 2^bits, into bytes (..., size(width, bits))."""
    packed, low = [], 0
    for plane in planes(bits):
        each = 8 // plane
        part = (code >> low) & (2**plane - 1)
        part = torch.nn.functional.pad(part, (0, -part.shape[-1] % each)).unflatten(-1, (-1, each))
        packed.append((part << _shifts(plane, code)).sum(-1, dtype=torch.uint8))
        low += plane
    return packed[0] if len(packed) == 1 else torch.cat(packed, -1)


def unpack(packed: Tensor, width: int, bits: int) -> Tensor:
    """Undo `pack`: return the codes (..., width), uint8."""
    code, low, at = None, 0, 0
    for plane in planes(bits):
        length = -(-width * plane // 8)
        part = packed[..., at : at + length]
        if plane < 8:
            part = ((part.unsqueeze(-1) >> _shifts(plane, packed)) & (2**plane - 1)).flatten(-2)[..., :width]
        code = part if code is None else code | (part << low)
        low, at = low + plane, at + length
    assert code is not None
    return code


def _shifts(plane: int, like: Tensor) -> Tensor:
    return torch.arange(8 // plane, dtype=torch.uint8, device=like.device) * plane


def looked_up(packed: Tensor, width: int, bits: int, level: Tensor) -> Tensor:
    """Replace each packed code by its entry of the table `level` (2^bits,): return (..., width) in its dtype.

    For 1, 2, 4 and 8 bits, all codes of a byte are replaced at once, by a table of all 256 bytes. Where a byte's
    entries are 8 or 16 bytes long, they are copied as one number, because torch copies numbers faster than rows.
    """
    shape = packed.shape[:-1]
    if len(planes(bits)) > 1:
        return level.index_select(0, unpack(packed, width, bits).flatten().int()).view(*shape, width)
    table = level[_every_byte(bits, str(packed.device))]
    index, together = packed.int().flatten(), _TOGETHER.get(table.shape[1] * table.element_size())
    if bits == 8:
        numbers = level.index_select(0, index)
    elif together is None:
        numbers = table.index_select(0, index)
    else:
        numbers = table.view(together).view(-1).index_select(0, index).view(level.dtype)
    numbers = numbers.view(*shape, packed.shape[-1] * (8 // bits))
    return numbers if numbers.shape[-1] == width else numbers[..., :width]


@lru_cache(maxsize=16)
def _every_byte(bits: int, device: str) -> Tensor:
    """Return the codes (256, 8 / bits), int64, that each byte stands for; bits is 1, 2, 4 or 8."""
    every = torch.arange(256, dtype=torch.uint8, device=device).unsqueeze(1)
    return unpack(every, 8 // bits, bits).long()
