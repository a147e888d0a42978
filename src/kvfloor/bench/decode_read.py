"""Time the read of one decode step against a plain read of the same keys and values, and against torch's attention."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from kvfloor.bench.records import BenchRow
from kvfloor.bench.request import BenchRequest, Found, dtype_name
from kvfloor.bench.targets import judged
from kvfloor.bench.timing import interleaved
from kvfloor.bench.vllm_read import paged_read
from kvfloor.core.attend import attend
from kvfloor.core.log_masses import log_masses
from kvfloor.core.partial import Partial
from kvfloor.core.spec import Spec
from kvfloor.methods.sketches.subgen import ratio

HEADS, KV_HEADS = 8, 2
COLD = 2**28  # bytes of all copies of the keys and values together, far beyond a processor's caches
PLAIN = "plain read of K and V"
STOCK, FOLDED = "sdpa(enable_gqa)", "sdpa, folded"
WEIGHTED, TWO_WEIGHTS = "weighted read", "weights of numerator and denominator"


def read(request: BenchRequest) -> Iterator[Found]:
    """Yield the rows of every dtype, width and context: 8 query heads on 2 kv heads, one new token, batch 1."""
    contexts = (4096, 32768)
    widths = (128,) if request.quick else (64, 128)
    for dtype, width, n in itertools.product((torch.float32, torch.bfloat16), widths, contexts):
        yield from _rows(request, dtype, width, n)


def _rows(request: BenchRequest, dtype: torch.dtype, width: int, n: int) -> Iterator[Found]:
    versions, missing = _versions(dtype, width, n)
    if missing is not None:
        yield missing
    timed = interleaved(versions, request.turns, request.seconds)
    name = dtype_name(dtype)
    large, wide = 2 * KV_HEADS * n * width * dtype.itemsize >= 2**24, width == 128
    more: dict[str, Any] = {
        "part": "read",
        "model": f"{HEADS} heads on {KV_HEADS}, width {width}",
        "context": n,
        "dtype": name,
        "nbytes": 2 * KV_HEADS * n * width * dtype.itemsize,
    }
    for version in versions:
        row = BenchRow.timed(timed, version, baseline=None if version == PLAIN else PLAIN, **more)
        yield judged(row, f"share {name}" if version == WEIGHTED and large and wide else None)
    for version in (FOLDED, WEIGHTED):
        row = BenchRow.timed(timed, version, baseline=STOCK, **more)
        yield judged(row, f"stock {n}" if version == WEIGHTED else None)
    yield judged(BenchRow.timed(timed, TWO_WEIGHTS, baseline=FOLDED, **more), "weights")


def _versions(dtype: torch.dtype, width: int, n: int) -> tuple[dict[str, Callable[[], object]], str | None]:
    """Return the versions, and a line that says why vLLM's kernel is not among them; None if it is.

    Every call takes the next copy of the keys and values, so that they come from memory.
    """
    make = torch.Generator().manual_seed(0)
    q = torch.randn(KV_HEADS, HEADS // KV_HEADS, width, generator=make).to(dtype)
    k, v = (torch.randn(KV_HEADS, n, width, generator=make).to(dtype) for _ in range(2))
    copies = max(2, COLD // (2 * k.nbytes))
    held = [(k.clone(), v.clone()) for _ in range(copies)]
    log_weight = torch.rand(KV_HEADS, n, generator=make)
    scale, spare = width**-0.5, torch.rand(KV_HEADS, n, generator=make)
    spec = Spec(KV_HEADS, width, width, scale, dtype=dtype)

    def on(call: Callable[[Tensor, Tensor], object]) -> Callable[[], object]:
        turn = itertools.cycle(held)
        return lambda: call(*next(turn))

    def plain(k: Tensor, v: Tensor) -> None:
        k.view(torch.float32).sum()  # the same bytes, whatever the dtype, at the speed of memory
        v.view(torch.float32).sum()

    def stock(k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q.reshape(1, HEADS, 1, width), k.unsqueeze(0), v.unsqueeze(0), scale=scale, enable_gqa=True)

    def folded(k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), scale=scale)

    def two_weights(k: Tensor, v: Tensor) -> Partial:
        """Read numerator and denominator as SubGen does: keys and values, then keys alone, under other weights."""
        z = Partial.over(q, k, v, spec, log_weight)
        return ratio(z, log_masses(q, k, scale, log_weight=spare))

    versions = {
        PLAIN: on(plain),
        STOCK: on(stock),
        FOLDED: on(folded),
        WEIGHTED: on(lambda k, v: attend(q, k, v, scale, log_weight=log_weight)),
        TWO_WEIGHTS: on(two_weights),
    }
    kernel, why = paged_read(q, held, scale, stock(k, v))
    if kernel is not None:
        versions["vLLM's CPU kernel"] = kernel
    return versions, why
