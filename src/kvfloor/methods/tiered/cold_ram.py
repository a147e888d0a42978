"""Keep exact tokens in the host's memory, pinned if they are fetched to a GPU."""

from __future__ import annotations

from threading import Lock
from typing import Self

import torch
from torch import Tensor

from kvfloor.core.arena import grown
from kvfloor.core.spec import Spec
from kvfloor.methods.tiered.cold_blocks import Blocks


class RamBlocks(Blocks):
    """Keep blocks in two tensors on the CPU, which grow by a quarter.

    k, v  (blocks, page, d) and (blocks, page, dv); page-locked if the state is on a GPU, so that copies are fast
    """

    def __init__(self, spec: Spec, page: int) -> None:
        super().__init__(spec, page)
        self._spec, self._lock = spec, Lock()
        self.k, self.v = self._room(0, self.d), self._room(0, self.dv)

    def _room(self, blocks: int, width: int) -> Tensor:
        pinned = self.device_type == "cuda" and blocks * width > 0
        return torch.zeros(blocks, self.page, width, dtype=self.dtype, pin_memory=pinned)

    @property
    def nbytes(self) -> int:
        return self.k.untyped_storage().nbytes() + self.v.untyped_storage().nbytes()

    def anew(self) -> Self:
        return type(self)(self._spec, self.page)

    def write(self, k: Tensor, v: Tensor) -> Tensor:
        with self._lock:  # a copy of the state, in another thread, may write too
            stop = self.count + len(k)
            if stop > len(self.k):
                room = max(stop, grown(len(self.k)))
                moved = self._room(room, self.d), self._room(room, self.dv)
                for old, new in zip((self.k, self.v), moved, strict=True):
                    new[: self.count] = old[: self.count]
                self.k, self.v = moved
            self.k[self.count : stop] = k
            if self.dv:
                self.v[self.count : stop] = v
            number = torch.arange(self.count, stop)
            self.count = stop
        return number

    def _read(self, token: Tensor) -> tuple[Tensor, Tensor]:
        with self._lock:
            k, v = self.k, self.v
        return k.flatten(0, 1)[token], v.flatten(0, 1)[token]
