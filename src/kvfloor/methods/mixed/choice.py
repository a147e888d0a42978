"""Choose one option for each of several units so that the total cost is least and the total size within a limit.

This is the multiple-choice knapsack problem. Here a unit is a layer of a model, or several adjacent ones. An option is
a method for the unit's cache: its size is in bytes, and its cost in nats is how far the model's next-token predictions
diverge if this unit alone is compressed. An option is dominated if another one of its unit is no larger and costs no
more. The lower convex hull of a unit's options is the chain of those that are best at some price of a byte.

`by_price` adds bytes where a byte saves most, along the hulls. `cheapest` finds the exact optimum: it extends choices
unit by unit, and drops those that are dominated or whose lower bound exceeds the best known cost. The bound is that of
the linear relaxation, in which a unit may be split between two options (Sinha and Zoltners 1979, The multiple-choice
knapsack problem). Costs are compared as exact whole numbers, so a result does not depend on rounding.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, pairwise
from typing import NamedTuple, TypeVar

_SCALE = 2**1074  # times any finite float is a whole number


@dataclass(frozen=True)
class CacheOption:
    """Hold one option of a unit: a method as text, its size in bytes, and its cost in nats per token."""

    method: str
    nbytes: int
    nats: float

    def __post_init__(self) -> None:
        if isinstance(self.nbytes, bool) or not isinstance(self.nbytes, int) or self.nbytes < 0:
            raise ValueError(f"option {self.method!r}: bytes are a whole number of at least 0, got {self.nbytes!r}")
        if not math.isfinite(self.nats):
            raise ValueError(f"option {self.method!r}: nats are a finite number, got {self.nats!r}")


@dataclass(frozen=True)
class OptionChoice:
    """Hold a choice: the index of each unit's option, the total bytes and nats, and a lower bound on the least nats.

    bound: the least nats of the linear relaxation; no choice within the limit of bytes costs less.
    """

    picks: tuple[int, ...]
    nbytes: int
    nats: float
    bound: float


def cheapest(units: Sequence[Sequence[CacheOption]], most_bytes: int) -> OptionChoice:
    """Return the choice of one option per unit with the least total nats, among those of at most `most_bytes` bytes.

    Among choices of equal nats it is one of the fewest bytes. Raises ValueError if there is no unit, if a unit has no
    option, and if even the smallest options exceed the limit: the error names the bytes that they need.
    """
    fronts, relaxed = _prepared(units, most_bytes)
    best = _by_price(relaxed, most_bytes)
    labels = [_Label(0, 0, None, -1)]
    for i, front in enumerate(fronts):
        rest = relaxed[i + 1]
        grown = [
            _Label(label.nbytes + point.nbytes, label.cost + point.cost, label, point.index)
            for label in labels
            for point in front
            if label.nbytes + point.nbytes + rest.least_bytes <= most_bytes
        ]
        kept = _undominated(grown)
        labels = [x for x in kept if x.cost + rest.bound(most_bytes - x.nbytes) <= best.cost]
    return _choice(units, _picks(labels[-1]), relaxed[0].bound(most_bytes))


def smallest(units: Sequence[Sequence[CacheOption]], most_nats: float) -> OptionChoice:
    """Return the choice of one option per unit with the fewest total bytes, among those of at most `most_nats` nats.

    Of several such choices it is one of the least nats. Raises ValueError if there is no unit, if a unit has no option,
    and if even the options of least cost exceed the limit: the error names the nats that they cost.
    """
    bytes_of = [[one.nbytes for one in unit] for unit in units]
    enough = sum(max(sizes, default=0) for sizes in bytes_of)
    best = cheapest(units, enough)
    if best.nats > most_nats:
        raise ValueError(f"{most_nats:g} nats are too few: the best of the measured options cost {best.nats:.3g} nats")
    too_few = sum(min(sizes) for sizes in bytes_of) - 1
    while best.nbytes - too_few > 1:
        middle = (best.nbytes + too_few) // 2
        tried = cheapest(units, middle)
        if tried.nats <= most_nats:
            best = tried
        else:
            too_few = middle
    return best


def by_price(units: Sequence[Sequence[CacheOption]], most_bytes: int) -> OptionChoice:
    """Return the choice that buys bytes where a byte saves most nats, along each unit's lower convex hull.

    It starts from each unit's smallest option, and takes the steps of all hulls in the order of nats saved per byte. A
    step that no longer fits ends its unit's steps. So all but the last steps have one price of a byte, and the nats
    exceed the optimum's by less than one step. Raises ValueError as `cheapest` does.
    """
    _, relaxed = _prepared(units, most_bytes)
    return _choice(units, _picks(_by_price(relaxed, most_bytes)), relaxed[0].bound(most_bytes))


class _Point(NamedTuple):
    """Hold an option by its index in its unit; cost is in units of 2**-1074 nats."""

    nbytes: int
    cost: int
    index: int


class _Label(NamedTuple):
    """Hold a choice for the first units: its bytes and cost, the choice for all units but the last, and its index."""

    nbytes: int
    cost: int
    before: _Label | None
    index: int


Sized = TypeVar("Sized", _Point, _Label)


class _Step(NamedTuple):
    """Hold a step of a unit's hull to its next larger option: the bytes it adds, and the cost it saves."""

    unit: int
    nbytes: int
    saved: int
    index: int


class _Relaxed:
    """Solve the linear relaxation for some of the units, at any number of bytes.

    hulls: the lower convex hull of each unit by the unit's number, smallest option first.
    """

    def __init__(self, hulls: dict[int, list[_Point]]) -> None:
        self.smallest = {unit: hull[0] for unit, hull in hulls.items()}
        self.least_bytes = sum(point.nbytes for point in self.smallest.values())
        self._most_cost = sum(point.cost for point in self.smallest.values())
        steps = [
            _Step(unit, after.nbytes - before.nbytes, before.cost - after.cost, after.index)
            for unit, hull in hulls.items()
            for before, after in pairwise(hull)
        ]
        self.steps = sorted(steps, key=lambda step: (-Fraction(step.saved, step.nbytes), step.unit))
        self._ends = list(accumulate((step.nbytes for step in self.steps), initial=0))
        self._saved = list(accumulate((step.saved for step in self.steps), initial=0))

    def bound(self, nbytes: int) -> int:
        """Return a lower bound on the cost of these units in `nbytes` bytes, at least their `least_bytes`."""
        spare = nbytes - self.least_bytes
        full = bisect_right(self._ends, spare) - 1
        saved = self._saved[full]
        if full < len(self.steps):
            step = self.steps[full]
            saved += -(-step.saved * (spare - self._ends[full]) // step.nbytes)
        return self._most_cost - saved


def _prepared(units: Sequence[Sequence[CacheOption]], most_bytes: int) -> tuple[list[list[_Point]], list[_Relaxed]]:
    """Return each unit's undominated options, and the relaxations of the units from number i on, for i = 0, 1, ..."""
    if not units or not all(units):
        raise ValueError("give at least one unit, and at least one option for each")
    fronts = [_front(unit) for unit in units]
    least = sum(front[0].nbytes for front in fronts)
    if least > most_bytes:
        raise ValueError(
            f"{most_bytes:,} bytes are too few: the smallest of the measured options need {least:,} bytes together"
        )
    hulls = [_hull(front) for front in fronts]
    return fronts, [_Relaxed(dict(list(enumerate(hulls))[i:])) for i in range(len(hulls) + 1)]


def _front(unit: Sequence[CacheOption]) -> list[_Point]:
    points = [_Point(one.nbytes, int(Fraction(one.nats) * _SCALE), index) for index, one in enumerate(unit)]
    return _undominated(points)


def _undominated(given: list[Sized]) -> list[Sized]:
    """Return those that cost less than every other one of no more bytes, the fewest bytes first."""
    kept: list[Sized] = []
    for one in sorted(given, key=lambda x: (x.nbytes, x.cost)):
        if not kept or one.cost < kept[-1].cost:
            kept.append(one)
    return kept


def _hull(front: Sequence[_Point]) -> list[_Point]:
    """Return the lower convex hull of undominated options, the fewest bytes first: each step saves less per byte."""
    hull: list[_Point] = []
    for point in front:
        while len(hull) > 1 and _is_above(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _is_above(left: _Point, middle: _Point, right: _Point) -> bool:
    """Return True if `middle` lies on or above the line from `left` to `right`."""
    return (middle.cost - left.cost) * (right.nbytes - left.nbytes) >= (right.cost - left.cost) * (
        middle.nbytes - left.nbytes
    )


def _by_price(relaxed: Sequence[_Relaxed], most_bytes: int) -> _Label:
    whole = relaxed[0]
    picked = {unit: point.index for unit, point in whole.smallest.items()}
    spare, over = most_bytes - whole.least_bytes, set[int]()
    cost = whole.bound(whole.least_bytes)
    for step in whole.steps:
        if step.unit in over or step.nbytes > spare:
            over.add(step.unit)
            continue
        spare -= step.nbytes
        cost -= step.saved
        picked[step.unit] = step.index
    label: _Label | None = None
    for unit in sorted(picked):
        label = _Label(most_bytes - spare, cost, label, picked[unit])
    assert label is not None
    return label


def _picks(label: _Label | None) -> tuple[int, ...]:
    """Return the indices of the units' options, from a choice for all units."""
    found: list[int] = []
    while label is not None and label.index >= 0:
        found.append(label.index)
        label = label.before
    return tuple(reversed(found))


def _choice(units: Sequence[Sequence[CacheOption]], picks: tuple[int, ...], bound: int) -> OptionChoice:
    chosen = [unit[index] for unit, index in zip(units, picks, strict=True)]
    return OptionChoice(
        picks,
        sum(one.nbytes for one in chosen),
        math.fsum(one.nats for one in chosen),
        float(Fraction(bound, _SCALE)),
    )
