"""Compare a method's time per token after 100,000 tokens with that after 1,000: `python bench/streaming.py`

The methods are all registered ones of constant memory, with a budget of 256 tokens, 4 kv heads of width 64 and a GQA
group of 2. At 25 lengths from 1,024 to 102,400 tokens each method steps through 64 single tokens, which are two blocks
of 32. A young state of the same method, at about 1,024 tokens, takes turns with the old one, so that other work on the
machine slows both.

Each line gives the median microseconds per token, the mean ratio of old to young over the longer half, its slope per
100,000 tokens by least squares, each of the two with a 95 % interval, and the bytes at the first and the last length.
Prints no figures while the tests of the timed code fail. `--out FILE` also writes a page with the curves.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from pathlib import Path

import torch
from gate import green

from kvfloor import Method, Spec, State
from kvfloor.methods.grammar import default_method
from kvfloor.methods.registry import TABLE

TIMED = ["tests/core", "tests/methods"]
BUDGET, ROWS, GROUP, WIDTH = 256, 4, 2, 64
STEPS, FIRST, LAST, MARKS, BULK = 64, 1024, 102_400, 25, 1024


def streaming() -> list[Method]:
    """List the registered methods of constant memory, each once."""
    methods = {str(method): method for method in (default_method(name, budget=BUDGET) for name in TABLE)}
    return [method for method in methods.values() if method.traits.constant_memory]


def feed(state: State, source: torch.Generator, tokens: int) -> None:
    """Step through this many more normal tokens in large chunks."""
    while tokens > 0:
        part = min(BULK, tokens)
        q = torch.randn(ROWS, GROUP, part, WIDTH, generator=source)
        k, v = (torch.randn(ROWS, part, WIDTH, generator=source) for _ in range(2))
        state.step(q, k, v)
        tokens -= part


def timed(young: State, old: State, source: torch.Generator) -> tuple[float, float]:
    """Return the microseconds per token of both states, which take turns over STEPS single tokens."""
    q = torch.randn(STEPS, ROWS, GROUP, 1, WIDTH, generator=source)
    k, v = (torch.randn(STEPS, ROWS, 1, WIDTH, generator=source) for _ in range(2))
    spent = [0.0, 0.0]
    for i in range(STEPS):
        for which, state in enumerate((young, old)):
            begin = time.perf_counter()
            state.step(q[i], k[i], v[i])
            spent[which] += time.perf_counter() - begin
    return spent[0] / STEPS * 1e6, spent[1] / STEPS * 1e6


def slope(lengths: list[int], ratios: list[float]) -> tuple[float, float]:
    """Return the least-squares slope per 100,000 tokens, and the half-width of its 95 % interval."""
    x = [n / 1e5 for n in lengths]
    fit = statistics.linear_regression(x, ratios)
    rest = [y - fit.slope * at - fit.intercept for at, y in zip(x, ratios, strict=True)]
    spread = math.sqrt(sum(r * r for r in rest) / (len(x) - 2))
    return fit.slope, 2.07 * spread / math.sqrt((len(x) - 1) * statistics.variance(x))  # Student's t, 23 degrees


def late(ratios: list[float]) -> tuple[float, float]:
    """Return the mean of the second half, and the half-width of its 95 % interval."""
    half = ratios[len(ratios) // 2 :]
    return statistics.fmean(half), 2.18 * statistics.stdev(half) / math.sqrt(len(half))  # Student's t, 12 degrees


def page(lengths: list[int], ratios: dict[str, list[float]]) -> str:
    """Render a page with one figure per method: the time per token, old state over young, against the length."""
    from kvfloor.report.chart import line, line_chart
    from kvfloor.report.environment import environment
    from kvfloor.report.marks import nth_mark

    caption = "A token's cost, old state over young."
    curves = {name: line(nth_mark(0, name), list(zip(lengths, y, strict=True))) for name, y in ratios.items()}
    figures = [line_chart(name, "tokens so far", caption, [curve]) for name, curve in curves.items()]
    return environment().from_string(PAGE).render(figures=figures)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--last", type=int, default=LAST)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if not green(*TIMED):
        return 1
    torch.set_num_threads(given.threads)
    lengths = [round(FIRST + (given.last - FIRST) * i / (MARKS - 1)) for i in range(MARKS)]
    spec, source = Spec(ROWS, WIDTH, WIDTH, WIDTH**-0.5), torch.Generator().manual_seed(0)
    states = {str(method): (method.open(spec), method.open(spec)) for method in streaming()}
    for young, _ in states.values():
        feed(young, source, FIRST - STEPS)
    costs: dict[str, list[float]] = {name: [] for name in states}
    ratios: dict[str, list[float]] = {name: [] for name in states}
    first: dict[str, int] = {}
    for at, n in enumerate(lengths):
        for name, (young, old) in states.items():
            feed(old, source, n - STEPS - int(old.seen[0]))
            base, cost = timed(young, old, source)
            costs[name].append(cost)
            ratios[name].append(cost / base)
            first.setdefault(name, old.nbytes)
        print(f"{at + 1} of {MARKS}: {n:,} tokens", file=sys.stderr)
    print(f"torch {torch.__version__}, {given.threads} threads, {ROWS} kv heads, d = {WIDTH}, to {given.last:,} tokens")
    print(f"{'method':<28} {'us/token':>9} {'old/young':>15} {'slope per 100k':>18} {'bytes, first and last':>24}")
    for name, (_, old) in states.items():
        ratio, ratio_half = late(ratios[name])
        share, half = slope(lengths, ratios[name])
        cost = f"{statistics.median(costs[name]):9.0f}  {ratio:6.3f} +-{ratio_half:.3f}  {share:+7.3f} +-{half:.3f}"
        print(f"{name:<28} {cost}   {first[name]:>11,} {old.nbytes:>11,}")
    if given.out:
        given.out.write_text(page(lengths, ratios), encoding="utf-8")
    return 0


PAGE = """{% from "chart.html" import figure %}<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>kvfloor: what a token costs</title>{% include "style.html" %}</head>
<body><main><h1>What a token costs, from the first thousand to the last</h1>
{% for chart in figures %}{{ figure(chart) }}{% endfor %}</main></body></html>
"""

if __name__ == "__main__":
    sys.exit(main())
