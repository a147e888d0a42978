"""Print a script's table of results and save it beside the script; compute intervals of means for it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import NormalDist, fmean, stdev

import torch

Row = Sequence[object]


def show(fields: Sequence[str], rows: Iterable[Row]) -> str:
    """Print the rows, tab-separated, and return the printed text."""
    text = "\n".join(["\t".join(fields), *("\t".join(_cell(value) for value in row) for row in rows)])
    print(text)
    return text


def save(script: str, fields: Sequence[str], rows: Iterable[Row]) -> None:
    """Print the rows, and write them to a file with the script's name and the ending .tsv."""
    Path(script).with_suffix(".tsv").write_text(show(fields, rows) + "\n", encoding="utf-8")


class ResultTable:
    """Collect a script's rows, of which the first field names the source of keys, and save them beside the script.

    Rows of the sources that are not `measured` stay as they are in the file; `order` lists all sources in the order of
    the table. Raises ValueError if rows that stay have other fields than `fields`.
    """

    def __init__(self, script: str, fields: Sequence[str], measured: Sequence[str], order: Sequence[str]) -> None:
        self.script, self.fields, self.order = script, list(fields), list(order)
        self.rows: list[Row] = []
        path = Path(script).with_suffix(".tsv")
        if path.exists() and set(order) - set(measured):
            first, *lines = (line.split("\t") for line in path.read_text(encoding="utf-8").splitlines())
            if first != self.fields:
                raise ValueError(f"{path.name} has the fields {first}, not {self.fields}: measure all sources of keys")
            self.rows = [line for line in lines if line[0] not in measured]

    def add(self, *row: object) -> None:
        """Add a row, and print it."""
        print(*(_cell(value) for value in row), sep="\t", flush=True)
        self.rows.append(row)

    def save(self) -> None:
        """Print the whole table and write it, sorted by source."""
        save(self.script, self.fields, sorted(self.rows, key=lambda row: self.order.index(str(row[0]))))


def median_interval(values: Sequence[float], resamples: int = 2000) -> tuple[float, float, float]:
    """Return the median of independent values, and its bootstrap 95 % interval over seeded resamples."""
    drawn = torch.tensor(values, dtype=torch.float64)
    picked = torch.randint(len(drawn), (resamples, len(drawn)), generator=torch.Generator().manual_seed(0))
    low, high = drawn[picked].quantile(0.5, 1).quantile(torch.tensor([0.025, 0.975], dtype=drawn.dtype)).tolist()
    return float(drawn.quantile(0.5)), low, high


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Return the mean of independent values, and the ends of the normal interval of their expectation."""
    middle = fmean(values)
    half = NormalDist().inv_cdf(0.5 + confidence / 2) * stdev(values) / math.sqrt(len(values))
    return middle, middle - half, middle + half


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
