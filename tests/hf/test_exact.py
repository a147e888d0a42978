"""The exact method gives the stock cache's tokens, whatever the shape of the conversation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from kvfloor.hf import CompressedCache, prepare, restore
from kvfloor.hf.prepare import is_prepared
from tests.hf.conftest import Prompt

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 16}


@pytest.mark.parametrize("chunk", [None, 16])
def test_padded_batch_one_shot_and_chunked(model: PreTrainedModel, prompt: Prompt, chunk: int | None) -> None:
    options = {} if chunk is None else {"prefill_chunk_size": chunk}
    stock = model.generate(**prompt, **GREEDY, **options)
    ours = prepare(model).generate(
        **prompt, **GREEDY, **options, past_key_values=CompressedCache(model.config, "exact")
    )
    assert torch.equal(ours, stock)


def test_second_turn_continues_the_first(model: PreTrainedModel, prompt: Prompt) -> None:
    prepare(model)
    cache = CompressedCache(model.config, "exact")
    first = model.generate(**prompt, **GREEDY, past_key_values=cache)
    more = torch.cat([first, torch.randint(2, 98, (2, 9), generator=torch.Generator().manual_seed(2))], 1)
    mask = torch.cat([prompt["attention_mask"], torch.ones(2, more.shape[1] - 70, dtype=torch.int64)], 1)
    ours = model.generate(more, attention_mask=mask, **GREEDY, past_key_values=cache)
    stock = restore(model).generate(more, attention_mask=mask, **GREEDY)
    assert torch.equal(ours, stock)


def test_beams(model: PreTrainedModel, prompt: Prompt) -> None:
    stock = model.generate(**prompt, **GREEDY, num_beams=3)
    cache = CompressedCache(model.config, "exact")
    ours = prepare(model).generate(**prompt, **GREEDY, num_beams=3, past_key_values=cache)
    assert torch.equal(ours, stock)


def test_one_token_prompt(llama: PreTrainedModel) -> None:
    ids = torch.tensor([[1]])
    stock = llama.generate(ids, **GREEDY)
    ours = prepare(llama).generate(ids, **GREEDY, past_key_values=CompressedCache(llama.config, "exact"))
    assert torch.equal(ours, stock)


def test_logits_match_to_rounding(model: PreTrainedModel, prompt: Prompt) -> None:
    real = prompt["attention_mask"].bool()
    with torch.no_grad():
        stock = model(**prompt).logits
        ours = prepare(model)(**prompt, past_key_values=CompressedCache(model.config, "exact")).logits
    assert (stock - ours)[real].abs().max() < 1e-5


def test_a_prepared_model_is_unchanged_for_stock_caches(model: PreTrainedModel, prompt: Prompt) -> None:
    stock = model.generate(**prompt, **GREEDY)
    prepare(model)
    assert torch.equal(model.generate(**prompt, **GREEDY), stock)
    assert torch.equal(model.generate(**prompt, **GREEDY, past_key_values=DynamicCache(config=model.config)), stock)


def test_restore_selects_the_former_attention(llama: PreTrainedModel) -> None:
    before = llama.config._attn_implementation
    prepare(llama)
    prepare(llama)
    assert is_prepared(llama)
    assert restore(llama).config._attn_implementation == before


def test_a_windows_model_with_nothing_evicted_is_exact(model: PreTrainedModel, prompt: Prompt) -> None:
    stock = model.generate(**prompt, **GREEDY)
    cache = CompressedCache(model.config, "h2o@256")
    assert torch.equal(prepare(model).generate(**prompt, **GREEDY, past_key_values=cache), stock)
