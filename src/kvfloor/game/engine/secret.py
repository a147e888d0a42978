"""The private half of the game: hidden values, secret places and sampled rows, which no one is told the source of."""

import hashlib
import secrets

import torch
from torch import Tensor


class Hidden:
    """What Alice hides and which rows are asked, neither of which a method or Bob's process can foresee.

    All of it is SHAKE-256 over a domain-separated string with `seed`; by default 128 fresh bits from the operating
    system. A given seed repeats a run; the method is shown neither it nor anything that it derives from.
    """

    def __init__(self, seed: int | str | None = None) -> None:
        self.seed = secrets.token_hex(16) if seed is None else str(seed)

    def levels(self, rows: int, dv: int, bits: int) -> Tensor:
        """The hidden levels (rows, dv), int64, independent and uniform in [0, 2^bits), bits <= 32."""
        words = torch.frombuffer(bytearray(self._stream("values", 4 * rows * dv)), dtype=torch.int32)
        return (words.long() & (2**bits - 1)).view(rows, dv)

    def rows(self, n: int, count: int) -> Tensor:
        """`count` rows (count,), int64, drawn uniformly from n with replacement. Call it once the message is fixed."""
        return self._whole("rows", count) % n

    def places(self, n: int, count: int) -> Tensor:
        """`count` secret places (count,), int64, independent and uniform in [0, n): part of what Alice knows."""
        return self._whole("places", count) % n

    def subset(self, n: int, size: int) -> Tensor:
        """A uniform subset of [0, n), (size,) int64, in random order."""
        return torch.argsort(self._whole("subset", n))[:size]

    def _whole(self, purpose: str, count: int) -> Tensor:
        words = torch.frombuffer(bytearray(self._stream(purpose, 8 * count)), dtype=torch.int64)
        return words & (2**63 - 1)

    def _stream(self, purpose: str, size_bytes: int) -> bytes:
        return hashlib.shake_256(f"kvfloor/barriers/v2/hidden {purpose}/{self.seed}".encode()).digest(size_bytes)
