"""Compress tables of whole numbers, most of them near 0, with zstandard: `pip install "kvfloor[coded]"`.

A number i is stored as the unsigned 2i or -2i - 1 (zigzag), which is small where i is near 0. Each column of a table is
packed in as few bits as its largest number needs: 0, 2, 4, 8, 16, 24 or 32. Columns come one after the other, those of
equal bits together, so that the compressor's codes fit their numbers. Several numbers of few bits share a byte; so even
numbers that are nearly always 0 can take less than the one bit that a Huffman code has for a byte.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvfloor.methods.stores.packing import pack, unpack

LEVEL = 19  # tables of 2,048 tokens take 7 % more bytes at level 3, and a 100th of the time
_WIDTHS = (0, 2, 4, 8, 16, 24, 32)  # bits per number of a column
_MOST = 2**30


class DamagedCode(ValueError):
    """Report bytes that `compressed` did not make for a table of this shape."""


def installed() -> bool:
    """Return True if the package zstandard can be imported."""
    return find_spec("zstandard") is not None


def zstandard() -> Any:
    """Return the module zstandard. Raises ValueError, with the command that installs it, if it is not installed."""
    try:
        import zstandard as module
    except ImportError:
        raise ValueError(
            'coded= needs the package zstandard, which is not installed: pip install "kvfloor[coded]"'
        ) from None
    return module


def compressed(numbers: Tensor) -> bytes:
    """Return a table of whole numbers (n, columns), int64, as bytes. Raises ValueError for numbers beyond 2^30."""
    if numbers.numel() and int(numbers.abs().max()) > _MOST:
        raise ValueError(f"numbers up to {int(numbers.abs().max())} cannot be coded: take a larger error")
    unsigned = torch.where(numbers < 0, -2 * numbers - 1, 2 * numbers).T.contiguous()
    largest = unsigned.amax(1) if unsigned.shape[1] else unsigned.new_zeros(len(unsigned))
    kind = (largest.unsqueeze(1) >= torch.tensor([1 << bits for bits in _WIDTHS])).sum(1)
    parts = [kind.to(torch.uint8)]
    for at, bits in enumerate(_WIDTHS):
        table = unsigned[kind == at]
        if bits and table.numel():
            for plane in range(-(-bits // 8)):
                parts.append(pack((table >> (8 * plane) & 0xFF).to(torch.uint8), min(bits, 8)).flatten())
    data = torch.cat(parts).numpy().tobytes()
    return zstandard().ZstdCompressor(level=LEVEL).compress(data)


def restored(data: bytes, n: int, columns: int) -> Tensor:
    """Return the table (n, columns), int64, that `compressed` made into `data`.

    Raises DamagedCode if the bytes are not those of a table of this shape; memory is bounded by the shape.
    """
    module = zstandard()
    try:
        size = module.frame_content_size(data)
        if not 0 <= size <= columns * (1 + 4 * n):
            raise DamagedCode(f"{size} bytes cannot be a table of {n} times {columns} numbers")
        raw = module.ZstdDecompressor().decompress(data, max_output_size=size)
    except module.ZstdError as cause:
        raise DamagedCode(f"the compressed bytes are damaged: {cause}") from None
    found = torch.from_numpy(np.frombuffer(raw, np.uint8).copy())
    kind, found = found[:columns].long(), found[columns:]
    if len(kind) != columns or (columns and int(kind.max()) >= len(_WIDTHS)):
        raise DamagedCode(f"these are not the bytes of a table of {n} times {columns} numbers")
    unsigned = torch.zeros(columns, n, dtype=torch.int64)
    for at, bits in enumerate(_WIDTHS):
        chosen = (kind == at).nonzero().squeeze(1)
        if not bits or not len(chosen) or not n:
            continue
        table = torch.zeros(len(chosen), n, dtype=torch.int64)
        width = -(-n * min(bits, 8) // 8)
        for plane in range(-(-bits // 8)):
            packed, found = found[: len(chosen) * width], found[len(chosen) * width :]
            if len(packed) < len(chosen) * width:
                raise DamagedCode(f"a table of {n} times {columns} numbers needs more bytes")
            table |= unpack(packed.view(len(chosen), width), n, min(bits, 8)).long() << (8 * plane)
        unsigned[chosen] = table
    if len(found):
        raise DamagedCode(f"{len(found)} bytes are left over behind a table of {n} times {columns} numbers")
    return torch.where(unsigned % 2 == 1, -(unsigned + 1) // 2, unsigned // 2).T
