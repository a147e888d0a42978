"""A table that a script of this folder prints and keeps beside itself, and the intervals in it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import NormalDist, fmean, stdev

Row = Sequence[object]


def save(script: str, fields: Sequence[str], rows: Iterable[Row]) -> None:
    """Print the rows, tab-separated, and write them to the script's name with the ending .tsv."""
    lines = ["\t".join(fields), *("\t".join(_cell(value) for value in row) for row in rows)]
    print("\n".join(lines))
    Path(script).with_suffix(".tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean of independent values and the normal interval of their expectation."""
    middle = fmean(values)
    half = NormalDist().inv_cdf(0.5 + confidence / 2) * stdev(values) / math.sqrt(len(values))
    return middle, middle - half, middle + half


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
