"""Define the template environment of all report pages: every field escaped, controls shown, none undefined."""

from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from kvfloor.audit.format import bytes_text, percent_text, points_text, smaller_text
from kvfloor.report import chart
from kvfloor.report.text import visible


@cache
def environment() -> Environment:
    """Return the template environment of this folder, with the filters that write numbers."""
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
        "whole": "{:,.0f}".format,
        "milliseconds": _milliseconds,
        "error": "{:.2g}".format,
        "short": _short,
        "below_floor": chart.note_below_floor,
    }
    made.globals |= {"smaller": smaller_text}
    return made


def _shown(value: Any) -> Any:
    """Write out the control characters of text before it is escaped; leave markup of the templates as it is."""
    return value if isinstance(value, Markup) else visible(str(value))


def _milliseconds(time: float | None) -> str:
    if time is None:
        return "not measured"
    return f"{time:,.0f}" if time >= 100 else f"{time:.3g}"


def _short(value: Any) -> str:
    """Write a number with at most four significant digits; anything else as text."""
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
