"""Measure the frontier of bytes against nats on SmolLM2: tokens dropped, bits dropped, and both.

    make frontier
    python -m characterize.frontier [--out DIR] [--chart-only]

The script runs `kvfloor audit` on texts alone: a context is taken in under the method and sealed, then the continuation
is predicted token by token while the method keeps running. Each row of the table gives the share of a 16-bit exact
cache's bytes that the setting holds at the context's end in a 16-bit model, and the mean KL divergence from exact
predictions in nats per token, with its 95 % interval over blocks of 64 tokens. A row is on the frontier if no other
setting diverges less in no more bytes, give or take 1 %. The chart is docs/images/frontier.svg. About an hour on one
core; with --out, rows that are in the folder are not measured again.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from characterize.lib.table import Row, save
from kvfloor.audit.nats import TextSummary, summaries
from kvfloor.audit.request import AuditRequest
from kvfloor.audit.run import run

BITS = ("k8v8", "k6v5", "k5v4", "k4v4", "k4v3", "k3v3", "k3v2", "k2v2")
METHODS = (
    *(f"exact:{store}" for store in BITS),
    "quant(bits=2)",
    *(f"{policy}{store}" for policy in ("snapkv", "h2o", "tova") for store in ("", ":k5v4", ":k4v3")),
    *(f"sinks{store}" for store in (":k5v4", ":k4v3")),
)
BUDGETS = ("50%", "25%", "12.5%")
TEXTS = ("speech", "facts")
CONTEXT, CONTINUATION = 2048, 512
FIELDS = (
    "axis",
    "setting",
    "share",
    "times_smaller",
    "kl",
    "low",
    "high",
    "same_top",
    "tokens",
    "floor_share",
    "frontier",
)
CHART = Path(__file__).resolve().parent.parent / "docs/images/frontier.svg"
COLOURS = {"tokens": "#c2571a", "bits": "#2a6fb0", "both": "#1f8a4c"}
NAMES = {"tokens": "fewer tokens", "bits": "fewer bits", "both": "both"}


@dataclass(frozen=True)
class FrontierPoint:
    """Hold one setting: what it drops ("tokens", "bits" or "both"), its share of the bytes, and its divergence."""

    axis: str
    setting: str
    share: float
    kl: float
    low: float
    high: float

    def beaten(self, others: Sequence[FrontierPoint]) -> bool:
        """Return True if another setting diverges less and takes no more bytes, or at most 1 % more."""
        return any(one.share <= 1.01 * self.share and one.kl < self.kl for one in others)


def axis(setting: str) -> str:
    """Return what a setting drops: "tokens", "bits" or "both"."""
    bits = ":" in setting or setting.startswith("quant")
    return "both" if bits and "@" in setting else "bits" if bits else "tokens"


def measured(folder: Path) -> list[TextSummary]:
    """Run the audit in `folder`; return one summary per setting, without `exact`."""
    request = AuditRequest(
        model="smollm2",
        methods=METHODS,
        budgets=BUDGETS,
        tasks=(),
        texts=TEXTS,
        contexts=(CONTEXT,),
        continuation=CONTINUATION,
        out=folder,
    )
    answer = run(request, lambda total, text: print(text, flush=True))
    return [one for one in summaries(answer.texts) if one.setting != "exact"]


def point(one: TextSummary) -> FrontierPoint:
    """Return a summary as a point of the chart."""
    share, found = one.state_16_bit_bytes / one.exact_16_bit_bytes, one.figures
    return FrontierPoint(axis(one.setting), one.setting, share, found.kl, found.kl_low, found.kl_high)


def table(found: Sequence[TextSummary]) -> list[Row]:
    """Return one row per setting, the most bytes first; columns as in FIELDS."""
    points = [point(one) for one in found]
    rows: list[Row] = []
    for one, at in sorted(zip(found, points, strict=True), key=lambda pair: -pair[1].share):
        floor = one.floor_bytes / one.exact_16_bit_bytes
        rows.append(
            (at.axis, at.setting, at.share, 1 / at.share, at.kl, at.low, at.high)
            + (one.figures.same_top, one.figures.tokens, floor, "" if at.beaten(points) else "yes")
        )
    return rows


def read() -> tuple[list[FrontierPoint], float]:
    """Return the points of the saved table, and the floor as a share of the bytes of a 16-bit exact cache."""
    _, *lines = (line.split("\t") for line in Path(__file__).with_suffix(".tsv").read_text("utf-8").splitlines())
    points = [FrontierPoint(x[0], x[1], *(float(x[i]) for i in (2, 4, 5, 6))) for x in lines]
    return points, float(lines[0][FIELDS.index("floor_share")])


def chart(points: Sequence[FrontierPoint], floor: float, width: int = 900, height: int = 540) -> str:
    """Return the chart as SVG: divergence against share of bytes, both on log scales, the frontier as a line.

    floor: lower bound on the bytes that any method needs for worst-case keys and values, as a share like the others
    """
    left, right, top, bottom = 76, width - 24, 46, height - 56
    shares = [2.0**-k for k in range(7) if 2.0**-k >= floor]
    low, high = math.log2(floor / 1.1), math.log2(1.0)
    decades = [10.0**k for k in range(-5, 2)]
    least, most = -5.2, math.log10(max(p.kl for p in points) * 1.6)

    def x(share: float) -> float:
        return left + (math.log2(share) - low) / (high - low) * (right - left)

    def y(kl: float) -> float:
        return bottom - (math.log10(max(kl, 10**least)) - least) / (most - least) * (bottom - top)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="13">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="{left}" y="24" font-size="16" fill="#222222">SmolLM2-135M, {CONTEXT:,} tokens: nats against bytes'
        f"</text>",
    ]
    for share in shares:
        at = f"{x(share):.1f}"
        parts.append(f'<path d="M{at} {top}V{bottom}" stroke="#e4e4e4"/>')
        words = "1" if share == 1 else f"1/{round(1 / share)}"
        parts.append(f'<text x="{at}" y="{bottom + 20}" text-anchor="middle" fill="#444444">{words}</text>')
    for kl in decades:
        if least <= math.log10(kl) <= most:
            at = f"{y(kl):.1f}"
            parts.append(f'<path d="M{left} {at}H{right}" stroke="#e4e4e4"/>')
            parts.append(f'<text x="{left - 8}" y="{at}" dy="4" text-anchor="end" fill="#444444">{kl:g}</text>')
    best = sorted((p for p in points if not p.beaten(points)), key=lambda p: p.share)
    line = " ".join(f"{x(p.share):.1f},{y(p.kl):.1f}" for p in best)
    parts.append(f'<polyline points="{line}" fill="none" stroke="#888888" stroke-dasharray="5 4"/>')
    for p in points:
        colour = COLOURS[p.axis]
        parts.append(
            f"<g><title>{escape(p.setting)}: {p.kl:.3g} nats at {p.share:.3f} of the bytes</title>"
            f'<path d="M{x(p.share):.1f} {y(p.low):.1f}V{y(p.high):.1f}" stroke="{colour}" opacity="0.45"/>'
            f'<circle cx="{x(p.share):.1f}" cy="{y(p.kl):.1f}" r="4.5" fill="{colour}"/></g>'
        )
    for i, p in enumerate(best):
        words = f'fill="{COLOURS[p.axis]}">{escape(p.setting)}</text>'
        if p.axis == "bits":
            parts.append(f'<text x="{x(p.share) + 9:.1f}" y="{y(p.kl) + 4:.1f}" font-size="11" {words}')
        else:
            down = (20, 36, 52)[i % 3]
            parts.append(
                f'<text x="{x(p.share) - 4:.1f}" y="{y(p.kl) + down:.1f}" text-anchor="middle" font-size="11" {words}'
            )
    parts.append(f'<path d="M{x(floor):.1f} {top}V{bottom}" stroke="#222222" stroke-dasharray="2 3"/>')
    parts.append(f'<text x="{x(floor) + 6:.1f}" y="{bottom - 8}" fill="#222222">floor, worst case</text>')
    for i, (name, words) in enumerate(NAMES.items()):
        at = right - 330 + 120 * i
        parts.append(f'<circle cx="{at}" cy="20" r="4.5" fill="{COLOURS[name]}"/>')
        parts.append(f'<text x="{at + 10}" y="24" fill="#222222">{words}</text>')
    parts.append(
        f'<text x="{(left + right) / 2}" y="{height - 12}" text-anchor="middle" fill="#222222">share of a 16-bit exact '
        f"cache's bytes, log scale; dashed: the frontier</text>"
    )
    parts.append(
        f'<text transform="translate(18 {(top + bottom) / 2}) rotate(-90)" text-anchor="middle" fill="#222222">KL from '
        f"exact, nats per token, log scale</text></svg>"
    )
    return "\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder that keeps the measured rows")
    parser.add_argument("--chart-only", action="store_true", help="draw the chart from the saved table")
    given = parser.parse_args()
    if not given.chart_only:
        with tempfile.TemporaryDirectory() as scratch:
            save(__file__, FIELDS, table(measured(given.out or Path(scratch))))
    CHART.write_text(chart(*read()), encoding="utf-8")


if __name__ == "__main__":
    main()
