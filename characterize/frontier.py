"""Measure the frontier of bytes against nats on real models: tokens dropped, bits dropped, and both.

    make frontier
    python -m characterize.frontier [SOURCE ...] [--only SETTINGS] [--accept-terms] [--out DIR] [--chart-only]

A source is a model with the number of tokens of a text that it takes in: smollm2-2048, smollm2-4096, gemma3-270m-2048;
the others' rows stay in the table. With --only, so do rows of the source's settings that are not named. The script
measures as `kvfloor audit` does on texts: a context is taken in under the method and sealed, then the continuation is
predicted token by token while the method keeps running. Each row of the
table gives the bytes that the setting holds at the context's end in a 16-bit model, with room for the context and no
more, as a share of the bytes of the context's keys and values in 16 bits; and the mean KL divergence from exact
predictions in nats per token, with its 95 % interval over blocks of 64 tokens. A row is on the frontier if no other
setting of its source diverges less in no more bytes, give or take 1 %. The charts are docs/images/frontier.svg
(smollm2-2048), frontier-smollm2-4096.svg and frontier-gemma3-270m-2048.svg. An hour and more on one core for the first
source, half of it for another; with --out, rows that are in the folder are not measured again.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import torch

from characterize.lib.table import ResultTable, Row
from kvfloor.audit.grid import EXACT, Place
from kvfloor.audit.nats import MOST_BYTES, TextRow, TextSummary, summaries
from kvfloor.audit.plan import settings
from kvfloor.audit.records import line_of, read_growing
from kvfloor.audit.request import AuditRequest
from kvfloor.audit.worker import Worker
from kvfloor.core.budget import resolve
from kvfloor.core.spec import Spec
from kvfloor.hf.held import zeros_held
from kvfloor.methods.grammar import parse
from kvfloor.models.load import find
from kvfloor.splitting import split_list

BITS = ("k8v8", "k6v5", "k5v4", "k4v4", "k4v3", "k3v3", "k3v2", "k2v2")
METHODS = (
    *(f"exact:{store}" for store in BITS),
    *("quant", "quant(bits=4)", "quant(bits=2)", "random", "window", "sinks"),
    *(f"{policy}{store}" for policy in ("snapkv", "h2o", "tova") for store in ("", ":k5v4", ":k4v3")),
    *(f"sinks{store}" for store in (":k5v4", ":k4v3")),
)
BUDGETS = ("50%", "25%", "12.5%")
FEWEST = ("6.25%", "3.125%")
BRIEF = (
    *(f"exact:{store}" for store in ("k8v8", "k5v4", "k4v4", "k4v3", "k3v3", "k2v2")),
    "quant(bits=4)",
    *(f"snapkv{store}" for store in ("", ":k5v4", ":k4v3")),
)
TEXTS = ("speech", "facts")
CONTINUATION = 512
FIELDS = (
    "source",
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
FIGURES = ("kl", "low", "high")
SAVED = "smollm2-2048"  # the source whose caches `coded_saves.py` saves
IMAGES = Path(__file__).resolve().parent.parent / "docs/images"
COLOURS = {"tokens": "#c2571a", "bits": "#2a6fb0", "both": "#1f8a4c", "saved": "#8a3f9e"}
NAMES = {"tokens": "fewer tokens", "bits": "fewer bits", "both": "both", "saved": "saved files"}


@dataclass(frozen=True)
class FrontierSource:
    """Describe a source of rows.

    model, title      the model's name for an audit, and in charts
    layers            number of its layers whose cache is compressed, all of one size
    heads, width, g   of such a layer: kv heads, width of a key and of a value, query heads per kv head
    context           tokens of context
    measured          pairs of methods and budgets: each of these methods under each of these budgets
    chart             name of the chart's file
    """

    model: str
    title: str
    layers: int
    heads: int
    width: int
    g: int
    context: int
    measured: Sequence[tuple[Sequence[str], Sequence[str]]]
    chart: str

    @property
    def settings(self) -> list[str]:
        """Return the texts of the settings that are measured, each once."""
        found = [one.text for methods, budgets in self.measured for one in settings(methods, budgets) if one.asked]
        return list(dict.fromkeys(found))

    @property
    def image(self) -> Path:
        """Return the path of the chart."""
        return IMAGES / self.chart

    @property
    def whole(self) -> int:
        """Return the bytes of the context's keys and values in 16 bits."""
        return 2 * 2 * self.layers * self.heads * self.width * self.context

    def share(self, setting: str) -> float:
        """Return the bytes that a setting holds after the context in a 16-bit model, as a share of `whole`.

        A cache that keeps every token has room for those of the context, and for no more.
        """
        spec = Spec(self.heads, self.width, self.width, dtype=torch.bfloat16)
        method = resolve(parse(setting), spec, layers=self.layers, length=self.context, g=self.g)
        return self.layers * zeros_held(method, spec, self.g, self.context, spare=False).after / self.whole


SMALL = tuple(f"{policy}{store}" for policy in ("snapkv", "h2o") for store in ("", ":k5v4", ":k4v3"))
SOURCES = {
    "smollm2-2048": FrontierSource(
        "smollm2", "SmolLM2-135M", 30, 3, 64, 3, 2048, ((METHODS, BUDGETS), (SMALL, FEWEST)), "frontier.svg"
    ),
    "smollm2-4096": FrontierSource(
        *("smollm2", "SmolLM2-135M", 30, 3, 64, 3, 4096),
        ((BRIEF, (*BUDGETS, *FEWEST)), (("snapkv:k5v4", "snapkv:k4v3"), ("1.5625%",))),
        "frontier-smollm2-4096.svg",
    ),
    "gemma3-270m-2048": FrontierSource(
        *("gemma3-270m", "Gemma 3 270M", 3, 1, 256, 4, 2048),
        (((*BRIEF, "quant", "random", "window", "sinks", "h2o", "h2o:k4v3"), BUDGETS),),
        "frontier-gemma3-270m-2048.svg",
    ),
}


@dataclass(frozen=True)
class FrontierPoint:
    """Hold one setting: what it drops ("tokens", "bits" or "both"), its share of the bytes, and its divergence.

    For a saved file instead of a cache in memory, `axis` is "saved".
    """

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


def measured(source: FrontierSource, wanted: Sequence[str], folder: Path, accept_terms: bool) -> list[TextSummary]:
    """Measure the settings `wanted` that `folder` has no rows of; return one summary for each."""
    request = AuditRequest(
        model=source.model,
        methods=wanted,
        budgets=BUDGETS,
        tasks=(),
        texts=TEXTS,
        contexts=(source.context,),
        continuation=CONTINUATION,
        facts=0,
        accept_terms=accept_terms,
    )
    request.check()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "nats.jsonl"
    found, size = read_growing(path, TextRow, MOST_BYTES, path.name, "a row of an audit's texts")
    rows: dict[tuple[Place, str], TextRow] = {(row.cell, row.method): row for row in found}
    worker = Worker(request, find(source.model, accept_terms), print)
    with path.open("ab") as file:
        file.truncate(size)
        for place in worker.grid.places:
            for setting in (EXACT, *wanted):
                if (place, setting) not in rows:
                    print(f"{place}: {setting}", flush=True)
                    row = worker.measure(place, setting, rows.get((place, EXACT))).row
                    assert isinstance(row, TextRow)
                    rows[place, setting] = row
                    file.write(line_of(row).encode())
                    file.flush()
    return summaries([rows[place, setting] for setting in wanted for place in worker.grid.places])


def point(source: FrontierSource, one: TextSummary) -> FrontierPoint:
    """Return a summary as a point of the chart."""
    found = one.figures
    return FrontierPoint(
        axis(one.setting), one.setting, source.share(one.setting), found.kl, found.kl_low, found.kl_high
    )


def table(name: str, found: Sequence[TextSummary], kept: Sequence[Mapping[str, str]] = ()) -> list[Row]:
    """Return one row per setting of the source `name`, the most bytes first; columns as in FIELDS.

    found  what was measured
    kept   rows of the source in the saved table, by field; those of settings in `found` are left out
    """
    source = SOURCES[name]
    rows: list[tuple[FrontierPoint, Row]] = []
    for one in found:
        at = point(source, one)
        row = (name, at.axis, at.setting, at.share, 1 / at.share, at.kl, at.low, at.high)
        rows.append((at, (*row, one.figures.same_top, one.figures.tokens, one.floor_bytes / source.whole)))
    new = {at.setting for at, _ in rows}
    rows += [(_saved_point(row), [row[x] for x in FIELDS[:-1]]) for row in kept if row["setting"] not in new]
    points = [at for at, _ in rows]
    return [(*row, "" if at.beaten(points) else "yes") for at, row in sorted(rows, key=lambda pair: -pair[0].share)]


def saved_rows(name: str) -> list[dict[str, str]]:
    """Return the rows of a source in the saved table, by field; none if there are none."""
    _, *lines = (line.split("\t") for line in Path(__file__).with_suffix(".tsv").read_text("utf-8").splitlines())
    return [dict(zip(FIELDS, line, strict=True)) for line in lines if line[0] == name]


def _saved_point(row: Mapping[str, str]) -> FrontierPoint:
    return FrontierPoint(row["axis"], row["setting"], *(float(row[x]) for x in ("share", *FIGURES)))


def read(name: str) -> tuple[list[FrontierPoint], float]:
    """Return the points of a source in the saved table, and the floor as a share of the bytes of its keys and values.

    The list is empty, and the share 0, if the table has no rows of this source.
    """
    mine = saved_rows(name)
    return [_saved_point(row) for row in mine], float(mine[0]["floor_share"]) if mine else 0.0


def saved() -> list[FrontierPoint]:
    """Return the points of coded saves of SmolLM2's caches after 2,048 tokens, measured by `coded_saves.py`."""
    path = Path(__file__).with_name("coded_saves.tsv")
    fields, *lines = (line.split("\t") for line in path.read_text("utf-8").splitlines())
    rows = [dict(zip(fields, line, strict=True)) for line in lines]
    return [
        FrontierPoint(
            "saved", f"coded={row['aim']}", 1 / float(row["times_smaller"]), *(float(row[x]) for x in FIGURES)
        )
        for row in rows
        if row["axes"] == "calibrated"
    ]


def chart(points: Sequence[FrontierPoint], floor: float, title: str, width: int = 900, height: int = 540) -> str:
    """Return the chart as SVG: divergence against share of bytes, both on log scales, the frontier as a line.

    title  the model and the number of tokens
    floor  lower bound on the bytes that any method needs for worst-case keys and values, as a share like the others
    """
    left, right, top, bottom = 76, width - 24, 46, height - 56
    least_share = min(floor, *(p.share for p in points))
    shares = [2.0**-k for k in range(9) if 2.0**-k >= least_share]
    low, high = math.log2(least_share / 1.1), math.log2(1.0)
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
        f'<text x="{left}" y="24" font-size="16" fill="#222222">{escape(title)}: nats against bytes</text>',
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
    held = [p for p in points if p.axis != "saved"]
    best = sorted((p for p in held if not p.beaten(held)), key=lambda p: p.share)
    files = sorted((p for p in points if p.axis == "saved"), key=lambda p: p.share)
    for some, stroke in ((best, "#888888"), (files, COLOURS["saved"])):
        line = " ".join(f"{x(p.share):.1f},{y(p.kl):.1f}" for p in some)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{stroke}" stroke-dasharray="5 4"/>')
    for p in points:
        colour = COLOURS[p.axis]
        parts.append(
            f"<g><title>{escape(p.setting)}: {p.kl:.3g} nats at {p.share:.3f} of the bytes</title>"
            f'<path d="M{x(p.share):.1f} {y(p.low):.1f}V{y(p.high):.1f}" stroke="{colour}" opacity="0.45"/>'
            f'<circle cx="{x(p.share):.1f}" cy="{y(p.kl):.1f}" r="4.5" fill="{colour}"/></g>'
        )
    for p in best:
        words = f'fill="{COLOURS[p.axis]}">{escape(p.setting)}</text>'
        if p.axis == "bits":
            parts.append(f'<text x="{x(p.share) + 9:.1f}" y="{y(p.kl) + 4:.1f}" font-size="11" {words}')
        else:
            at = f"{x(p.share):.1f} {y(p.kl) + 14:.1f}"  # slanted, so that labels of near points stay apart
            parts.append(f'<text transform="translate({at}) rotate(42)" font-size="11" {words}')
    parts.append(f'<path d="M{x(floor):.1f} {top}V{bottom}" stroke="#222222" stroke-dasharray="2 3"/>')
    parts.append(f'<text x="{x(floor) + 6:.1f}" y="{bottom - 8}" fill="#222222">floor, worst case</text>')
    shown = [(name, words) for name, words in NAMES.items() if any(p.axis == name for p in points)]
    for i, (name, words) in enumerate(shown):
        at = right - 400 + 108 * i
        parts.append(f'<circle cx="{at}" cy="20" r="4.5" fill="{COLOURS[name]}"/>')
        parts.append(f'<text x="{at + 10}" y="24" fill="#222222">{words}</text>')
    parts.append(
        f'<text x="{(left + right) / 2}" y="{height - 12}" text-anchor="middle" fill="#222222">share of the bytes of '
        f"16-bit keys and values, log scale; dashed: the frontier</text>"
    )
    parts.append(
        f'<text transform="translate(18 {(top + bottom) / 2}) rotate(-90)" text-anchor="middle" fill="#222222">KL from '
        f"exact, nats per token, log scale</text></svg>"
    )
    return "\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sources", nargs="*", metavar="SOURCE", help=f"of {', '.join(SOURCES)}; all unless given")
    parser.add_argument("--only", help="settings with commas, such as snapkv@50%%,exact:k4v3; all unless given")
    parser.add_argument("--accept-terms", action="store_true", help="accept the terms of use of Gemma (docs/audit.md)")
    parser.add_argument("--out", type=Path, help="folder that keeps the measured rows, one folder in it per source")
    parser.add_argument("--chart-only", action="store_true", help="draw the charts from the saved table")
    given = parser.parse_args()
    names = given.sources or list(SOURCES)
    if unknown := [name for name in names if name not in SOURCES]:
        parser.error(f"no source {', '.join(unknown)}: they are {', '.join(SOURCES)}")
    if not given.chart_only:
        rows = ResultTable(__file__, FIELDS, names, list(SOURCES))
        for name in names:
            wanted = SOURCES[name].settings if given.only is None else split_list(given.only)
            kept = [] if given.only is None else saved_rows(name)
            with tempfile.TemporaryDirectory() as scratch:
                folder = (given.out or Path(scratch)) / name
                for row in table(name, measured(SOURCES[name], wanted, folder, given.accept_terms), kept):
                    rows.add(*row)
        rows.save()
    for name in names:
        points, floor = read(name)
        if points:
            source = SOURCES[name]
            points += saved() if name == SAVED else []
            text = chart(points, floor, f"{source.title}, {source.context:,} tokens")
            source.image.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
