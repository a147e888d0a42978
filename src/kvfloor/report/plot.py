"""Curves of one quantity against another, laid out: coordinates and words, which `plot.html` draws as SVG."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 480, 320
LEFT, RIGHT, TOP, BOTTOM = 64, 464, 16, 262
"""The plot area's edges within the figure."""


@dataclass(frozen=True)
class Series:
    """Points (x, y) of one curve, from the left; `colour` is one of the page's s0..s7, a dashed curve is a bound."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: str
    dashed: bool = False
    marked: bool = True


@dataclass(frozen=True)
class Spot:
    """Hold a point on the page, and the words shown on pointing at it."""

    x: float
    y: float
    words: str


@dataclass(frozen=True)
class Drawn:
    """Hold a series in page coordinates; `path` joins its spots."""

    series: Series
    spots: tuple[Spot, ...]

    @property
    def path(self) -> str:
        return "M" + "L".join(f"{spot.x:.1f} {spot.y:.1f}" for spot in self.spots)


@dataclass(frozen=True)
class Plot:
    """Everything `plot.html` draws."""

    title: str
    x_name: str
    y_name: str
    curves: tuple[Drawn, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]


def plot(
    title: str, x_name: str, y_name: str, series: Sequence[Series], *, log_x: bool = False, log_y: bool = False
) -> Plot:
    """Lay out the series on common axes; a logarithmic axis shows powers of two and needs positive numbers."""
    xs = [x for one in series for x, _ in one.points]
    ys = [y for one in series for _, y in one.points]
    across, up = _Axis(xs, LEFT, RIGHT, log_x), _Axis(ys, BOTTOM, TOP, log_y)
    curves = tuple(
        Drawn(
            one,
            tuple(Spot(across.place(x), up.place(y), f"{one.name}: {_number(x)}, {_number(y)}") for x, y in one.points),
        )
        for one in series
    )
    return Plot(title, x_name, y_name, curves, across.ticks(), up.ticks())


class _Axis:
    """Numbers to page coordinates between `start` and `end`."""

    def __init__(self, values: Sequence[float], start: float, end: float, log: bool) -> None:
        self.start, self.end, self.log = start, end, log
        shown = [math.log2(value) for value in values] if log else list(values)
        self.low, self.high = min(shown), max(shown)
        if not log:
            self.low = min(0.0, self.low)
        if self.high <= self.low:
            self.high = self.low + 1.0

    def place(self, value: float) -> float:
        at = math.log2(value) if self.log else value
        return self.start + (at - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> tuple[tuple[float, str], ...]:
        """At most seven: powers of two, or round numbers."""
        if self.log:
            first, last = math.ceil(self.low), math.floor(self.high)
            stride = max(1, math.ceil((last - first + 1) / 7))
            values = [2.0**k for k in range(first, last + 1, stride)]
        else:
            rough = (self.high - self.low) / 5
            unit = 10.0 ** math.floor(math.log10(rough))
            step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough)
            values = [step * k for k in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        return tuple((self.place(value), _number(value)) for value in values)


def _number(value: float) -> str:
    if abs(value) >= 1e4:
        for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
            if abs(value) >= size:
                return f"{value / size:.3g}{unit}"
    return f"{value:.4g}"
