"""Time one decoded token of a model, cache updates included, with the stock cache and with compressed ones."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from kvfloor.bench import models
from kvfloor.bench.operators import operators
from kvfloor.bench.records import BenchRow
from kvfloor.bench.request import BenchRequest, Found, dtype_name, threads
from kvfloor.bench.targets import judged
from kvfloor.bench.timing import Timed, interleaved
from kvfloor.hf import prepare

BOUNDED = ("sinks(4)@512", "h2o(recent=64)@512")
OURS = ("exact", *BOUNDED)
STOCK, SHORT = "stock", "stock, 128 tokens"
SHORT_TOKENS, LONGEST = 128, 32_000


@dataclass(frozen=True)
class TokenCase:
    """Describe one comparison: a model with one context.

    model, stock, ours  the model's name; the model with transformers' attention, and the prepared one
    context, threads    tokens in every cache; torch's threads
    """

    model: str
    stock: PreTrainedModel
    ours: PreTrainedModel
    context: int
    threads: int

    @property
    def dtype(self) -> str:
        """Return the name of the model's dtype."""
        return dtype_name(self.stock.dtype)


def token(request: BenchRequest) -> Iterator[Found]:
    """Yield the rows of SmolLM2 on one thread and of the random model."""
    if not models.has_numba():
        yield models.LACKS_NUMBA
    if models.has_small():
        stock, ours = models.small(), prepare(models.small())
        for n in (1024, 4096) if request.quick else (1024, 4096, 8192, LONGEST):
            yield from _rows(request, TokenCase(models.SMALL, stock, ours, n, 1))
        del stock, ours
        gc.collect()
    else:
        yield models.LACKS_SMALL
    for dtype in (torch.float32,) if request.quick else (torch.float32, torch.bfloat16):
        stock = models.middle(dtype, 2 * LONGEST)
        ours = prepare(models.middle(dtype, 2 * LONGEST))
        for n in (LONGEST,) if request.quick else (1024, 4096, 16_384, LONGEST):
            case = TokenCase(models.MIDDLE, stock, ours, n, request.threads or torch.get_num_threads())
            yield from _rows(request, case)
        del stock, ours
        gc.collect()


def _rows(request: BenchRequest, case: TokenCase) -> Iterator[Found]:
    """Time every cache on one model and context; yield a row beside stock for each, and the rows of other targets."""
    methods = (*OURS, *(models.CODED if models.has_numba() else ()))
    caches: dict[str, tuple[PreTrainedModel, Cache]] = {
        STOCK: (case.stock, models.filled(case.stock, None, case.context))
    }
    if case.model == models.MIDDLE:
        caches[SHORT] = (case.stock, models.filled(case.stock, None, SHORT_TOKENS))
    caches |= {method: (case.ours, models.filled(case.ours, method, case.context)) for method in methods}
    calls = {name: _one_token(*of) for name, of in caches.items()}
    with threads(case.threads):
        timed = interleaved(calls, request.turns, request.seconds)
        yield from _judged(case, timed, {name: models.held_bytes(cache) for name, (_, cache) in caches.items()})
        if request.profile and case.context in (4096, LONGEST):
            for name, call in calls.items():
                yield from operators(call, model=case.model, name=name, context=case.context, dtype=case.dtype)
    del caches, calls
    gc.collect()


def _judged(case: TokenCase, timed: Timed, nbytes: dict[str, int]) -> Iterator[BenchRow]:
    def row(name: str, baseline: str | None, key: str | None = None) -> BenchRow:
        context = SHORT_TOKENS if name == SHORT else case.context
        made = BenchRow.timed(
            timed,
            name,
            baseline=baseline,
            part="token",
            model=case.model,
            context=context,
            dtype=case.dtype,
            nbytes=nbytes[name],
        )
        return judged(made, key)

    longest, small, single = case.context == LONGEST, case.model == models.SMALL, case.dtype == "float32"
    yield row(STOCK, None)
    if SHORT in timed.ms:
        yield row(SHORT, STOCK)
    if small:
        exact = f"small {case.context}" if case.context in (1024, 4096) else None
        budget = "small budget" if case.context == 4096 else None
    else:
        exact = f"exact {case.dtype}" if longest else None
        budget = "budget stock" if longest and single else None
    yield row("exact", STOCK, exact)
    for method in BOUNDED:
        yield row(method, STOCK, budget)
    for method in models.CODED:
        if method in timed.ms:
            yield row(method, STOCK)
            yield row(method, "exact", _coded_key(case) if method == "exact:k4v4" else None)
    for method in BOUNDED:
        if not small:
            yield row(method, "exact", "budget exact" if longest and single else None)
        if SHORT in timed.ms and longest and single:
            yield row(method, SHORT, "budget short")


def _coded_key(case: TokenCase) -> str | None:
    """Return the key of the target for codes of 4 bits; None where there is none."""
    if case.context <= 8192:
        return "coded short"
    return "coded long" if case.dtype == "bfloat16" and case.context == LONGEST else None


def _one_token(model: PreTrainedModel, cache: Cache) -> Callable[[], object]:
    """Return a call that feeds one token to the model with this cache, which grows by it."""
    one = torch.tensor([[7]])

    def call() -> None:
        with torch.no_grad():
            model(one, past_key_values=cache, use_cache=True)

    return call
