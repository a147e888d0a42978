"""Define a method with fewer bits than the optimum: it stores some of the hidden bits and guesses the others."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from kvfloor import Method, Traits
from kvfloor.game.engine.public_bits import PublicBits, PublicBitsState


@dataclass(frozen=True)
class Imperfect(Method):
    """Store the first `kept` of the n dv hidden bits (whole bytes of them), and guess a public pattern for the rest.

    Reads return `flipped` of the stored bits, evenly spaced, inverted.
    """

    name: ClassVar[str] = "imperfect"
    bits: ClassVar[int] = 1  # per value
    values: ClassVar[str] = ""
    family: str
    n: int
    key_seed: int
    kept: int
    flipped: int = 0
    traits: ClassVar[Traits] = Traits(lossy_values=True)  # type: ignore[misc]

    def open(self, spec):
        return ImperfectState(PublicBits(self.family, self.n, self.key_seed), self, spec)

    def capacity(self, n, prompt=None, pinned=0):
        return 0


class ImperfectState(PublicBitsState):
    def __init__(self, plan, method, spec):
        super().__init__(plan, spec)
        self.method = method
        self.packed = self.packed[:, : method.kept // 8].clone()

    def _levels(self):
        spec, kept, size = self.spec, 8 * self.packed.shape[1], self.method.n * self.spec.dv  # type: ignore[attr-defined]
        bits = np.tile(np.arange(size) % 2, (spec.rows, 1)).astype(np.uint8)
        bits[:, :kept] = np.unpackbits(self.packed.numpy(), axis=1)
        return bits.reshape(spec.rows, -1, spec.dv, 1)

    def _append(self, k, v, take):
        super()._append(k, v, take)
        self.packed = self.packed[:, : self.method.kept // 8].clone()  # type: ignore[attr-defined]

    def _read(self, q):
        whole = self.packed
        wrong = np.zeros((self.spec.rows, 8 * whole.shape[1]), dtype=np.uint8)
        if flipped := self.method.flipped:  # type: ignore[attr-defined]
            wrong[:, :: -(-wrong.shape[1] // flipped)] = 1
        self.packed = whole ^ torch.from_numpy(np.packbits(wrong, axis=1))
        try:
            return super()._read(q)
        finally:
            self.packed = whole
