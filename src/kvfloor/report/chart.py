"""Lay out figures, i.e. curves of points on two axes with labels and tooltips, for the template `chart.html`.

The template draws plain SVG, without a plotting library. So every name is escaped as all text of the page is, a figure
follows the reader's light or dark mode, and a point's tooltip shows its exact numbers without a script. Page
coordinates are those of the SVG: x to the right, y downwards.
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
    """Write a number as text, such as `1.23M` or `4.5G`.

    Below 1000 the text has four significant digits; from 1000 to a million it is a whole number; above, it has three
    significant digits and a unit.
    """
    for size, unit in ((1e9, "G"), (1e6, "M")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def power_text(size: float) -> str:
    """Write a size of 2^k bytes with its binary unit, e.g. `64 KiB` for 65536."""
    k = round(math.log2(size))
    step = max(0, min(k // 10, 4))
    return f"{2 ** (k - 10 * step)} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[step]}"


class Axis:
    """Map numbers to page coordinates between `start` and `end`.

    values      numbers that the axis must span. A linear axis also spans 0. A logarithmic axis spans the positive ones
                alone, and places any other number at its lower end
    start, end  page coordinates of the axis's two ends; the margins lie between them
    log         True for a logarithmic axis
    room        margin at both ends, as a share of the span
    base        a logarithmic axis has ticks at powers of this number, 2 or 10
    most_ticks  largest number of ticks of a logarithmic axis
    write       returns the label of a tick's number
    """

    def __init__(
        self,
        values: Sequence[float],
        start: float,
        end: float,
        *,
        log: bool = False,
        room: float = 0.0,
        base: float = 2.0,
        most_ticks: int = 7,
        write: Callable[[float], str] = number_text,
    ) -> None:
        self.start, self.end, self.log, self.most_ticks, self.write = start, end, log, most_ticks, write
        self.base = base
        shown = [math.log(value, base) for value in values if value > 0] if log else [0.0, *values]
        self.low, self.high = min(shown, default=0.0), max(shown, default=1.0)
        if self.high <= self.low:
            self.high = self.low + 1.0
        beyond = room * (self.high - self.low)
        self.low, self.high = self.low - beyond, self.high + beyond

    def place(self, value: float) -> float:
        """Return the page coordinate at which the number `value` stands on the axis."""
        at = value if not self.log else math.log(value, self.base) if value > 0 else self.low
        return self.start + (at - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[tuple[float, str]]:
        """List the ticks as (page coordinate, label): powers of the base on a logarithmic axis, else round numbers."""
        if self.log:
            first, last = math.ceil(self.low), math.floor(self.high)
            stride = max(1, math.ceil((last - first + 1) / self.most_ticks))
            values = [self.base**k for k in range(first, last + 1, stride)]
        else:
            rough = (self.high - self.low) / 5
            unit = 10.0 ** math.floor(math.log10(rough))
            step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough)
            values = [step * k for k in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        return [(self.place(value), self.write(value)) for value in values]


@dataclass(frozen=True)
class Datum:
    """Hold one point of a figure: the numbers x and y, and its tooltip `words`.

    interval  the ends of the point's error bar on the y axis; None without one
    shift     sideways distance, in page coordinates, that keeps points of almost equal x from covering one another
    ringed    True if the point is drawn with a ring around it
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
    """Hold a vertical line of a figure, with a label beside it.

    x      the number on the horizontal axis at which the line stands
    words  the label's lines of text
    style  the vertical line's class in the style sheet
    top    page coordinate y of the label's first line
    """

    x: float
    words: tuple[str, ...]
    style: str
    top: int


@dataclass(frozen=True)
class Chart:
    """Hold everything that `chart.html` draws for one figure.

    title       text above the figure
    label       text in place of the figure, for screen readers
    x_name      label of the horizontal axis
    across, up  horizontal and vertical axis
    series      the curves
    captions    lines of text below the figure
    rules       labelled vertical lines, such as that of a lower bound
    level       a point whose y is drawn as a line across the figure, with its interval as a band
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
        """Return the page coordinate y of the figure's upper edge.

        A figure with vertical lines begins higher, to have room for their labels.
        """
        return 0 if self.rules else TOP - CLEAR

    def path(self, series: Series) -> str:
        """Return the SVG path that joins the points of a series."""
        return "M" + "L".join(f"{self.x(one):.1f} {self.up.place(one.y):.1f}" for one in series.data)

    def x(self, one: Datum) -> float:
        """Return a point's horizontal coordinate on the page: its x on the axis, plus its sideways shift."""
        return self.across.place(one.x) + one.shift

    def side(self, rule: Rule) -> str:
        """Return the SVG attribute `text-anchor` for the label of the vertical line `rule`: "start" or "end".

        It is "start" if the label fits right of the line, else "end", which puts the label left of it.
        """
        width = LETTER * max(map(len, rule.words))
        return "start" if self.across.place(rule.x) + 6 + width <= WIDTH else "end"


def line_chart(
    title: str, x_name: str, caption: str, series: Sequence[Series], *, log_x: bool = False, log_y: bool = False
) -> Chart:
    """Make a figure of several curves on common axes that span all points; a linear axis also spans 0.

    title         text above the figure, which screen readers read too
    x_name        label of the horizontal axis; caption: the text below the figure
    series        the curves
    log_x, log_y  True for a logarithmic axis
    """
    data = [one for line in series for one in line.data]
    across = Axis([one.x for one in data], LEFT, RIGHT, log=log_x)
    up = Axis([one.y for one in data], BOTTOM, TOP, log=log_y)
    return Chart(title, title, x_name, across, up, tuple(series), captions=(caption,))


def line(mark: Mark, points: Sequence[tuple[float, float]]) -> Series:
    """Make a curve of (x, y) points without error bars, drawn with the colour and marker `mark`.

    A point's tooltip gives the mark's name and the two numbers.
    """
    return Series(mark, tuple(Datum(x, y, f"{mark.name}: {number_text(x)}, {number_text(y)}") for x, y in points))
