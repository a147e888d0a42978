"""Mixed precision by torch.autocast: one dtype in the state, answers as near to float32's as the stock cache's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache

from kvfloor.hf import CompressedCache, prepare
from survey.tiny import tiny_model

FAMILIES = [
    "llama",
    "gpt2",
    "olmo2",
    "qwen3",
    "gemma3_text",
    "phi3",
    "mixtral",
    "gpt_oss",
    "deepseek_v3",
    "gemma3n_text",
]
IDS = torch.randint(1, 98, (2, 40), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def heard(
    model: Any, cache: Cache | None, lower: torch.dtype | None = None, cuts: tuple[int, ...] = (30, 9, 1)
) -> Tensor:
    with torch.autocast("cpu", dtype=lower, enabled=lower is not None):
        return torch.cat([model(ids, past_key_values=cache).logits for ids in IDS.split(cuts, 1)], 1).float()


@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_as_near_to_full_precision_as_the_stock_cache(family: str, lower: torch.dtype) -> None:
    model = prepare(tiny_model(family))
    right = heard(model, None, cuts=(40,))
    stock = (heard(model, DynamicCache(config=model.config), lower) - right).abs().mean()
    for method in ("exact", "window@64", "quant(bits=8)"):
        cache = CompressedCache(model.config, method)
        mine = (heard(model, cache, lower) - right).abs().mean()
        assert mine < (1.5 if method != "quant(bits=8)" else 3.0) * stock, method
        for layer in cache.compressed:
            assert layer.state is not None and layer.state.spec.dtype == lower


@pytest.mark.parametrize(
    "method", ["h2o(block=4)@16", "window(block=4)+taylor@16", "subgen_sketch@64", "window+value_sum@16"]
)
def test_a_state_is_computed_in_its_own_precision(method: str) -> None:
    """What it rounds is what comes in: given the same tensors, under autocast or not, it answers the same bits."""
    model = prepare(tiny_model("llama", num_hidden_layers=1))
    draw = torch.Generator().manual_seed(0)
    answers = []
    steps = [[torch.randn(1, heads, n, 16, generator=draw).bfloat16() for heads in (4, 2, 2)] for n in (20, 1, 1, 7)]
    for enabled in (False, True):
        cache, out = CompressedCache(model.config, method), []
        layer = cache.compressed[0]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            for query, key, value in steps:
                staged, values = layer.update(key, value)
                out.append(layer.answer(query, staged, values, None, 0.25, None))
        answers.append(torch.cat(out, 1))
    assert torch.equal(*answers)


def test_the_answer_has_the_dtype_that_stock_attention_gives() -> None:
    model = prepare(tiny_model("llama"))
    kinds: list[torch.dtype] = []
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _module, args: kinds.append(args[0].dtype))
    for cache in (DynamicCache(config=model.config), CompressedCache(model.config, "exact")):
        heard(model, cache, torch.bfloat16)
        heard(model, cache.__class__(model.config, "exact") if isinstance(cache, CompressedCache) else None)
    half = len(kinds) // 2
    assert kinds[:half] == kinds[half:] and set(kinds) == {torch.bfloat16, torch.float32}


def test_a_cache_goes_on_where_nothing_is_lost_and_refuses_to_round() -> None:
    model = prepare(tiny_model("llama"))
    wide, narrow = CompressedCache(model.config, "exact"), CompressedCache(model.config, "exact")
    heard(model, wide)
    heard(model, wide, torch.bfloat16)  # what comes rounded fits
    assert wide.compressed[0].state.spec.dtype == torch.float32  # type: ignore[union-attr]
    heard(model, narrow, torch.bfloat16)
    with pytest.raises(ValueError, match=r"go on under torch\.autocast"):
        heard(model, narrow)
    heard(model, narrow, torch.bfloat16)  # as it was before the refusal
    assert narrow.get_seq_length() == 80


def test_keys_and_values_of_two_dtypes_are_held_without_loss() -> None:
    layer = CompressedCache(tiny_model("llama").config, "exact").compressed[0]
    draw = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, heads, 5, 16, generator=draw) for heads in (4, 2))
    value = torch.randn(1, 2, 5, 16, generator=draw).bfloat16()
    staged, values = layer.update(key, value)
    out = layer.answer(query, staged, values, None, 0.25, None)
    logits = query @ key.repeat_interleave(2, 1).transpose(2, 3) * 0.25
    logits = logits.masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), -torch.inf)
    right = logits.softmax(-1) @ value.float().repeat_interleave(2, 1)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, right.transpose(1, 2))


@pytest.mark.parametrize("part", ["q_proj", "k_proj", "v_proj"])
def test_going_backward_is_refused_whatever_is_trained(part: str) -> None:
    model = prepare(tiny_model("llama")).requires_grad_(False)
    for layer in model.model.layers:
        getattr(layer.self_attn, part).weight.requires_grad_(True)
    model.lm_head.weight.requires_grad_(True)
    loss = model(IDS, past_key_values=CompressedCache(model.config, "exact"), labels=IDS).loss
    with pytest.raises(RuntimeError, match="no gradient: train with a stock cache"):
        loss.backward()


@pytest.mark.parametrize("family, part", [("gpt_oss", "sinks"), ("deepseek_v3", "kv_b_proj.weight")])
def test_so_it_is_where_sinks_or_latent_projections_are_trained(family: str, part: str) -> None:
    model = prepare(tiny_model(family)).requires_grad_(False)
    named = [x for name, x in model.named_parameters() if name.endswith(part)]
    for parameter in named:
        parameter.requires_grad_(True)
    assert named
    loss = model(IDS, past_key_values=CompressedCache(model.config, "exact"), labels=IDS).loss
    with pytest.raises(RuntimeError, match="no gradient: train with a stock cache"):
        loss.backward()
