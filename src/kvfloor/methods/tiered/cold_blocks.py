"""Define where exact tokens are kept outside the memory of a state: blocks of tokens that never change once written.

A row is one (batch item, kv head) stream. A page is `page` consecutive tokens of a row, a block the page of one row. A
block has a number, in the order of writing; a token's index is its block's number times `page` plus its place in the
page. d and dv are the widths of a key and a value.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Self

from torch import Tensor

from kvfloor.core.spec import Spec


class ColdTierError(OSError):
    """Report that exact tokens could not be written to their cold tier, or read from it.

    The causes are a full disk, a folder that is missing or may not be written to, a truncated file, or too many open
    files. If the error came before a call changed anything, the state is as it was; otherwise it refuses every further
    call (`BrokenState`).
    """


class CorruptBlock(ColdTierError):
    """Report that exact tokens in a cold tier's file are not those that were written: their checksums differ."""


class Blocks(ABC):
    """Keep blocks of exact tokens, each written once and read often, for a state and its copies.

    Copies of a state share one object, so rows that are repeated or reordered share the blocks of their past. This is
    safe because no block is ever written again: what a copy appends are blocks of its own.

    count       number of blocks written so far, also of those that no row refers to any more
    read_bytes  bytes of keys and values read so far, by all copies
    """

    def __init__(self, spec: Spec, page: int) -> None:
        self.page, self.d, self.dv = page, spec.d, 0 if spec.tied else spec.dv
        self.dtype, self.device_type = spec.dtype, spec.device_type
        self.count = self.read_bytes = 0

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Return the bytes that the blocks take where they are kept."""

    @abstractmethod
    def anew(self) -> Self:
        """Return an object without blocks, of the same kind and at the same place."""

    def reserve(self, blocks: int) -> None:
        """Make sure that there is room for so many more blocks, where that can be told; raise ColdTierError if not."""
        del blocks

    @abstractmethod
    def write(self, k: Tensor, v: Tensor) -> Tensor:
        """Write blocks of keys k (b, page, d) and values v (b, page, dv), and return their numbers (b,), on the CPU.

        v is not looked at where the values are the keys. Raises ColdTierError if the blocks cannot be written; then
        no block was added.
        """

    @abstractmethod
    def _read(self, token: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys (e, d) and values (e, dv) of the tokens with these ascending indices (e,), on the CPU."""

    def read(self, token: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys (e, d) and values (e, dv), on the CPU, of the tokens with the indices `token` (e,), int64.

        The indices must ascend. Where the values are the keys, these are returned as both. Raises ColdTierError if the
        tokens cannot be read, and CorruptBlock if what is read is not what was written.
        """
        k, v = self._read(token)
        self.read_bytes += k.nbytes + v.nbytes
        return (k, v) if self.dv else (k, k)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return this object: copies of a state share it, as no block ever changes."""
        return self

    def __reduce__(self) -> Any:
        """Refuse to be pickled, which would share a file between processes: `State.to_bytes` holds all tokens."""
        raise TypeError("the cold tier of a state cannot be pickled: send state.to_bytes(), which holds all its tokens")
