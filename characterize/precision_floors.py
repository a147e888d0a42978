"""Compute the worst-case floor by the error that answers may have, as a share of a 16-bit cache, for its two formats.

    python -m characterize.precision_floors

n = 1,024 tokens, keys and values of width 64, success 0.9 per row, no bound on logits (`kvfloor.floors.space`).
  guarantee  entrywise: each number of an answer is within a factor 1 +- error; additive: within error times the largest
             number of all values; max: the l2 error is at most error times the longest value
  values     number format of the values; binary: values of one bit
  levels     values that answers tell apart (entrywise and additive), 0 where points of a ball are hidden
  bits       the floor
  share      of the bits of all keys and values in 16 bits
The chart, docs/images/precision_floors.svg, has the entrywise shares. The script takes seconds.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from characterize.lib.table import save
from kvfloor.floors import space

TOKENS, WIDTH = 1024, 64
ERRORS = (0.99, 0.9, 0.5, 0.25, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001, 0.0001)
GUARANTEES, FORMATS = ("entrywise", "additive", "max"), ("binary", "fp16", "bf16")
FIELDS = ("guarantee", "values", "error", "levels", "bits", "share")
IMAGE = Path(__file__).parent.parent / "docs" / "images" / "precision_floors.svg"
COLOURS = {"binary": "#777777", "fp16": "#0072b2", "bf16": "#d55e00"}

Row = tuple[str, str, float, int, float, float]


def rows() -> list[Row]:
    """Compute the table: one row per guarantee, number format and error."""
    found = []
    for guarantee in GUARANTEES:
        for values in FORMATS:
            for error in ERRORS:
                asked: dict[str, Any] = (
                    {"eta": error} if guarantee == "entrywise" else {"metric": guarantee, "epsilon": error}
                )
                floor = space(TOKENS, WIDTH, values=values, **asked)
                share = floor.bits / (8 * floor.constants["exact_bytes_fp16"])
                found.append((guarantee, values, error, floor.constants.get("levels", 0), floor.bits, share))
    return found


def chart(found: list[Row]) -> str:
    """Draw the entrywise shares against the error, which falls to the right on a logarithmic axis, as SVG."""
    width, height, left, right, top, bottom = 560, 330, 56, 500, 24, 280
    decades = -math.log10(ERRORS[-1])

    def place(error: float, share: float) -> str:
        return f"{left + (right - left) * -math.log10(error) / decades:.1f},{bottom - (bottom - top) * share / 0.5:.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="12"><rect width="{width}" height="{height}" fill="#ffffff"/>'
    ]
    for tenths in range(6):
        x, y = place(1.0, tenths / 10).split(",")
        parts.append(f'<path d="M{x},{y}H{right}" stroke="#dddddd"/><text x="{left - 8}" y="{float(y) + 4:.1f}" '
                     f'text-anchor="end">{10 * tenths} %</text>')  # fmt: skip
    for decade in range(5):
        x = place(10.0**-decade, 0.0).split(",")[0]
        parts.append(f'<text x="{x}" y="{bottom + 18}" text-anchor="middle">{10.0**-decade:g}</text>')
    for values in FORMATS:
        points = [place(row[2], row[5]) for row in found if row[:2] == ("entrywise", values)]
        x, y = points[-1 if values == "binary" else ERRORS.index(0.01)].split(",")
        parts.append(f'<polyline points="{" ".join(points)}" fill="none" stroke="{COLOURS[values]}" '
                     f'stroke-width="2"/><text x="{float(x) - 8:.1f}" y="{float(y) - 8:.1f}" text-anchor="end" '
                     f'fill="{COLOURS[values]}">{values}</text>')  # fmt: skip
    parts.append(f'<text x="{(left + right) / 2}" y="{height - 12}" text-anchor="middle">relative error that answers '
                 f'may have</text><text x="{left}" y="14">floor, share of a 16-bit cache</text></svg>')  # fmt: skip
    return "\n".join(parts)


def main() -> None:
    found = rows()
    save(__file__, FIELDS, found)
    IMAGE.write_text(chart(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
