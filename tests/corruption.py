"""Damage a message in many ways, and require that its reader raises CorruptState and nothing else."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

import pytest

from kvfloor import CorruptState

Reader = Callable[[bytes], object]


def require_every_flip_is_noticed(message: bytes, read: Reader, bytes_at: Iterable[int] | None = None) -> None:
    """Flip each single bit of these bytes (None: of all), and require CorruptState."""
    for place in range(len(message)) if bytes_at is None else bytes_at:
        for bit in range(8):
            damaged = bytearray(message)
            damaged[place] ^= 1 << bit
            with pytest.raises(CorruptState):
                read(bytes(damaged))


def require_every_truncation_is_noticed(message: bytes, read: Reader, sizes: Iterable[int] | None = None) -> None:
    """Cut the message to every shorter size (or these), or append bytes to it, and require CorruptState."""
    damaged = [message[:size] for size in (range(len(message)) if sizes is None else sizes)]
    for data in (*damaged, message + b"\0", message + b"trailing", message + message):
        with pytest.raises(CorruptState):
            read(data)


def require_edits_are_noticed(message: bytes, read: Reader, draw: random.Random) -> None:
    """Make one to three random edits, and require CorruptState.

    An edit overwrites, deletes, inserts or swaps bytes, or copies a stretch of them to another place.
    """
    damaged = bytearray(message)
    for _ in range(draw.randrange(1, 4)):
        place, size = draw.randrange(len(damaged)), draw.choice((1, 1, 2, 7, 8, 32, 64))
        kind = draw.randrange(5)
        if kind == 0:
            damaged[place : place + size] = draw.randbytes(len(damaged[place : place + size]))
        elif kind == 1:
            del damaged[place : place + size]
        elif kind == 2:
            damaged[place:place] = draw.randbytes(size)
        elif kind == 3:
            other = draw.randrange(len(damaged))
            damaged[place], damaged[other] = damaged[other], damaged[place]
        else:
            start = draw.randrange(len(damaged))
            damaged[place : place + size] = damaged[start : start + size]
        if not damaged:
            break
    if bytes(damaged) == message:
        return
    with pytest.raises(CorruptState):
        read(bytes(damaged))
