"""Time a prompt through one layer's attention: states that stream it, the exact state, and causal sdpa over all."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from kvfloor.bench.records import BenchRow
from kvfloor.bench.request import BenchRequest, Found, threads
from kvfloor.bench.targets import judged
from kvfloor.bench.timing import interleaved
from kvfloor.core.spec import Spec
from kvfloor.methods.grammar import parse

ROWS, GROUP, WIDTH, BUDGET = 4, 4, 64, 1024
LONG = 32_768
STOCK = "causal sdpa"
STREAMED = (f"sinks(4)@{BUDGET}", f"h2o(recent=64)@{BUDGET}")
BLOCKS = f"sinks(4,block=128)@{BUDGET}"


def prompt(request: BenchRequest) -> Iterator[Found]:
    """Yield the rows of a prompt of 4 kv heads of width 64 with groups of 4, in float32.

    4,096 tokens in a quick run, 32,768 in a full one.
    """
    with threads(request.threads or torch.get_num_threads()):
        yield from _rows(request, 4096 if request.quick else LONG)


def _rows(request: BenchRequest, n: int) -> Iterator[BenchRow]:
    source = torch.Generator().manual_seed(0)
    q = torch.randn(ROWS, GROUP, n, WIDTH, generator=source)
    k, v = (torch.randn(ROWS, n, WIDTH, generator=source) for _ in range(2))
    by_head = (q.reshape(1, ROWS * GROUP, n, WIDTH), k.unsqueeze(0), v.unsqueeze(0))
    spec = Spec(ROWS, WIDTH, WIDTH, WIDTH**-0.5)
    held: dict[str, tuple[int, float]] = {}

    def stream(method: str) -> None:
        state = parse(method).open(spec)
        state.step(q, k, v)
        held[method] = state.nbytes, state.peak_nbytes / state.nbytes

    runs: dict[str, Callable[[], object]] = {STOCK: lambda: sdpa(*by_head, is_causal=True, enable_gqa=True)}
    for method in (*STREAMED, BLOCKS, "exact"):
        runs[method] = lambda method=method: stream(method)
    timed = interleaved(runs, request.turns, request.seconds)
    for name in runs:
        nbytes, peak = held.get(name, (k.nbytes + v.nbytes, None))
        row = BenchRow.timed(
            timed,
            name,
            baseline=None if name == STOCK else STOCK,
            part="prefill",
            model=f"one layer: {ROWS} kv heads, group {GROUP}, width {WIDTH}",
            context=n,
            dtype="float32",
            nbytes=nbytes,
            peak=peak,
        )
        key = "dense" if name == "exact" else "streamed" if name in STREAMED else None
        yield judged(row, key if n == LONG else None)
        if name in STREAMED and n == LONG:
            yield judged(row, "peak")
