"""Draw the floor, cheapest good setting and exact cache of every head on one logarithmic axis of bytes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kvfloor.audit.format import bytes_text
from kvfloor.audit.heads import Head

WIDTH, LEFT, RIGHT, TOP, STEP = 900, 130, 880, 34, 20


@dataclass(frozen=True)
class Rung:
    """Hold one head's places along the axis and its tooltip; no `best` where only exact serves."""

    name: str
    y: float
    floor: float
    best: float | None
    exact: float
    compressible: bool
    words: str


@dataclass(frozen=True)
class Ladder:
    """Hold everything that `ladder.html` draws."""

    height: float
    rungs: tuple[Rung, ...]
    ticks: tuple[tuple[float, str], ...]


def ladder(heads: Sequence[Head]) -> Ladder:
    """Lay the heads out from the first layer down."""
    sizes = [size for one in heads for size in (one.floor_bytes, one.best_bytes, one.exact_bytes) if size]
    low, high = math.floor(math.log2(min(sizes))), math.log2(max(sizes)) + 0.2

    def place(size: int) -> float:
        return LEFT + (math.log2(max(size, 2**low)) - low) / (high - low) * (RIGHT - LEFT)

    rungs = tuple(
        Rung(
            name=f"layer {one.layer}, head {one.head}",
            y=TOP + STEP * (index + 0.5),
            floor=place(one.floor_bytes),
            best=None if one.best_bytes is None else place(one.best_bytes),
            exact=place(one.exact_bytes),
            compressible=one.compressible,
            words=_words(one),
        )
        for index, one in enumerate(heads)
    )
    stride = max(1, math.ceil((math.floor(high) - low + 1) / 9))
    ticks = tuple((place(2**k), bytes_text(2**k)) for k in range(low, math.floor(high) + 1, stride))
    return Ladder(TOP + STEP * len(rungs) + 8, rungs, ticks)


def _words(one: Head) -> str:
    best = f"{one.best_method}, {bytes_text(one.best_bytes)}" if one.best_bytes is not None else "exact only"
    return (
        f"floor {bytes_text(one.floor_bytes)} (queries asked: {bytes_text(one.asked_floor_bytes)}), best {best}, "
        f"exact {bytes_text(one.exact_bytes)}; {100 * one.readable_share:.0f} % of the tokens can be read apart"
    )
