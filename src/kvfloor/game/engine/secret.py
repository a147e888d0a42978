"""Draw the game's secrets (hidden values, secret positions, sampled rows) from a seed that the method never receives.

In the game, Alice hides values in a method's state (the memory of a KV cache), and Bob decodes the values from the
message, the state's bytes. A hidden row is the dv values that one query reads; a level is a hidden value, a whole
number of `bits` bits.
"""

import hashlib
import secrets

import torch
from torch import Tensor


class Hidden:
    """Draw the values that Alice hides and the rows to query, so that neither a method nor Bob can foresee them.

    seed  None: 128 fresh bits from the operating system; a given seed repeats a run
    Every draw is SHAKE-256 over a text that contains the draw's purpose and `seed`. So draws for different purposes,
    i.e. of different methods of this class, are unrelated, and a second call with the same arguments returns the same
    draw again. The method receives neither the seed nor any data from which the seed could be computed.
    """

    def __init__(self, seed: int | str | None = None) -> None:
        self.seed = secrets.token_hex(16) if seed is None else str(seed)

    def levels(self, rows: int, dv: int, bits: int) -> Tensor:
        """Draw the hidden levels (rows, dv), int64, independent and uniform in [0, 2^bits), bits <= 32."""
        words = torch.frombuffer(bytearray(self._stream("values", 4 * rows * dv)), dtype=torch.int32)
        return (words.long() & (2**bits - 1)).view(rows, dv)

    def choices(self, rows: int, dv: int, count: int) -> Tensor:
        """Draw hidden levels (rows, dv), int64, independent and, but for a share of 2^-40, uniform in [0, count)."""
        return (self._whole("values", rows * dv) % count).view(rows, dv)

    def points(self, rows: int, dv: int, attempt: int = 0) -> Tensor:
        """Draw points (rows, dv), float64, independent and uniform in the unit ball of dv dimensions.

        Each `attempt` is another draw.
        """
        uniform = (self._whole(f"points {attempt}", rows * (dv + 1)).double() + 0.5) / 2.0**63
        uniform = uniform.view(rows, dv + 1)
        normal = torch.special.ndtri(uniform[:, :dv])
        return normal / normal.norm(dim=1, keepdim=True) * uniform[:, dv:] ** (1.0 / dv)

    def signs(self, rows: int, dv: int, attempt: int = 0) -> Tensor:
        """Draw independent fair signs ±1 (rows, dv), float64. Each `attempt` is another draw."""
        return 2.0 * (self._whole(f"signs {attempt}", rows * dv) & 1).double().view(rows, dv) - 1.0

    def rows(self, n: int, count: int) -> Tensor:
        """Draw the indices of `count` hidden rows to query, (count,) int64, uniformly from [0, n) with replacement.

        Call it after the message is fixed, so that the message cannot depend on the draw.
        """
        return self._whole("rows", count) % n

    def places(self, n: int, count: int) -> Tensor:
        """Draw `count` token positions that only Alice knows: (count,) int64, independent and uniform in [0, n)."""
        return self._whole("places", count) % n

    def subset(self, n: int, size: int) -> Tensor:
        """Draw a uniform subset of [0, n) with `size` elements: (size,) int64, in random order."""
        return torch.argsort(self._whole("subset", n))[:size]

    def _whole(self, purpose: str, count: int) -> Tensor:
        words = torch.frombuffer(bytearray(self._stream(purpose, 8 * count)), dtype=torch.int64)
        return words & (2**63 - 1)

    def _stream(self, purpose: str, size_bytes: int) -> bytes:
        return hashlib.shake_256(f"kvfloor/barriers/v2/hidden {purpose}/{self.seed}".encode()).digest(size_bytes)
