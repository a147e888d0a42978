"""Traits claimed by methods that do not have them."""

from dataclasses import dataclass, replace

from kvfloor import Exact, Traits
from kvfloor.methods.sketches.quantized import Quantized
from mutants.base import Named


@dataclass(frozen=True)
class ClaimsHull(Named, Quantized):
    """Two bits per number, said to stay within the values given."""

    bits: int = 2

    @property
    def traits(self) -> Traits:
        return replace(super().traits, normalised=True)


@dataclass(frozen=True)
class ClaimsLinearity(Named, Quantized):
    """Two bits per number, said to be linear in the values."""

    bits: int = 2

    @property
    def traits(self) -> Traits:
        return replace(super().traits, value_linear=True)


@dataclass(frozen=True)
class ClaimsConstantMemory(Named, Exact):
    """Every token kept, in memory said not to grow."""

    @property
    def traits(self) -> Traits:
        return replace(super().traits, constant_memory=True)
