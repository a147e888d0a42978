"""Traits claimed by methods that do not have them."""

from dataclasses import dataclass, replace

from kvfloor import Exact, Traits
from kvfloor.methods.sketches.quantized import Quantized


@dataclass(frozen=True)
class ClaimsHull(Quantized):
    """Two bits per number, said to stay within the values given."""

    bits: int = 2

    @property
    def traits(self) -> Traits:
        return replace(super().traits, normalised=True)

    def __str__(self) -> str:
        return f"{type(self).__module__}:{type(self).__qualname__}"


@dataclass(frozen=True)
class ClaimsLinearity(Quantized):
    """Two bits per number, said to be linear in the values."""

    bits: int = 2

    @property
    def traits(self) -> Traits:
        return replace(super().traits, value_linear=True)

    def __str__(self) -> str:
        return f"{type(self).__module__}:{type(self).__qualname__}"


@dataclass(frozen=True)
class ClaimsConstantMemory(Exact):
    """Every token kept, in memory said not to grow."""

    @property
    def traits(self) -> Traits:
        return replace(super().traits, constant_memory=True)

    def __str__(self) -> str:
        return f"{type(self).__module__}:{type(self).__qualname__}"
