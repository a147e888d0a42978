"""Print a script's table of results and save it beside the script; compute intervals of means for it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import NormalDist, fmean, stdev

Row = Sequence[object]


def show(fields: Sequence[str], rows: Iterable[Row]) -> str:
    """Print the rows, tab-separated, and return the printed text."""
    text = "\n".join(["\t".join(fields), *("\t".join(_cell(value) for value in row) for row in rows)])
    print(text)
    return text


def save(script: str, fields: Sequence[str], rows: Iterable[Row]) -> None:
    """Print the rows, and write them to a file with the script's name and the ending .tsv."""
    Path(script).with_suffix(".tsv").write_text(show(fields, rows) + "\n", encoding="utf-8")


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Return the mean of independent values, and the ends of the normal interval of their expectation."""
    middle = fmean(values)
    half = NormalDist().inv_cdf(0.5 + confidence / 2) * stdev(values) / math.sqrt(len(values))
    return middle, middle - half, middle + half


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
