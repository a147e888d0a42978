"""Time a prompt with its compression and a token after it beside kvpress, where kvpress is installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from kvfloor.bench import models
from kvfloor.bench.records import BenchRow
from kvfloor.bench.request import BenchRequest, Found, threads
from kvfloor.bench.targets import judged
from kvfloor.bench.timing import interleaved
from kvfloor.hf import CompressedCache, prepare

PROMPT, KEPT = 1024, 512
LACKS_KVPRESS = (
    "kvpress: not installed here; it needs transformers 5.2: make bench-peers makes an environment with both"
)


def beside_kvpress(request: BenchRequest) -> Iterator[Found]:
    """Yield the rows of two eviction rules on the random model: half of 1,024 tokens are kept, float32, one thread."""
    if find_spec("kvpress") is None:
        yield LACKS_KVPRESS
        return
    from kvpress import KnormPress, SnapKVPress  # type: ignore[import-not-found]

    pairs = {
        "knorm(prefill=dense)": lambda: KnormPress(0.5),
        "snapkv(window=32,kernel=5)": lambda: SnapKVPress(0.5, window_size=32, kernel_size=5),
    }
    stock = models.middle(torch.float32, 2 * PROMPT)
    ours = prepare(models.middle(torch.float32, 2 * PROMPT))
    ids = torch.randint(2, 31_999, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    with threads(1), torch.no_grad():
        for method, press in pairs.items():
            yield from _rows(request, f"{method}@{KEPT}", press, stock, ours, ids)


def _rows(
    request: BenchRequest,
    method: str,
    press: Callable[[], Any],
    stock: PreTrainedModel,
    ours: PreTrainedModel,
    ids: torch.Tensor,
) -> Iterator[BenchRow]:
    theirs = press()

    def pressed() -> DynamicCache:
        cache = DynamicCache()
        with theirs(stock):
            stock(ids, past_key_values=cache, logits_to_keep=1)
        return cache

    def compressed() -> CompressedCache:
        cache = CompressedCache(ours.config, method)
        ours(ids, past_key_values=cache, logits_to_keep=1)
        cache.seal()
        return cache

    name = f"kvpress {type(theirs).__name__}"
    more: dict[str, Any] = {
        "part": "kvpress",
        "model": models.MIDDLE,
        "context": PROMPT,
        "dtype": "float32",
    }
    timed = interleaved({name: pressed, method: compressed}, request.turns, request.seconds)
    shown = f"{method}, prompt and compression"
    yield BenchRow.timed(timed, name, shown=f"{name}, prompt and compression", **more)
    yield judged(BenchRow.timed(timed, method, baseline=name, shown=shown, **more), "kvpress prefill")
    their_cache, our_cache, seen = pressed(), compressed(), PROMPT

    def their_token() -> None:
        nonlocal seen
        at = torch.tensor([[seen]])
        seen += 1
        stock(torch.tensor([[7]]), position_ids=at, past_key_values=their_cache)

    def our_token() -> None:
        ours(torch.tensor([[7]]), past_key_values=our_cache)

    timed = interleaved({name: their_token, method: our_token}, request.turns, request.seconds)
    yield BenchRow.timed(timed, name, nbytes=models.held_bytes(their_cache), **more)
    row = BenchRow.timed(timed, method, baseline=name, nbytes=models.held_bytes(our_cache), **more)
    yield judged(row, "kvpress token")
