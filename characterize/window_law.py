"""Fit KL = C window^-alpha to measured budgets of `sinks` and `window`, and predict the budget that was left out.

    python -m characterize.window_law

No model runs: the points are rows of `nats_by_budget.tsv` and `less_on_smollm2.tsv`, which have the same 1,536 tokens
of three texts after 2,048 tokens of SmolLM2. Each row of the table leaves one budget out, fits the others
(`kvfloor.planning.fit_window_law`), and has the exponent with its 95 % interval, the predicted nats with the interval
in which a further point is expected, the nats measured there with their own interval, and the window that the law gives
for the measured nats. A last row leaves none out. Methods with fewer than four other budgets are not fitted.
"""

from __future__ import annotations

import csv
from pathlib import Path

from characterize.lib.table import save
from kvfloor.planning import fit_window_law

FOLDER = Path(__file__).parent
CONTEXT = 2048
FIELDS = (
    "method",
    "left_out",
    "windows",
    "exponent",
    "low",
    "high",
    "predicted",
    "predicted_low",
    "predicted_high",
    "measured",
    "measured_low",
    "measured_high",
    "window_for_measured",
)
Point = tuple[float, float, float]


def measured() -> dict[str, dict[int, Point]]:
    """Return nats with their interval, by method and budget in tokens."""
    found: dict[str, dict[int, Point]] = {}
    for row in _rows("nats_by_budget.tsv"):
        if row["model"] == "smollm2" and row["context"] == str(CONTEXT) and row["budget"].endswith("%"):
            _put(found, row["method"], round(CONTEXT * float(row["budget"][:-1]) / 100), row)
    for row in _rows("less_on_smollm2.tsv"):
        method, _, budget = row["method"].partition("@")
        if budget.isdigit():
            _put(found, method, int(budget), row)
    return found


def _put(found: dict[str, dict[int, Point]], method: str, budget: int, row: dict[str, str]) -> None:
    if method in ("sinks", "window"):
        found.setdefault(method, {})[budget] = (float(row["kl"]), float(row["low"]), float(row["high"]))


def _rows(name: str) -> list[dict[str, str]]:
    with (FOLDER / name).open(encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def fits() -> list[tuple[object, ...]]:
    """Return the rows of the table."""
    rows: list[tuple[object, ...]] = []
    for method, points in measured().items():
        for left_out in (*sorted(points), None):
            windows = sorted(window for window in points if window != left_out)
            if len(windows) < 4:
                continue
            law = fit_window_law(windows, [points[window][0] for window in windows])
            row = (method, left_out or "-", ",".join(map(str, windows)), law.exponent, law.low, law.high)
            if left_out is None:
                rows.append((*row, *["-"] * 7))
            else:
                nats = points[left_out]
                rows.append((*row, law.nats(left_out), *law.nats_interval(left_out), *nats, law.window(nats[0])))
    return rows


def main() -> None:
    save(__file__, FIELDS, fits())


if __name__ == "__main__":
    main()
