"""Time single tokens of every method of constant memory, from young states to old ones.

At every length a method steps through 64 single tokens, which are two blocks of 32. A young state of the same method,
of about 1,024 tokens, takes turns with the old one, so that other work on the machine slows both.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from kvfloor.bench.records import BenchRow
from kvfloor.bench.request import BenchRequest, Found, threads
from kvfloor.bench.targets import judged
from kvfloor.bench.timing import Timed, Witness
from kvfloor.core.method import Method
from kvfloor.core.spec import Spec
from kvfloor.core.state import State
from kvfloor.methods.grammar import default_method, parse
from kvfloor.methods.registry import TABLE
from kvfloor.statistics import LEAST_FOR_MEDIAN, student_quantile

BUDGET, ROWS, GROUP, WIDTH = 256, 4, 2, 64
FIRST, STEPS, BULK = 1024, 64, 4096
YOUNG = "young state"
BRIEF = ("sinks@256", "h2o@256", "knorm@256", "window+value_sum@256")
"""Methods of a quick run."""

TO_THE_END = ("sinks@256", "h2o@256")
"""Methods that may take as long as a million tokens take; others stop after ten seconds."""

SUBGEN_ROWS, SUBGEN_TOKENS = 32, 256


def streaming() -> list[Method]:
    """List the registered methods of constant memory, each once, with a budget of 256 tokens."""
    methods = {str(method): method for method in (default_method(name, budget=BUDGET) for name in TABLE)}
    return [method for method in methods.values() if method.traits.constant_memory]


def append(request: BenchRequest) -> Iterator[Found]:
    """Yield every method's rows by length, the row of its slope, and its tail; then SubGen's clusters.

    Lengths double from 1,024 up to 1,048,576 tokens, in a quick run, which takes few methods, to 8,192. A method stops
    earlier after the seconds that it may take; its last row says where.
    """
    doublings, tokens = (3, 0) if request.quick else (10, 10_000)
    with threads(1):
        for method in streaming():
            name = str(method)
            if not request.quick or name in BRIEF:
                seconds = 4.0 if request.quick else 90.0 if name in TO_THE_END else 10.0
                yield from _method_rows(method, doublings, seconds, tokens)
        yield from _subgen_rows(request)


def _method_rows(method: Method, doublings: int, seconds: float, tail_tokens: int) -> Iterator[Found]:
    source, begun = torch.Generator().manual_seed(0), time.perf_counter()
    spec, witness = Spec(ROWS, WIDTH, WIDTH, WIDTH**-0.5), Witness()
    young, old = method.open(spec), method.open(spec)
    feed(young, source, FIRST - STEPS)
    timed(young, old, source)  # uncounted
    rows: list[BenchRow] = []
    for n in (FIRST * 2**i for i in range(doublings + 1)):
        feed(old, source, n - STEPS - int(old.seen[0]))
        costs = [timed(young, old, source) for _ in range(LEAST_FOR_MEDIAN)]
        witness.look()
        young_ms, old_ms = (tuple(cost[i] for cost in costs) for i in range(2))
        found = Timed({YOUNG: young_ms, str(method): old_ms}, 1, witness.share)
        row = BenchRow.timed(found, str(method), baseline=YOUNG, **_fields(old, n))
        rows.append(row)
        yield row
        spent = time.perf_counter() - begun
        if 2 * spent > seconds:  # the next length takes about as long as all before it
            break
    if len(rows) >= 3:
        middle, half = slope([row.context for row in rows], [1 / row.ratio for row in rows if row.ratio])
        last = replace(rows[-1], slope=middle, slope_interval=(middle - half, middle + half))
        last = replace(last, name=f"{method}, slope from {FIRST:,}", baseline=None, ratio=None, ratio_interval=None)
        yield judged(last, "append slope")
    if tail_tokens:
        yield judged(_tail(method, old, source, tail_tokens, witness), "append tail")


def _fields(state: State, n: int) -> dict[str, Any]:
    model = f"one layer: {ROWS} kv heads, group {GROUP}, width {WIDTH}"
    return {"part": "append", "model": model, "context": n, "dtype": "float32", "nbytes": state.nbytes}


def feed(state: State, source: torch.Generator, tokens: int) -> None:
    """Append this many normal tokens, without queries, in large chunks."""
    while tokens > 0:
        part = min(BULK, tokens)
        k, v = (torch.randn(ROWS, part, WIDTH, generator=source) for _ in range(2))
        state.append(k, v)
        tokens -= part


def timed(young: State, old: State, source: torch.Generator) -> tuple[float, float]:
    """Return the milliseconds per token of both states, which take turns over STEPS single tokens."""
    q = torch.randn(STEPS, ROWS, GROUP, 1, WIDTH, generator=source)
    k, v = (torch.randn(STEPS, ROWS, 1, WIDTH, generator=source) for _ in range(2))
    spent = [0.0, 0.0]
    for i in range(STEPS):
        for which in (0, 1) if i % 2 else (1, 0):
            state = (young, old)[which]
            begin = time.perf_counter()
            state.step(q[i], k[i], v[i])
            spent[which] += time.perf_counter() - begin
    return spent[0] / STEPS * 1e3, spent[1] / STEPS * 1e3


def slope(lengths: Sequence[int], costs: Sequence[float]) -> tuple[float, float]:
    """Return the least-squares slope per doubling of the length, and the half-width of its 95 % interval.

    costs: a token's cost at each length, relative to a young state's. At least 3 lengths.
    """
    x = [math.log2(n) for n in lengths]
    fit = statistics.linear_regression(x, costs)
    rest = [y - fit.slope * at - fit.intercept for at, y in zip(x, costs, strict=True)]
    spread = math.sqrt(sum(r * r for r in rest) / (len(x) - 2))
    return fit.slope, student_quantile(0.95, len(x) - 2) * spread / math.sqrt((len(x) - 1) * statistics.variance(x))


def _tail(method: Method, state: State, source: torch.Generator, tokens: int, witness: Witness) -> BenchRow:
    """Return the row of a token's 99.99th percentile over its median, in processor time.

    Processor time leaves out when other work had the processor, which a method cannot help.
    """
    spent: list[float] = []
    while len(spent) < tokens:
        q = torch.randn(STEPS, ROWS, GROUP, 1, WIDTH, generator=source)
        k, v = (torch.randn(STEPS, ROWS, 1, WIDTH, generator=source) for _ in range(2))
        for i in range(STEPS):
            begin = time.thread_time()
            state.step(q[i], k[i], v[i])
            spent.append((time.thread_time() - begin) * 1e3)
    ordered, middle = sorted(spent), statistics.median(spent)
    high = ordered[math.ceil(0.9999 * len(ordered)) - 1]
    return BenchRow(
        name=f"{method}, worst of 10,000",
        threads=1,
        turns=len(spent),
        ms=middle,
        tail=high / middle,
        crowded=Timed({}, 1, witness.share).crowded,
        **_fields(state, int(state.seen[0])),
    )


def _subgen_rows(request: BenchRequest) -> Iterator[BenchRow]:
    """Yield the cost of a token into full clusters: SubGen with 1,024 centres, 32 rows, blocks of 16, 32 and 64."""
    source, spec = torch.Generator().manual_seed(0), Spec(SUBGEN_ROWS, WIDTH, WIDTH, WIDTH**-0.5)
    for block in (64,) if request.quick else (16, 32, 64):
        state = parse(f"subgen_sketch(centres=1024,s=256,block={block})").open(spec)
        k, v = (torch.randn(SUBGEN_ROWS, 2048, WIDTH, generator=source) for _ in range(2))
        state.append(k, v)
        witness, costs = Witness(), []
        for _ in range(max(LEAST_FOR_MEDIAN, min(request.turns, 12)) + 1):
            k, v = (torch.randn(SUBGEN_ROWS, SUBGEN_TOKENS, WIDTH, generator=source) for _ in range(2))
            begin = time.perf_counter()
            state.append(k, v)
            costs.append((time.perf_counter() - begin) * 1e3 / SUBGEN_TOKENS)
        witness.look()
        name = str(state.method)
        row = BenchRow.timed(
            Timed({name: tuple(costs[1:])}, 1, witness.share),
            name,
            part="append",
            model=f"{SUBGEN_ROWS} rows, width {WIDTH}",
            context=int(state.seen[0]),
            dtype="float32",
            nbytes=state.nbytes,
        )
        yield judged(row, "subgen")
