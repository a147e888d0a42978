"""Break a model's forward at a chosen torch operation, and record what the cache does afterwards."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from kvfloor.check.faults import Faults, FaultTally, Injected, operations, spread_out
from kvfloor.core.broken import BrokenState
from kvfloor.hf.cache import CompressedCache

Forward = Callable[[CompressedCache, Tensor], Tensor]


def forward_of(model: Any) -> Forward:
    """Return a function that gives the logits (B, n, vocabulary) of tokens (B, n) that follow a cache's tokens."""

    @torch.no_grad()
    def forward(cache: CompressedCache, ids: Tensor) -> Tensor:
        return model(ids, past_key_values=cache, use_cache=True).logits

    return forward


def broken_forwards(
    model: Any, cache: CompressedCache, ids: Tensor, then: Tensor, most: int | None = None
) -> FaultTally:
    """Break the forward of `ids` (B, n) at each of its operations, or at `most` of them, on copies of `cache`.

    The tally counts three good ends, and lists every other one:
    as before   the same forward, repeated, gives the logits of an undisturbed one
    taken in    `get_seq_length` counts the tokens, and the forward of `then` gives the logits that it gives after an
                undisturbed forward of `ids`
    refused     forwards, `generate`, `save`, `reorder_cache` and `seal` raise BrokenState, and after `reset` the cache
                acts as a new one
    """
    forward, tally = forward_of(model), FaultTally()
    before, twin = cache.get_seq_length(), copy.deepcopy(cache)
    logits, following = forward(twin, ids), forward(twin, then)
    dry = copy.deepcopy(cache)
    first = forward(CompressedCache(model.config, cache.method), then)
    for at in spread_out(operations(lambda: forward(dry, ids)), most):
        trial = copy.deepcopy(cache)
        try:
            with Faults(at):
                forward(trial, ids)
        except Injected as fault:
            taken = trial.get_seq_length() != before
            again, expected = (then, following) if taken else (ids, logits)
            try:
                same = torch.equal(forward(trial, again), expected)
                verdict = ("taken in" if taken else "as before") if same else f"{fault}: other logits, {taken=}"
            except BrokenState:
                answering = [name for name, call in _calls(model, trial, ids).items() if not _refuses(call)]
                trial.reset()
                restored = trial.get_seq_length() == 0 and torch.equal(forward(trial, then), first)
                verdict = f"{fault}: it refuses, but not {answering}" if answering else "refused"
                verdict = verdict if restored else f"{fault}: reset() does not restore it"
            tally.count(verdict)
    return tally


def _calls(model: Any, cache: CompressedCache, ids: Tensor) -> dict[str, Callable[[], object]]:
    def save() -> None:
        with TemporaryDirectory() as folder:
            cache.save(Path(folder) / "cache")

    def generate() -> None:
        whole = torch.ones(ids.shape[0], cache.get_seq_length() + 1, dtype=torch.int64)
        with redirect_stderr(io.StringIO()):
            model.generate(whole, past_key_values=cache, max_new_tokens=1, do_sample=False)

    return {
        "a forward": lambda: forward_of(model)(cache, ids),
        "generate": generate,
        "save": save,
        "reorder_cache": lambda: cache.reorder_cache(torch.arange(ids.shape[0])),
        "seal": cache.seal,
    }


def _refuses(call: Callable[[], object]) -> bool:
    try:
        call()
    except BrokenState:
        return True
    return False
