"""Claim traits for methods that do not have them."""

from dataclasses import dataclass, replace

from kvfloor import Exact, Traits
from kvfloor.methods.sketches.quantized import Quantized
from mutants.base import Named


@dataclass(frozen=True)
class ClaimsHull(Named, Quantized):
    """Break a trait: claim that answers of 2-bit quantisation stay in the convex hull of the values."""

    bits: int = 2

    @property
    def traits(self) -> Traits:
        return replace(super().traits, normalised=True)


@dataclass(frozen=True)
class ClaimsLinearity(Named, Quantized):
    """Break a trait: claim that answers of 2-bit quantisation are linear in the values."""

    bits: int = 2

    @property
    def traits(self) -> Traits:
        return replace(super().traits, value_linear=True)


@dataclass(frozen=True)
class ClaimsConstantMemory(Named, Exact):
    """Break a trait: keep every token, and claim constant memory."""

    @property
    def traits(self) -> Traits:
        return replace(super().traits, constant_memory=True)
