"""Latent attention: one kept set for all heads, held once, answered as the module itself would have."""

from __future__ import annotations

import contextlib
import gc
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from kvfloor.hf import CompressedCache, latent, prepare
from survey import conversations
from survey.tiny import CHANGES, HEADS, tiny_model

pytest.importorskip("transformers.models.deepseek_v3")
SIZES = CHANGES["deepseek_v3"]
WIDTH = SIZES["kv_lora_rank"] + SIZES["qk_rope_head_dim"]


def attention_of(model: Any) -> Any:
    module = model.model.layers[0].self_attn
    if not hasattr(module, "expand_kv"):
        pytest.skip("this release of transformers caches every head's keys")
    return module


@pytest.fixture
def model() -> Any:
    made = prepare(tiny_model("deepseek_v3"))
    attention_of(made)
    return made


def test_absorbed_queries_ask_latents_what_they_would_ask_the_heads_keys(model: Any) -> None:
    module = attention_of(model.double())
    draw = torch.Generator().manual_seed(0)
    head = SIZES["qk_nope_head_dim"] + SIZES["qk_rope_head_dim"]
    q, c, r = (
        torch.randn(*shape, generator=draw, dtype=torch.float64)
        for shape in ((2, HEADS, 3, head), (2, 1, 7, SIZES["kv_lora_rank"]), (2, 1, 7, SIZES["qk_rope_head_dim"]))
    )
    keys, values = module.expand_kv(c, r)
    asking, asked = latent.absorbed(module, q, c, r)
    logits = q @ keys.transpose(-1, -2)
    torch.testing.assert_close(asking @ asked.transpose(-1, -2), logits)
    weights = logits.softmax(-1)
    answers = latent.values(module, (weights @ asked).transpose(1, 2))
    torch.testing.assert_close(answers, (weights @ values).transpose(1, 2))


def test_one_kept_set_serves_all_heads_and_a_latent_is_held_once(model: Any) -> None:
    stock = tiny_model("deepseek_v3")
    cache = CompressedCache(model.config, "exact")
    conversations.by_forwards(model, cache)
    state = cache.compressed[0].state
    assert state is not None and state.spec.tied and cache.report()[0]["heads"] == 1
    slots = state.slots  # type: ignore[attr-defined]
    assert slots.v is slots.k and slots.k.shape[1] == WIDTH
    theirs = DynamicCache(config=stock.config)
    conversations.by_forwards(stock, theirs)
    latents = sum(x.nbytes for x in (theirs.layers[0].keys, theirs.layers[0].values))
    tokens = theirs.layers[0].keys.shape[2] * theirs.layers[0].keys.shape[0]
    assert latents == tokens * WIDTH * 4
    clocks = 8 * (slots.position.numel() + 64)
    assert state.nbytes <= slots.k.shape[0] * WIDTH * 4 + clocks


EVICTING = ("h2o(recent=8,block=4)@24", "snapkv(window=8,decode=evict,prefill=stream,block=4)@24", "knorm(block=4)@24")


@pytest.mark.parametrize("method", EVICTING)
def test_a_padded_row_is_the_row_alone(model: Any, method: str) -> None:
    ids = torch.randint(2, 90, (2, 40), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :15] = 0
    both, alone = CompressedCache(model.config, method), CompressedCache(model.config, method)
    with torch.no_grad():
        batch = model(
            ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0), past_key_values=both
        ).logits[0, -1]
        single = model(ids[:1, 15:], past_key_values=alone).logits[0, -1]
    torch.testing.assert_close(batch, single, rtol=1e-4, atol=1e-5)
    assert max(both.report()[0]["held"]) < 24 + 4


def test_what_is_no_plain_linear_layer_is_asked(model: Any) -> None:
    class Adapted(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base = base
            self.weight = base.weight  # as adapters show it, without what they add

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * self.base(x)

    stock = tiny_model("deepseek_v3")
    for each in (model, stock):
        for layer in each.model.layers:
            layer.self_attn.kv_b_proj = Adapted(layer.self_attn.kv_b_proj)
    right = conversations.by_forwards(stock, None)
    found = conversations.by_forwards(model, CompressedCache(model.config, "exact"))
    assert conversations.difference(found, right) < 1e-4


def test_a_forward_that_broke_off_leaves_nothing_to_the_next_one(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between `update` and attention: the next forward, with another cache, must not be answered by the first's."""
    module = attention_of(model)
    ids = torch.randint(2, 90, (1, 20), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        right = tiny_model("deepseek_v3")(ids).logits
        with monkeypatch.context() as broken:

            def fall(*_: Any) -> None:
                raise MemoryError("no room for the heads' keys")

            broken.setattr(module, "expand_kv", fall)
            cache = CompressedCache(model.config, "sinks(4,block=1)@8")
            with contextlib.suppress(MemoryError):
                model(ids, past_key_values=cache)
        gc.collect()
        assert cache.compressed[0].staged_bytes
        found = model(ids, past_key_values=DynamicCache(config=model.config)).logits
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)


def test_a_saved_cache_goes_on_to_the_bit(model: Any, tmp_path: Any) -> None:
    ids = torch.randint(2, 90, (1, 30), generator=torch.Generator().manual_seed(3))
    cache = CompressedCache(model.config, "h2o(recent=8,block=4)@16")
    with torch.no_grad():
        model(ids, past_key_values=cache)
        cache.save(tmp_path / "cache")
        restored = CompressedCache.load(tmp_path / "cache", model)
        more = torch.tensor([[7]])
        assert torch.equal(model(more, past_key_values=cache).logits, model(more, past_key_values=restored).logits)
