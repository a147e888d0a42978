"""The loop under audits and lm-eval: scores are the model's own, and no chunk ends the prompt early."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from kvfloor.hf import CompressedCache, prepare
from kvfloor.hf.decode import Dialogue
from kvfloor.hf.usage import Usage

CONTEXTS, RESTS = (31, 8, 20), (9, 25, 1)


def texts() -> list[tuple[list[int], list[int]]]:
    draw = torch.Generator().manual_seed(2)

    def some(n: int) -> list[int]:
        return torch.randint(2, 98, (n,), generator=draw).tolist()

    return [(some(n), some(m)) for n, m in zip(CONTEXTS, RESTS, strict=True)]


@pytest.mark.parametrize("chunk", [3, 10, 512])
@pytest.mark.parametrize("method", ["exact", None])
def test_scores_are_the_models_log_probabilities(llama: PreTrainedModel, chunk: int, method: str | None) -> None:
    """The oracle is one plain forward per text, without cache, pads or chunks."""
    pairs, expected = texts(), []
    with torch.no_grad():
        for context, rest in pairs:
            logits = llama(torch.tensor([context + rest])).logits[0, len(context) - 1 : -1]
            log_p = logits.log_softmax(-1)[range(len(rest)), rest]
            expected.append((log_p, logits.argmax(-1) == torch.tensor(rest)))
    prepare(llama)
    cache = CompressedCache(llama.config, method) if method else DynamicCache(config=llama.config)
    dialogue = Dialogue.start(llama, cache, len(pairs))
    dialogue.feed([context for context, _ in pairs], chunk)
    for (log_p, likeliest), (wanted, greedy) in zip(
        dialogue.score([r for _, r in pairs], chunk), expected, strict=True
    ):
        assert torch.allclose(log_p, wanted, atol=2e-5) and torch.equal(likeliest, greedy)


@pytest.mark.parametrize("length", [7, 8, 9, 15])
def test_a_chunk_of_one_token_does_not_end_the_prompt(prepared: PreTrainedModel, length: int) -> None:
    cache = CompressedCache(prepared.config, "window(prefill=dense,block=1)@4")
    dialogue = Dialogue.start(prepared, cache, 1)
    dialogue.feed([list(range(2, 2 + length))], 7)
    assert all(layer.state is not None and not layer.state.sealed for layer in cache.compressed)
    assert {held for layer in cache.report() for held in layer["held"]} == {length}


def test_a_ledger_adds_up_what_caches_took(prepared: PreTrainedModel) -> None:
    usage, caches = Usage(), []
    for n in (40, 60):
        cache = CompressedCache(prepared.config, "sinks(4,block=8)@16")
        Dialogue.start(prepared, cache, 2).feed([[5] * n, [6] * 30])
        usage.record(cache)
        caches.append(cache)
    usage.record(CompressedCache(prepared.config, "exact"))  # served nobody
    token_bytes = 3 * 2 * (16 + 16) * 4  # layers, kv heads, numbers per key and value, float32
    assert usage.totals() == {
        "sequences": 4,
        "most_tokens_seen": 60,
        "most_tokens_held": max(held for cache in caches for layer in cache.report() for held in layer["held"]),
        "state_bytes": sum(cache.nbytes for cache in caches),
        "exact_bytes": (40 + 30 + 60 + 30) * token_bytes,
        "peak_bytes": max(cache.peak_nbytes for cache in caches),
    }


def test_an_answer_that_ended_leaves_nothing_more_in_the_cache(prepared: PreTrainedModel) -> None:
    """In a batch, one item ends early; the next question must find it as if it had been alone."""
    contexts = [[5, 9, 3, 7], [8, 4, 6, 2, 9, 3]]
    whole = Dialogue.start(prepared, CompressedCache(prepared.config, "exact"), 2)
    whole.feed(contexts)
    free, _ = whole.answer(6, None)
    stop = next(token for token in free[0] if token not in free[1])  # ends the first item only
    asks = [[11, 12], [13, 14, 15]]

    def told(rows: list[int]) -> list[list[list[int]]]:
        dialogue = Dialogue.start(prepared, CompressedCache(prepared.config, "exact"), len(rows))
        dialogue.feed([contexts[row] for row in rows])
        first, _ = dialogue.answer(6, stop)
        dialogue.feed([asks[row] for row in rows])
        return [list(pair) for pair in zip(first, dialogue.answer(6, {stop})[0], strict=True)]

    together = told([0, 1])
    assert len(together[0][0]) < 6 == len(together[1][0])
    assert together == told([0]) + told([1])
