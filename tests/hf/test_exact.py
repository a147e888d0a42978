"""The exact method gives the stock cache's tokens, whatever the shape of the conversation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from kvfloor.hf import CompressedCache, prepare, restore
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


def test_logits_match_to_rounding(model: PreTrainedModel, prompt: Prompt) -> None:
    real = prompt["attention_mask"].bool()
    with torch.no_grad():
        stock = model(**prompt).logits
        ours = prepare(model)(**prompt, past_key_values=CompressedCache(model.config, "exact")).logits
    assert (stock - ours)[real].abs().max() < 1e-5
