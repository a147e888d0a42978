"""Compressed caches: bounded bytes from the first token, rows alone equal rows in a batch, loud refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from kvfloor.hf import CompressedCache
from kvfloor.hf.decode import Dialogue
from tests.hf.conftest import Prompt

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12}
METHODS = [
    "window@24",
    "sinks(4)@24",
    "h2o@32",
    "random@24",
    "window+value_sum@24",
    "quant(bits=4)",
    "subgen_sketch@64",
]


def held_positions(cache: CompressedCache, item: int) -> list[list[int]]:
    """Sorted positions kept for one batch item, per compressed layer and kv head."""
    kept = []
    for layer in cache.compressed:
        assert layer.state is not None
        slots = layer.state.slots  # type: ignore[attr-defined]
        heads = layer.state.spec.rows // layer.batch
        view = slots.view()
        for row in range(item * heads, (item + 1) * heads):
            kept.append(sorted(view.position[row, : int(slots.held[row])].tolist()))
    return kept


@pytest.mark.parametrize("method", METHODS)
def test_a_padded_row_equals_the_row_alone(prepared: PreTrainedModel, prompt: Prompt, method: str) -> None:
    together = CompressedCache(prepared.config, method, requests=[7, 8])
    both = prepared.generate(**prompt, **GREEDY, past_key_values=together)
    alone = CompressedCache(prepared.config, method, requests=[7])
    only = prepared.generate(prompt["input_ids"][:1, 20:], **GREEDY, past_key_values=alone)
    assert torch.equal(both[0, 70:], only[0, 50:])
    assert held_positions(together, 0) == held_positions(alone, 0)


# Policies that watch attention are left out: a model's own rounding depends on the chunk, which flips near-ties of a
# random model. For equal keys and queries the law holds bit for bit (kvfloor check).
@pytest.mark.parametrize("method", ["window@24", "sinks(4)@24", "random@24", "window+value_sum@24"])
def test_chunked_prefill_keeps_the_same_tokens(prepared: PreTrainedModel, prompt: Prompt, method: str) -> None:
    ids = prompt["input_ids"].tolist()
    caches = [CompressedCache(prepared.config, method) for _ in range(2)]
    said = []
    for cache, chunk in zip(caches, (None, 7), strict=True):
        dialogue = Dialogue.start(prepared, cache, 2)
        dialogue.feed([ids[0][20:], ids[1]], chunk)
        said.append(dialogue.answer(12, stop=None)[0])
    assert said[0] == said[1]
    for item in range(2):
        assert held_positions(caches[0], item) == held_positions(caches[1], item)


def test_bytes_stay_bounded_over_a_long_stream(prepared: PreTrainedModel) -> None:
    cache = CompressedCache(prepared.config, "sinks(4)@64")
    sizes = set()
    with torch.no_grad():
        for start in range(0, 512, 32):
            ids = torch.randint(2, 98, (1, 32), generator=torch.Generator().manual_seed(start))
            prepared(ids, past_key_values=cache)
            sizes.add(cache.nbytes)
            assert all(max(entry["held"]) <= 64 + 31 for entry in cache.report())
    assert len(sizes) == 1
    assert cache.get_seq_length() == 512
    assert cache.peak_nbytes >= cache.nbytes


def test_a_byte_budget_bounds_the_whole_cache(prepared: PreTrainedModel, prompt: Prompt) -> None:
    for method in ("window@128KiB", "h2o@128KiB"):
        cache = CompressedCache(prepared.config, method)
        prepared.generate(**prompt, **GREEDY, past_key_values=cache)
        assert 0.9 * 131072 < cache.nbytes <= 131072


def test_a_share_needs_the_context_and_uses_it(prepared: PreTrainedModel, prompt: Prompt) -> None:
    with pytest.raises(ValueError, match="share of the context"):
        prepared(**prompt, past_key_values=CompressedCache(prepared.config, "window@50%"))
    cache = CompressedCache(prepared.config, "window@50%", context=64)
    prepared(**prompt, past_key_values=cache)
    assert str(cache.compressed[0].state.method) == "window@32"  # type: ignore[union-attr]


def test_dense_prefill_compresses_at_the_first_decoded_token(prepared: PreTrainedModel, prompt: Prompt) -> None:
    cache = CompressedCache(prepared.config, "h2o(prefill=dense)@32")
    with torch.no_grad():
        prepared(**prompt, past_key_values=cache)
        assert cache.report()[0]["held"] == [50, 50, 70, 70]
        mask = torch.cat([prompt["attention_mask"], torch.ones(2, 1, dtype=torch.int64)], 1)
        prepared(torch.tensor([[5], [6]]), attention_mask=mask, past_key_values=cache)
    assert max(cache.report()[0]["held"]) <= 33


def test_what_cannot_be_done_is_refused(prepared: PreTrainedModel, prompt: Prompt) -> None:
    with pytest.raises(TypeError, match="Method or its text"):
        CompressedCache(prepared.config, 512)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one per item"):
        prepared(**prompt, past_key_values=CompressedCache(prepared.config, "window@32", requests=[1]))
    with pytest.raises(ValueError, match="too small"):
        prepared(**prompt, past_key_values=CompressedCache(prepared.config, "sinks(8)@4"))
    mask = torch.zeros(2, 1, 70, 70)
    with pytest.raises(ValueError, match="2-d attention mask"):
        prepared(prompt["input_ids"], attention_mask=mask, past_key_values=CompressedCache(prepared.config, "exact"))


def test_two_caches_on_one_model_do_not_touch(prepared: PreTrainedModel, prompt: Prompt) -> None:
    alone = CompressedCache(prepared.config, "h2o@32")
    with torch.no_grad():
        prepared(prompt["input_ids"][1:], past_key_values=alone)
        a, b = CompressedCache(prepared.config, "h2o@32"), CompressedCache(prepared.config, "window@16")
        for start in range(0, 70, 10):
            prepared(prompt["input_ids"][1:, start : start + 10], past_key_values=a)
            prepared(prompt["input_ids"][:1, start : start + 10], past_key_values=b)
    assert held_positions(a, 0) == held_positions(alone, 0)
