"""Draw the floor, the cheapest good setting and the exact cache of every kv head on one logarithmic axis of bytes.

A setting is a method (KV-cache compressor) with its budget. It is good for a head if the relative error of the head's
attention output is small on everything that was measured. A floor is a lower bound on the bytes that any method needs
to answer queries over a head's keys. The exact cache keeps every token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from kvfloor.audit.format import bytes_text
from kvfloor.audit.heads import Head
from kvfloor.report.chart import Axis, power_text

WIDTH, LEFT, RIGHT, TOP, STEP = 900, 130, 880, 34, 20

WORST = 10
"""Number of heads in the ladder that is always visible; the other heads of a larger model are folded away."""


@dataclass(frozen=True)
class Rung:
    """Hold one kv head's line in the figure: its name, page coordinates, and tooltip `words`.

    y                   page coordinate of the line, downwards
    floor, best, exact  x coordinates of its floor, its cheapest good setting and the exact cache; best is None if only
                        exact is good
    compressible        True if queries can tell apart only a small share, at most a quarter, of the head's tokens
    """

    name: str
    y: float
    floor: float
    best: float | None
    exact: float
    compressible: bool
    words: str


@dataclass(frozen=True)
class Ladder:
    """Hold all that the template `ladder.html` draws for one figure: a line (rung) per kv head, and axis ticks."""

    height: float
    rungs: tuple[Rung, ...]
    ticks: tuple[tuple[float, str], ...]


def ladders(heads: Sequence[Head]) -> list[Ladder]:
    """Lay out the kv heads in two ladders: the `WORST` (10) heads with the largest floors, then all others.

    A ladder has one line per kv head. The first ladder is ordered from the largest floor down, the second by layer and
    head. Both have the same axis of bytes. A model of at most 10 heads has one ladder, in the order of `heads`.
    """
    sizes = [size for one in heads for size in (one.floor_bytes, one.best_bytes, one.exact_bytes) if size]
    across = Axis(sizes, LEFT, RIGHT, log=True, room=0.02, most_ticks=9, write=power_text)
    if len(heads) <= WORST:
        return [_ladder(heads, across)] if heads else []
    ranked = sorted(heads, key=lambda one: -one.floor_bytes)
    others = sorted(ranked[WORST:], key=lambda one: (one.layer, one.head))
    return [_ladder(ranked[:WORST], across), _ladder(others, across)]


def _ladder(heads: Sequence[Head], across: Axis) -> Ladder:
    rungs = tuple(
        Rung(
            name=f"layer {one.layer}, head {one.head}",
            y=TOP + STEP * (index + 0.5),
            floor=across.place(one.floor_bytes),
            best=None if one.best_bytes is None else across.place(one.best_bytes),
            exact=across.place(one.exact_bytes),
            compressible=one.compressible,
            words=_words(one),
        )
        for index, one in enumerate(heads)
    )
    return Ladder(TOP + STEP * len(rungs) + 8, rungs, tuple(across.ticks()))


def _words(one: Head) -> str:
    best = f"{one.best_method}, {bytes_text(one.best_bytes)}" if one.best_bytes is not None else "exact only"
    least, stopped = ("", "") if one.stopped is None else ("at least ", f" ({one.stopped})")
    return (
        f"floor {bytes_text(one.floor_bytes)} (queries asked: {bytes_text(one.asked_floor_bytes)}), best {best}, "
        f"exact {bytes_text(one.exact_bytes)}; {least}{100 * one.readable_share:.0f} % of the tokens can be read apart"
        f"{stopped}"
    )
