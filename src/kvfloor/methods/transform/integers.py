"""Compress tables of whole numbers, most of them near 0, with zstandard: `pip install "kvfloor[coded]"`.

The reader of a table knows about how large each number is: the sum of a whole number of its row and one of its column
is its bucket, and the numbers of a bucket are alike in size. The table is stored bucket by bucket, each in blocks of
its own, so that the compressor's codes fit. A number i becomes the unsigned 2i or -2i - 1 (zigzag), which is small
where i is near 0. The numbers of a bucket are packed in as few bits as the largest one needs: 0, 2, 4, 8, 16, 24 or 32.
Several numbers of few bits share a byte; so numbers that are nearly always 0 can take less than the one bit that a
Huffman code has for a byte.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvfloor.methods.stores.packing import pack, unpack

LEVEL = 1  # level 19 takes 2 % fewer bytes and ten times as long
_LEAST_BLOCK = 1024  # bytes of a block, before a new one is begun for the next bucket
_WIDTHS = (0, 2, 4, 8, 16, 24, 32)  # bits per number of a bucket
_MOST = 2**30


class DamagedCode(ValueError):
    """Report bytes that `compressed` did not make for a table of these rows and columns."""


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


def compressed(table: Tensor, rows: Tensor, columns: Tensor) -> bytes:
    """Return a table of whole numbers (n, c), int64, as bytes; the bucket of entry (i, j) is rows[i] + columns[j].

    Raises ValueError for numbers beyond 2^30, and if zstandard is not installed.
    """
    if table.numel() and int(table.abs().max()) > _MOST:
        raise ValueError(f"numbers up to {int(table.abs().max())} cannot be coded: take a larger error")
    unsigned = ((table << 1) ^ (table >> 63)).T.flatten()
    order, counts = _buckets(rows, columns)
    parts = []
    for part in unsigned[order].split(counts):
        kind = next(at for at, bits in enumerate(_WIDTHS) if int(part.max()) < 1 << bits)
        parts.append(bytes([kind]))
        for plane in range(-(-_WIDTHS[kind] // 8)):
            packed = pack((part >> (8 * plane) & 0xFF).to(torch.uint8), min(_WIDTHS[kind], 8))
            parts.append(packed.numpy().tobytes())
    return _in_blocks(parts)


def _in_blocks(parts: list[bytes]) -> bytes:
    """Compress the parts one after the other; a new block, with new codes, begins at a part if it pays."""
    module = zstandard()
    stream = module.ZstdCompressor(level=LEVEL).compressobj(size=sum(map(len, parts)))
    found, pending = [], 0
    for part in parts:
        if pending >= _LEAST_BLOCK or (pending and len(part) >= _LEAST_BLOCK):
            found.append(stream.flush(module.COMPRESSOBJ_FLUSH_BLOCK))
            pending = 0
        found.append(stream.compress(part))
        pending += len(part)
    return b"".join([*found, stream.flush()])


def restored(data: bytes, rows: Tensor, columns: Tensor) -> Tensor:
    """Return the table (n, c), int64, that `compressed` made into `data` with the same `rows` and `columns`.

    Raises DamagedCode if the bytes are not those of a table of this shape; memory is bounded by the shape.
    """
    module, (n, c) = zstandard(), (len(rows), len(columns))
    order, counts = _buckets(rows, columns)
    try:
        size = module.frame_content_size(data)
        if not 0 <= size <= sum(1 + 4 * count for count in counts):
            raise DamagedCode(f"{size} bytes cannot be a table of {n} times {c} numbers")
        raw = module.ZstdDecompressor().decompress(data, max_output_size=size)
    except module.ZstdError as cause:
        raise DamagedCode(f"the compressed bytes are damaged: {cause}") from None
    found, parts = torch.from_numpy(np.frombuffer(raw, np.uint8).copy()), []
    for count in counts:
        kind = int(found[0]) if len(found) else len(_WIDTHS)
        if kind >= len(_WIDTHS):
            raise DamagedCode(f"these are not the bytes of a table of {n} times {c} numbers")
        found, part = found[1:], torch.zeros(count, dtype=torch.int64)
        size = -(-count * min(_WIDTHS[kind], 8) // 8)
        for plane in range(-(-_WIDTHS[kind] // 8)):
            if len(found) < size:
                raise DamagedCode(f"a table of {n} times {c} numbers needs more bytes")
            part |= unpack(found[:size], count, min(_WIDTHS[kind], 8)).long() << (8 * plane)
            found = found[size:]
        parts.append(part)
    if len(found):
        raise DamagedCode(f"{len(found)} bytes are left over behind a table of {n} times {c} numbers")
    unsigned = torch.zeros(n * c, dtype=torch.int64)
    if parts:
        unsigned[order] = torch.cat(parts)
    return ((unsigned >> 1) ^ -(unsigned & 1)).view(c, n).T


def _buckets(rows: Tensor, columns: Tensor) -> tuple[Tensor, list[int]]:
    """Return the indices of a table's entries, column after column, sorted by bucket, and the size of each bucket."""
    bucket = (columns.unsqueeze(1) + rows).flatten().clamp(-(2**15), 2**15 - 1).to(torch.int16)
    order = torch.from_numpy(np.argsort(bucket.numpy(), kind="stable"))  # a radix sort, five times as fast as torch's
    return order, torch.unique_consecutive(bucket[order], return_counts=True)[1].tolist()
