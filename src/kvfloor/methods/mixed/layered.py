"""Define the method that has another method for each layer of a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import groupby
from typing import ClassVar, NoReturn

from kvfloor.core.budget import size_bytes
from kvfloor.core.method import Method, Traits
from kvfloor.core.spec import Spec


@dataclass(frozen=True)
class Layered(Method):
    """Give every layer of a model its own method, in the model's order.

    methods: one method per compressed layer, i.e. per layer with attention over all tokens. Each has its own budget, in
    tokens or as a share of the context.
    The text of equal methods of adjacent layers is shortened: layers(2*exact:k5v4,snapkv@25%) is for three layers.
    Raises ValueError for a budget in bytes, which is for a whole cache, and for a method that is itself for a whole
    model.
    """

    name: ClassVar[str] = "layers"
    methods: tuple[Method, ...]

    def __post_init__(self) -> None:
        if not self.methods:
            raise ValueError("layers() names one method per layer: give at least one, as in layers(3*exact:k5v4)")
        for one in self.kinds:
            if not isinstance(one, Method):
                raise TypeError(f"layers() takes kvfloor Methods, got {one!r}")
            if one.kinds != (one,):
                raise ValueError(f"{one} is for a whole model: it cannot be the method of one layer")
            if isinstance(one.budget, str) and size_bytes(one.budget) is not None:
                raise ValueError(f"{one}: bytes are for a whole cache; in layers(), give tokens or a share, as in @25%")

    @property
    def kinds(self) -> tuple[Method, ...]:
        return tuple(dict.fromkeys(self.methods))

    def of_layer(self, place: int) -> Method:
        return self.methods[place]

    def each(self, change: Callable[[Method], Method]) -> Layered:
        return Layered(tuple(map(change, self.methods)))

    @property
    def traits(self) -> Traits:
        """Return what all layers promise together."""
        every = [one.traits for one in self.kinds]
        laws = {one.reference for one in every}
        return replace(
            every[0],
            reference=laws.pop() if len(laws) == 1 else "tensor" if "tensor" in laws else "softmax",
            normalised=all(one.normalised for one in every),
            value_linear=all(one.value_linear for one in every),
            lossy_values=any(one.lossy_values for one in every),
            block_causal=any(one.block_causal for one in every),
            constant_memory=all(one.constant_memory for one in every),
            pins=all(one.pins for one in every),
            turns=all(one.turns for one in every),
            trained_for=next((one.trained_for for one in every if one.trained_for), None),
        )

    def open(self, spec: Spec) -> NoReturn:
        """Raise ValueError: a state is opened of one layer's method, which `of_layer` returns."""
        del spec
        raise ValueError(
            f"{self} has one method per layer of a model: use it with CompressedCache, or one of them alone"
        )

    def capacity(self, n: int, prompt: int | None = None, pinned: int = 0) -> int | None:
        found = [one.capacity(n, prompt, pinned) for one in self.kinds]
        return None if None in found else max(x for x in found if x is not None)

    def __str__(self) -> str:
        runs = [(text, len(list(same))) for text, same in groupby(map(str, self.methods))]
        return f"layers({','.join(text if n == 1 else f'{n}*{text}' for text, n in runs)})"
