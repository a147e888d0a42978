"""Quantise keys and values to a few bits per number, as a baseline for eviction (KIVI)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from kvfloor.core.exact import Exact, ExactState
from kvfloor.core.method import Method, Parts, Traits
from kvfloor.core.spec import Spec
from kvfloor.methods.stores.kivi import Kivi


@dataclass(frozen=True)
class Quantized(Method):
    """Quantise keys per channel over groups of `group` tokens, and values per token.

    This is the method `exact` with the store `Kivi`: `quant(bits=4)` is another name of `exact:kivi4`. Quantisation is
    asymmetric and rounds to nearest, after KIVI (Liu et al. 2024, arXiv 2402.02750): a code stands for the number
    offset + step * code. Keys have one offset and step per channel of a group, values one per token; both are kept in
    the cache's own dtype. The newest tokens, up to group - 1 of them, stay unquantised. No token is evicted, so memory
    grows with the stream.
    bits   bits per code: 8, 4 or 2
    group  tokens that are quantised together
    """

    name: ClassVar[str] = "quant"
    paper: ClassVar[str] = Kivi.paper
    bits: int = 8
    group: int = 32

    def __post_init__(self) -> None:
        try:
            Kivi(self.bits, self.group)
        except (TypeError, ValueError) as cause:
            raise type(cause)(f"{self.name}: {cause}") from None

    @cached_property
    def _exact(self) -> Exact:
        return Exact(store=Kivi(self.bits, self.group))

    @property
    def traits(self) -> Traits:
        return self._exact.traits

    @property
    def parts(self) -> Parts:
        return self._exact.parts

    def open(self, spec: Spec) -> ExactState:
        return ExactState(self, spec)

    def capacity(self, n: int, prompt: int | None = None, pinned: int = 0) -> int | None:
        return self._exact.capacity(n, prompt, pinned)
