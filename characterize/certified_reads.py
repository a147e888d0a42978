"""Measure how many answers 8-bit codes certify on real models' keys, and how many exact tokens the others fetch.

    make evidence-certify
    python -m characterize.certified_reads [--keys "SmolLM2 2k"] [--chart-only]

Recorded keys and values (`characterize.lib.real_keys`), rounded to bfloat16: of SmolLM2 two texts, and a chat with a
lookup at its end, ten of 30 layers; of Gemma 3 270M two texts at 2,048 tokens and one at 8,192, all three layers of
full attention. The queries of the last 64 tokens attend to all tokens before them, through `tiered`. A stream is one
kv head of one layer on one text, a group the queries of a token that share a kv head and what they fetch. Each line is
one epsilon:
  certified      share of queries whose error the codes alone bound by epsilon, relative to the largest value norm
  low, high      its 95 % interval over streams
  groups         share of groups that fetch nothing
  fetched        share of all tokens that a group fetches exactly, the mean over groups
  read           bytes read, with those of fetched tokens, over the bytes of all tokens in 16 bits; the mean over groups
  bound          median relative bound of the answers from the codes alone, and its 90th percentile (`bound90`)
  over_true      median of bound over true error, of these answers; truth is computed in float64
  violations     answers, of all reads of the line, whose true error exceeds their bound
  hot            bytes of codes, sums and ranges over the bytes of the tokens in 16 bits
`certified_heads.tsv` has the streams of each layer and head by themselves: certified, fetched and read at 1 %, and
whether anything is saved, i.e. fewer bytes are read than there are in 16 bits. The chart, docs/images/certified.svg,
has the bytes read at each epsilon. Ten minutes on one core, once recorded; recordings at 8,192 tokens take 4 GB.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from math import log2
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from characterize.lib.real_keys import CHAT, RealKeys, Streams
from characterize.lib.table import ResultTable, mean_interval
from kvfloor.audit.texts import SHIPPED
from kvfloor.methods.tiered.tally import Tally
from kvfloor.methods.tiered.tiered import Tiered

ASKED = 64
EPSILONS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
STATED = 0.01
"""The epsilon of the table by heads."""
FIELDS = (
    *("keys", "epsilon", "streams", "queries", "certified", "low", "high", "groups", "fetched", "read"),
    *("bound", "bound90", "over_true", "violations", "hot"),
)
HEAD_FIELDS = ("keys", "layer", "head", "certified", "fetched", "read", "saves")
SMOLLM2, GEMMA = "smollm2", "gemma3-270m"
SOURCES = {
    source.name: (source, layers)
    for source, layers in (
        (RealKeys("SmolLM2 2k", SMOLLM2, SHIPPED[:2], 2048, 2048), 10),
        (RealKeys("SmolLM2 8k", SMOLLM2, SHIPPED[:2], 8192, 8192), 10),
        (RealKeys("SmolLM2 chat 2k", SMOLLM2, (CHAT,), 2048, 2048), 10),
        (RealKeys("SmolLM2 chat 8k", SMOLLM2, (CHAT,), 8192, 8192), 10),
        (RealKeys("Gemma 2k", GEMMA, SHIPPED[:2], 2048, 2048), None),
        (RealKeys("Gemma 8k", GEMMA, SHIPPED[:1], 8192, 8192), None),
    )
}
HEADS = Path(__file__).with_name("certified_heads.py")
"""Names the table by heads, certified_heads.tsv."""
IMAGE = Path(__file__).parent.parent / "docs" / "images" / "certified.svg"
COLOURS = ("#1b6ca8", "#0b3c5d", "#5aa469", "#2d6a3a", "#d1495b", "#8c1c2f")


@dataclass
class Tried:
    """Collect the reads of many streams at one epsilon; each list has one entry per stream, or per query."""

    certified: list[float] = field(default_factory=list)
    groups: list[float] = field(default_factory=list)
    fetched: list[float] = field(default_factory=list)
    read: list[float] = field(default_factory=list)
    bounds: list[Tensor] = field(default_factory=list)
    over_true: list[Tensor] = field(default_factory=list)
    violations: int = 0
    hot: list[float] = field(default_factory=list)

    def add(self, other: Tried) -> None:
        """Add the reads of other streams."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


def rows_of(streams: Streams) -> Iterator[Streams]:
    """Yield the streams one by one, with their numbers rounded to 16 bits."""
    q, k, v = (x.bfloat16() for x in (streams.q, streams.k, streams.v))
    for row, (place, text) in enumerate(zip(streams.places, streams.texts, strict=True)):
        here = slice(row, row + 1)
        yield Streams(q[here], k[here], v[here], streams.scale, (place,), (text,))


def truth(stream: Streams) -> tuple[Tensor, Tensor]:
    """Return the queries (1, g, 64, d) and, in float64, their true outputs (1, g, 64, dv)."""
    q = stream.q[:, :, -ASKED:]
    k, v = (x[:, None, :-ASKED].double() for x in (stream.k, stream.v))
    logits = torch.matmul(q.double() * stream.scale, k.transpose(2, 3))
    return q, torch.matmul(torch.softmax(logits, -1), v)


def measure(stream: Streams, epsilons: Sequence[float] = EPSILONS) -> dict[float, Tried]:
    """Read the last queries of one stream at each epsilon; return what was found, by epsilon."""
    spec, (q, exact) = stream.spec(), truth(stream)
    state = Tiered().open(spec)
    state.append(stream.k[:, :-ASKED], stream.v[:, :-ASKED])
    coded = state.read_certified(q, 1e6)
    assert state.hot is not None and not state.tally.tokens
    error = (coded.partial.mean.double() - exact).norm(dim=-1)
    tokens = int(state.seen)
    plain, found = tokens * spec.token_bytes, {}
    for epsilon in epsilons:
        state.tally = Tally()
        answers = state.read_certified(q, epsilon)
        wrong = (answers.partial.mean.double() - exact).norm(dim=-1) > answers.bound
        tally = state.tally
        found[epsilon] = Tried(
            certified=[float((coded.relative <= epsilon).double().mean())],
            groups=[tally.unfetched / tally.queries],
            fetched=[tally.tokens / (tally.queries * tokens)],
            read=[(state.bytes_read + tally.bytes / tally.queries) / plain],
            bounds=[coded.relative.flatten()],
            over_true=[(coded.bound / error).flatten()],
            violations=int((error > coded.bound).sum() + wrong.sum()),
            hot=[state.hot.nbytes / plain],
        )
    return found


def line(tried: Tried) -> tuple[object, ...]:
    """Return the fields of a line from `streams` on."""
    bounds, over = torch.cat(tried.bounds), torch.cat(tried.over_true)
    return (
        *(len(tried.certified), len(bounds), *mean_interval(tried.certified)),
        *(fmean(getattr(tried, name)) for name in ("groups", "fetched", "read")),
        *(float(bounds.quantile(0.5)), float(bounds.quantile(0.9)), float(over.quantile(0.5))),
        *(tried.violations, fmean(tried.hot)),
    )


def chart(rows: Sequence[dict[str, str]], width: int = 900, height: int = 480) -> str:
    """Return the chart as SVG: bytes read against epsilon, on a log scale, a curve for each source of keys."""
    left, right, top, bottom = 76, width - 200, 46, height - 56
    low, high = log2(EPSILONS[0]), log2(EPSILONS[-1])
    most = max(1.0, *(float(row["read"]) for row in rows)) * 1.05

    def x(epsilon: float) -> float:
        return left + (log2(epsilon) - low) / (high - low) * (right - left)

    def y(read: float) -> float:
        return bottom - read / most * (bottom - top)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="13">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="{left}" y="24" font-size="16" fill="#222222">Bytes that a certified read takes</text>',
    ]
    for epsilon in EPSILONS:
        at = f"{x(epsilon):.1f}"
        parts.append(f'<path d="M{at} {top}V{bottom}" stroke="#e4e4e4"/>')
        parts.append(f'<text x="{at}" y="{bottom + 20}" text-anchor="middle" fill="#444444">{epsilon * 100:g} %</text>')
    for tenth in range(0, int(most * 10) + 1, 2):
        at = f"{y(tenth / 10):.1f}"
        stroke = "#222222" if tenth == 10 else "#e4e4e4"
        parts.append(f'<path d="M{left} {at}H{right}" stroke="{stroke}"/>')
        parts.append(f'<text x="{left - 8}" y="{at}" dy="4" text-anchor="end" fill="#444444">{tenth / 10:g}</text>')
    for (name, _), colour in zip(SOURCES.items(), COLOURS, strict=True):
        mine = [(float(row["epsilon"]), float(row["read"])) for row in rows if row["keys"] == name]
        if not mine:
            continue
        points = " ".join(f"{x(epsilon):.1f},{y(read):.1f}" for epsilon, read in mine)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for epsilon, read in mine:
            parts.append(
                f"<g><title>{escape(name)}: {read:.3f} of the bytes at {epsilon * 100:g} %</title>"
                f'<circle cx="{x(epsilon):.1f}" cy="{y(read):.1f}" r="3.5" fill="{colour}"/></g>'
            )
        at = top + 20 * list(SOURCES).index(name)
        parts.append(f'<circle cx="{right + 24}" cy="{at}" r="4.5" fill="{colour}"/>')
        parts.append(f'<text x="{right + 36}" y="{at + 4}" fill="#222222">{escape(name)}</text>')
    parts.append(
        f'<text x="{(left + right) / 2}" y="{height - 12}" text-anchor="middle" fill="#222222">epsilon, of the largest '
        f"value norm, log scale</text>"
    )
    parts.append(
        f'<text transform="translate(18 {(top + bottom) / 2}) rotate(-90)" text-anchor="middle" fill="#222222">bytes '
        f"read, over those of 16-bit keys and values</text></svg>"
    )
    return "\n".join(parts) + "\n"


def by_head(source: str, heads: dict[tuple[int, int], Tried]) -> Iterator[tuple[object, ...]]:
    """Yield the lines of the table by heads."""
    for (layer, head), one in sorted(heads.items()):
        found = [fmean(getattr(one, name)) for name in ("certified", "fetched", "read")]
        yield source, layer, head, *found, "yes" if found[-1] < 1 else "no"


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--keys", default=",".join(SOURCES), help=f"of {', '.join(SOURCES)}; with commas")
    parser.add_argument("--chart-only", action="store_true", help="draw the chart from the saved table")
    given = parser.parse_args()
    names = tuple(given.keys.split(","))
    if unknown := [name for name in names if name not in SOURCES]:
        parser.error(f"no keys {', '.join(unknown)}: they are {', '.join(SOURCES)}")
    table = Path(__file__).with_suffix(".tsv")
    if not given.chart_only:
        rows = ResultTable(__file__, FIELDS, names, tuple(SOURCES))
        head_rows = ResultTable(str(HEADS), HEAD_FIELDS, names, tuple(SOURCES))
        for name in names:
            source, layers = SOURCES[name]
            tried: dict[float, Tried] = {epsilon: Tried() for epsilon in EPSILONS}
            heads: dict[tuple[int, int], Tried] = {}
            for stream in (row for streams in source.streams(layers) for row in rows_of(streams)):
                for epsilon, one in measure(stream).items():
                    tried[epsilon].add(one)
                    if epsilon == STATED:
                        heads.setdefault(stream.places[0], Tried()).add(one)
            for epsilon, found in tried.items():
                rows.add(name, epsilon, *line(found))
            for row in by_head(name, heads):
                head_rows.add(*row)
        rows.save()
        head_rows.save()
    fields, *lines = (row.split("\t") for row in table.read_text("utf-8").splitlines())
    IMAGE.write_text(chart([dict(zip(fields, row, strict=True)) for row in lines]), encoding="utf-8")


if __name__ == "__main__":
    main()
