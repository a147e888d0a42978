"""Does a streaming method's token cost the same after 100,000 tokens as after 1,000? `python bench/streaming.py`

Every registered method of constant memory, budget 256, 4 kv heads of width 64 with a GQA group of 2. At 25 lengths from
1,024 to 102,400 tokens each method in turn takes 64 single tokens, two blocks of 32, question and update together.
Shown are its median microseconds per token, the slope of a token's cost over the length by least squares, as a share of
the median per 100,000 tokens with its 95 % interval, and the bytes at the first and the last length. Refuses to print
while the tests of what it times are red. `--out FILE` also writes a page with the curves.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from kvfloor import Method, Spec, State
from kvfloor.registry import TABLE, default_method

ROOT = Path(__file__).resolve().parent.parent
TIMED = ["tests/core", "tests/check"]
BUDGET, ROWS, GROUP, WIDTH = 256, 4, 2, 64
STEPS, FIRST, LAST, MARKS, BULK = 64, 1024, 102_400, 25, 1024


def green() -> bool:
    """Whether the tests of what is timed pass."""
    run = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", *TIMED], cwd=ROOT)
    return run.returncode == 0


def streaming() -> list[Method]:
    """Registered methods whose memory does not grow, each once."""
    methods = {str(method): method for method in (default_method(name, budget=BUDGET) for name in TABLE)}
    return [method for method in methods.values() if method.traits.constant_memory]


def feed(state: State, source: torch.Generator, tokens: int) -> None:
    """Take in so many further normal tokens, in bulk."""
    while tokens > 0:
        part = min(BULK, tokens)
        q = torch.randn(ROWS, GROUP, part, WIDTH, generator=source)
        k, v = (torch.randn(ROWS, part, WIDTH, generator=source) for _ in range(2))
        state.step(q, k, v)
        tokens -= part


def timed(state: State, source: torch.Generator) -> float:
    """Microseconds per token over STEPS single tokens."""
    q = torch.randn(STEPS, ROWS, GROUP, 1, WIDTH, generator=source)
    k, v = (torch.randn(STEPS, ROWS, 1, WIDTH, generator=source) for _ in range(2))
    begin = time.perf_counter()
    for i in range(STEPS):
        state.step(q[i], k[i], v[i])
    return (time.perf_counter() - begin) / STEPS * 1e6


def slope(lengths: list[int], costs: list[float]) -> tuple[float, float]:
    """Least-squares slope as a share of the median cost per 100,000 tokens, and the half-width of its 95 % interval."""
    unit = statistics.median(costs)
    x, y = [n / 1e5 for n in lengths], [cost / unit for cost in costs]
    fit = statistics.linear_regression(x, y)
    rest = [b - fit.slope * a - fit.intercept for a, b in zip(x, y, strict=True)]
    spread = math.sqrt(sum(r * r for r in rest) / (len(x) - 2))
    return fit.slope, 2.07 * spread / math.sqrt((len(x) - 1) * statistics.variance(x))  # Student's t, 23 degrees


def page(lengths: list[int], costs: dict[str, list[float]]) -> str:
    """A figure per method: what a token costs, over the length."""
    from kvfloor.report import plot
    from kvfloor.report.environment import environment

    figures = [
        plot.plot(name, "tokens so far", "Microseconds per token.", [plot.Series(name, points, "s0")])
        for name, points in ((name, list(zip(lengths, series, strict=True))) for name, series in costs.items())
    ]
    return environment().from_string(PAGE).render(figures=figures, frame=plot)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--last", type=int, default=LAST)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if not green():
        print("the tests of what is timed are red: no figures", file=sys.stderr)
        return 1
    torch.set_num_threads(given.threads)
    lengths = [round(FIRST + (given.last - FIRST) * i / (MARKS - 1)) for i in range(MARKS)]
    spec, source = Spec(ROWS, WIDTH, WIDTH, WIDTH**-0.5), torch.Generator().manual_seed(0)
    states = {str(method): method.open(spec) for method in streaming()}
    costs: dict[str, list[float]] = {name: [] for name in states}
    first: dict[str, int] = {}
    for at, n in enumerate(lengths):
        for name, state in states.items():
            feed(state, source, n - STEPS - int(state.seen[0]))
            costs[name].append(timed(state, source))
            first.setdefault(name, state.nbytes)
        print(f"{at + 1} of {MARKS}: {n:,} tokens", file=sys.stderr)
    print(f"torch {torch.__version__}, {given.threads} threads, {ROWS} kv heads, d = {WIDTH}, to {given.last:,} tokens")
    print(f"{'method':<36} {'us/token':>9} {'slope per 100k':>16}   {'bytes at first and last':>24}")
    for name, state in states.items():
        share, half = slope(lengths, costs[name])
        print(
            f"{name:<36} {statistics.median(costs[name]):9.0f} {share:+8.1%} +-{half:5.1%}"
            f"   {first[name]:>11,} {state.nbytes:>12,}"
        )
    if given.out:
        given.out.write_text(page(lengths, costs), encoding="utf-8")
    return 0


PAGE = """{% from "plot.html" import draw with context %}<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>kvfloor: what a token costs</title>{% include "style.html" %}</head>
<body><main><h1>What a token costs, from the first thousand to the last</h1>
{% for figure in figures %}{{ draw(figure, frame) }}{% endfor %}</main></body></html>
"""

if __name__ == "__main__":
    sys.exit(main())
