"""Assign one colour and marker shape to each method, the same in every figure.

A marker is the shape of a curve's points. A mark is the look of a curve: its colour and its marker. The first 8 marks
differ in both, so they are distinct without colour; the first 64 differ in at least one of the two.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kvfloor.audit.nats import TextRow
from kvfloor.audit.rows import Row

COLOURS = 8
"""Series colours that the style sheet defines, as classes `s0`..`s7`."""


def _polygon(corners: int, radius: float, turn: float = 0.0) -> str:
    angles = [turn - math.pi / 2 + 2 * math.pi * corner / corners for corner in range(corners)]
    points = (f"{radius * math.cos(angle):.2f} {radius * math.sin(angle):.2f}" for angle in angles)
    return "M" + "L".join(points) + "Z"


_CROSS = "M-5-2H-2V-5H2V-2H5V2H2V5H-2V2H-5Z"
SHAPES = (
    "M-4.6 0a4.6 4.6 0 1 0 9.2 0a4.6 4.6 0 1 0-9.2 0Z",
    "M-4.2-4.2H4.2V4.2H-4.2Z",
    _polygon(3, 5.8),
    _polygon(4, 5.8),
    _polygon(3, 5.8, turn=math.pi),
    _CROSS,
    _polygon(5, 5.4),
    "M0-5.8L1.7-1.7L5.8 0L1.7 1.7L0 5.8L-1.7 1.7L-5.8 0L-1.7-1.7Z",
)
"""SVG paths around the origin, about 10 units wide."""


@dataclass(frozen=True)
class Mark:
    """Define the look of one curve: its colour and its marker.

    colour    class of the style sheet that sets one of eight colours, "s0" to "s7"
    shape     an SVG path, or "" for no marker
    baseline  True if the method is one that every audit compares with, drawn hollow and dashed
    """

    name: str
    colour: str
    shape: str
    baseline: bool


def marks(rows: Sequence[Row | TextRow]) -> dict[str, Mark]:
    """Map each method, with its arguments but without its budget, to its colour and marker (a `Mark`).

    Methods are in the rows' order, with baselines (the methods that every audit compares with) last. The marks of the
    first 64 methods differ; those of the first 8 differ in both colour and marker. The exact cache is left out: its
    mark is the same in every figure.
    """
    methods: dict[str, bool] = {}
    for row in rows:
        if row.method != "exact":
            methods.setdefault(row.configuration, row.baseline)
    ordered = sorted(methods.items(), key=lambda item: item[1])
    return {method: nth_mark(index, method, baseline) for index, (method, baseline) in enumerate(ordered)}


def nth_mark(index: int, name: str, baseline: bool = False) -> Mark:
    """Return mark number `index` (from 0), a colour and a marker.

    name      name of the curve, for legend and tooltips
    baseline  True for a mark that is drawn hollow and dashed
    """
    shape = SHAPES[(index + index // COLOURS) % len(SHAPES)]
    return Mark(name, f"s{index % COLOURS}", shape, baseline)


def bound_mark(index: int, name: str) -> Mark:
    """Return the mark of a curve called `name` that shows a theorem's bound instead of a method's measurements.

    It is a dashed line without markers, in colour number `index` (modulo 8).
    """
    return Mark(name, f"s{index % COLOURS}", "", baseline=True)
