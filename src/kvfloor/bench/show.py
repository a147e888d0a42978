"""Write rows of a benchmark as lines of text."""

from __future__ import annotations

from kvfloor.bench.records import BenchRow, Interval
from kvfloor.bench.request import PARTS, Found


def heading(part: str) -> str:
    """Return the line above a part's rows."""
    return f"{part}: {PARTS[part]}"


def shown(found: Found) -> str:
    """Return a row, a profile's operator or a note as one line."""
    if isinstance(found, str):
        return f"  left out: {found}"
    if not isinstance(found, BenchRow):
        return f"    {found.share:6.1%} {found.operator} ({found.calls:.0f} calls a token), {found.name}"
    where = f"{found.model}, {found.context:,}, {found.dtype}" if found.context else found.model
    figure = judged_text(found)
    return (
        f"  {where:<44} {found.name:<38} {milliseconds(found.ms):>9} ms  "
        f"{ratio_text(found):<52}{f'  {found.target}: {figure}' if found.target else ''}"
        f"{'  crowded' if found.crowded else ''}"
    ).rstrip()


def milliseconds(value: float) -> str:
    """Return milliseconds with three significant digits at least."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 100 else f"{value:.3g}"


def ratio_text(row: BenchRow) -> str:
    """Return the ratio with its interval and its baseline; "" without one."""
    if row.ratio is None:
        return ""
    return f"{row.ratio:.2f} {interval_text(row.ratio_interval)} x {row.baseline}"


def interval_text(interval: Interval | None) -> str:
    """Return an interval as "[low, high]"; "" for None."""
    return "" if interval is None else f"[{interval[0]:.2f}, {interval[1]:.2f}]"


def figure_text(row: BenchRow) -> str:
    """Return the figure that the row's target bounds, with its interval where there is one."""
    if row.judged == "ms":
        return f"{milliseconds(row.ms)} ms"
    if row.judged == "slope" and row.slope is not None and row.slope_interval is not None:
        low, high = row.slope_interval
        return f"{row.slope:+.3f} [{low:+.3f}, {high:+.3f}] per doubling"
    value = getattr(row, row.judged or "ratio")
    return f"{value:.2f} {interval_text(row.interval)}".rstrip()


def judged_text(row: BenchRow) -> str:
    """Return the judged figure with its bound and "met" or "missed"; "" without a target."""
    if row.target is None:
        return ""
    verdict = {True: "met", False: "missed", None: "not measured"}[row.met]
    return f"{figure_text(row)}, {row.bound}: {verdict}"
