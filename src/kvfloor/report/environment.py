"""Define the jinja2 environment of all report pages.

In the HTML pages every field is escaped, control characters are replaced by their `\\u` codes, and an undefined field
is an error.
"""

from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from kvfloor.audit.format import bytes_text, counted, number_of_nats, percent_text, points_text, smaller_text
from kvfloor.report import chart
from kvfloor.report.decision import note_below_floor
from kvfloor.report.text import visible


@cache
def environment() -> Environment:
    """Return the jinja2 environment for this folder's templates; its filters write numbers, e.g. bytes as "64 KiB"."""
    made = Environment(
        loader=PackageLoader("kvfloor", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    made.filters |= {
        "bytes": bytes_text,
        "percent": percent_text,
        "points": points_text,
        "nats": number_of_nats,
        "whole": "{:,.0f}".format,
        "milliseconds": _milliseconds,
        "error": "{:.2g}".format,
        "short": _short,
        "below_floor": note_below_floor,
        "counted": counted,
        "lines": _lines,
    }
    made.globals |= {"smaller": smaller_text, "frame": chart}
    return made


def _shown(value: Any) -> Any:
    """Return a field's value as text, its control characters replaced by `\\u` codes; return markup unchanged.

    Markup comes from templates and filters, where it is escaped already.
    """
    return value if isinstance(value, Markup) else visible(str(value))


def _lines(text: str) -> Markup:
    """Escape a text of several lines: line breaks stay, every other control character becomes its `\\u` code."""
    return escape("\n".join(visible(line) for line in text.split("\n")))


def _milliseconds(time: float | None) -> str:
    if time is None:
        return "not measured"
    return f"{time:,.0f}" if time >= 100 else f"{time:.3g}"


def _short(value: Any) -> str:
    """Return a float as text with at most four significant digits; any other value as plain text."""
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
