"""Lay out series of points on two axes: the numbers, their positions and their words, which `chart.html` draws as SVG.

Drawn as plain SVG and not by a plotting library, so that every name passes the page's one escaping path, the
figure follows the reader's light or dark mode, and a point tells its exact figures without a script.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvfloor.report.marks import Mark

WIDTH, HEIGHT = 480, 350
LEFT, RIGHT, TOP, BOTTOM = 64, 464, 78, 300
"""The plot area's edges within the figure; above TOP stand the words beside vertical lines."""

CLEAR = 16
"""Height of the space above the plot area in a figure without vertical lines."""

LETTER = 7.0
"""Mean width of a letter as a narrow page draws it, to tell on which side of a line the words fit."""


def number_text(value: float) -> str:
    """Write a number with at most four digits; a whole one below a million in full, larger ones with M or G."""
    for size, unit in ((1e9, "G"), (1e6, "M")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def power_text(size: float) -> str:
    """Write a power of two as a number of bytes, e.g. `64 KiB`."""
    k = round(math.log2(size))
    step = max(0, min(k // 10, 4))
    return f"{2 ** (k - 10 * step)} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[step]}"


class Axis:
    """Map numbers to page coordinates between `start` and `end`.

    At both ends of the numbers' span, a share `room` of the span stays free. A logarithmic axis takes its ends from the
    positive numbers and places any other number at its lower end.
    """

    def __init__(
        self,
        values: Sequence[float],
        start: float,
        end: float,
        *,
        log: bool = False,
        room: float = 0.0,
        most_ticks: int = 7,
        write: Callable[[float], str] = number_text,
    ) -> None:
        self.start, self.end, self.log, self.most_ticks, self.write = start, end, log, most_ticks, write
        shown = [math.log2(value) for value in values if value > 0] if log else [0.0, *values]
        self.low, self.high = min(shown, default=0.0), max(shown, default=1.0)
        if self.high <= self.low:
            self.high = self.low + 1.0
        beyond = room * (self.high - self.low)
        self.low, self.high = self.low - beyond, self.high + beyond

    def place(self, value: float) -> float:
        """Return the page coordinate of a number."""
        at = value if not self.log else math.log2(value) if value > 0 else self.low
        return self.start + (at - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[tuple[float, str]]:
        """List the ticks of the axis as (coordinate, label): powers of two, or round numbers."""
        if self.log:
            first, last = math.ceil(self.low), math.floor(self.high)
            stride = max(1, math.ceil((last - first + 1) / self.most_ticks))
            values = [2.0**k for k in range(first, last + 1, stride)]
        else:
            rough = (self.high - self.low) / 5
            unit = 10.0 ** math.floor(math.log10(rough))
            step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough)
            values = [step * k for k in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        return [(self.place(value), self.write(value)) for value in values]


@dataclass(frozen=True)
class Datum:
    """Hold one point of a figure, in the axes' numbers, and the words shown when the pointer is on it.

    interval  the ends of its error bar, if it has one
    shift     distance to the side at which it is drawn, so that points of almost equal x stand beside one another
    ringed    drawn with a ring around it
    """

    x: float
    y: float
    words: str
    interval: tuple[float, float] | None = None
    shift: float = 0.0
    ringed: bool = False


@dataclass(frozen=True)
class Series:
    """Hold the points of one curve, joined from left to right, and the mark (colour and shape) they are drawn with."""

    mark: Mark
    data: tuple[Datum, ...]


@dataclass(frozen=True)
class Rule:
    """Hold a vertical line of a figure at x, with lines of words beside it from the height `top` down.

    `style` is the line's class in the style sheet.
    """

    x: float
    words: tuple[str, ...]
    style: str
    top: int


@dataclass(frozen=True)
class Chart:
    """Hold everything that `chart.html` draws for one figure.

    `level` is a point whose y is drawn as a line across the figure, with its interval as a band.
    """

    title: str
    label: str
    x_name: str
    across: Axis
    up: Axis
    series: tuple[Series, ...]
    captions: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()
    level: Datum | None = None

    @property
    def top(self) -> int:
        """Return the y coordinate at which the figure is cut off above: further up if it has vertical lines."""
        return 0 if self.rules else TOP - CLEAR

    def path(self, series: Series) -> str:
        """Return the SVG path that joins the points of a series."""
        return "M" + "L".join(f"{self.x(one):.1f} {self.up.place(one.y):.1f}" for one in series.data)

    def x(self, one: Datum) -> float:
        """Return the x coordinate at which a point is drawn, its shift included."""
        return self.across.place(one.x) + one.shift

    def side(self, rule: Rule) -> str:
        """Choose the side of a vertical line on which its words fit: `start` to its right, `end` to its left."""
        width = LETTER * max(map(len, rule.words))
        return "start" if self.across.place(rule.x) + 6 + width <= WIDTH else "end"


def line_chart(
    title: str, x_name: str, caption: str, series: Sequence[Series], *, log_x: bool = False, log_y: bool = False
) -> Chart:
    """Make a figure of several curves on common axes that end at their outermost numbers."""
    data = [one for line in series for one in line.data]
    across = Axis([one.x for one in data], LEFT, RIGHT, log=log_x)
    up = Axis([one.y for one in data], BOTTOM, TOP, log=log_y)
    return Chart(title, title, x_name, across, up, tuple(series), captions=(caption,))


def line(mark: Mark, points: Sequence[tuple[float, float]]) -> Series:
    """Make a curve of points without error bars; the words of each point are the mark's name and the numbers."""
    return Series(mark, tuple(Datum(x, y, f"{mark.name}: {number_text(x)}, {number_text(y)}") for x, y in points))
