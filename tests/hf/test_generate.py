"""What generate() does with a cache: beams, samples, turns, chunks, padding, number formats, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from kvfloor.hf import CompressedCache, prepare
from tests.hf.conftest import Prompt, tiny

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12}


@pytest.mark.parametrize("method", ["h2o@24", "random@24", "window(block=1)+value_sum@24", "quant(bits=4)"])
def test_beams_of_a_padded_row_are_those_of_the_row_alone(
    prepared: PreTrainedModel, prompt: Prompt, method: str
) -> None:
    def cache() -> CompressedCache:
        return CompressedCache(prepared.config, method)

    both = prepared.generate(**prompt, **GREEDY, num_beams=3, past_key_values=cache())
    only = prepared.generate(prompt["input_ids"][:1, 20:], **GREEDY, num_beams=3, past_key_values=cache())
    assert torch.equal(both[0, 70:], only[0, 50:])


def test_beams_and_samples_are_stock_ones_where_nothing_is_dropped(llama: PreTrainedModel, prompt: Prompt) -> None:
    def said(**how: Any) -> list[torch.Tensor]:
        torch.manual_seed(4)
        beams = llama.generate(**prompt, **GREEDY, num_beams=3, num_return_sequences=2, **how)
        torch.manual_seed(4)
        samples = llama.generate(**prompt, do_sample=True, max_new_tokens=8, num_return_sequences=3, **how)
        return [beams, samples]

    stock = said()
    prepare(llama)
    beams, samples = (
        llama.generate(**prompt, **how, past_key_values=CompressedCache(llama.config, "exact"))
        for how in ({**GREEDY, "num_beams": 3, "num_return_sequences": 2}, {**GREEDY, "num_return_sequences": 1})
    )
    assert torch.equal(beams, stock[0]) and samples.shape == (2, 82)
    torch.manual_seed(4)
    cache = CompressedCache(llama.config, "exact")
    again = llama.generate(**prompt, do_sample=True, max_new_tokens=8, num_return_sequences=3, past_key_values=cache)
    assert torch.equal(again, stock[1])


@pytest.mark.parametrize("method", ["sinks(4,block=8)@24", "random(block=8)@24", "window(block=1)+value_sum@24"])
def test_turns_are_one_stream(prepared: PreTrainedModel, prompt: Prompt, method: str) -> None:
    """Three turns of a chat, each given as the full ids so far, hold what one feed of the same tokens holds."""
    cache, ids = CompressedCache(prepared.config, method), prompt["input_ids"][1:]
    for turn in range(3):
        ids = prepared.generate(ids, do_sample=False, max_new_tokens=8, min_new_tokens=8, past_key_values=cache)
        more = torch.randint(2, 98, (1, 9), generator=torch.Generator().manual_seed(turn))
        ids = torch.cat([ids, more], 1)
    whole = CompressedCache(prepared.config, method)
    seen = cache.get_seq_length()
    with torch.no_grad():
        prepared(ids[:, :seen], past_key_values=whole)
        logits = [prepared(ids[:, seen:], past_key_values=c).logits for c in (cache, whole)]
    assert [entry["held"] for entry in cache.report()] == [entry["held"] for entry in whole.report()]
    for one, other in zip(cache.compressed, whole.compressed, strict=True):
        assert torch.equal(one.state.slots.position, other.state.slots.position)  # type: ignore[union-attr]
    torch.testing.assert_close(logits[0], logits[1], atol=2e-5, rtol=1e-4)


def test_pads_on_the_right_never_enter_and_the_row_goes_on(prepared: PreTrainedModel, prompt: Prompt) -> None:
    """A batch padded on the right, decoded with the positions of the real tokens: as the short row alone."""
    ids = prompt["input_ids"].clone()
    mask = torch.ones_like(ids)
    mask[0, 50:] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    both, alone = (CompressedCache(prepared.config, "h2o(block=8)@24") for _ in range(2))
    with torch.no_grad():
        prepared(ids, attention_mask=mask, position_ids=positions, past_key_values=both)
        prepared(ids[:1, :50], past_key_values=alone)
        for step in range(4):
            mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.int64)], 1)
            token = torch.tensor([[5 + step], [6 + step]])
            at = torch.tensor([[50 + step], [70 + step]])
            together = prepared(token, attention_mask=mask, position_ids=at, past_key_values=both).logits
            single = prepared(token[:1], past_key_values=alone).logits
            torch.testing.assert_close(together[:1], single, atol=2e-5, rtol=1e-4)
    assert both.report()[0]["tokens"] == [54, 54, 74, 74]
    assert both.report()[0]["held"][:2] == alone.report()[0]["held"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_stock_within_its_rounding(prompt: Prompt, dtype: torch.dtype) -> None:
    model = tiny().to(dtype)
    stock = model(**prompt).logits
    prepare(model)
    cache = CompressedCache(model.config, "exact")
    ours = model(**prompt, past_key_values=cache).logits
    real = prompt["attention_mask"].bool()
    torch.testing.assert_close(ours[real], stock[real], atol=8 * torch.finfo(dtype).eps, rtol=0)
    small = CompressedCache(model.config, "h2o@24")
    model.generate(**prompt, **GREEDY, past_key_values=small)
    wide = CompressedCache(tiny().config, "h2o@24")
    prepare(tiny()).generate(**prompt, **GREEDY, past_key_values=wide)
    assert small.nbytes < wide.nbytes


def test_short_and_unusual_prompts(prepared: PreTrainedModel, prompt: Prompt) -> None:
    one = prompt["input_ids"][:1, :1]
    for asked in ({"inputs": one}, {}, {"inputs_embeds": prepared.get_input_embeddings()(prompt["input_ids"][:1])}):
        stock = prepared.generate(**asked, **GREEDY)
        ours = prepared.generate(**asked, **GREEDY, past_key_values=CompressedCache(prepared.config, "exact"))
        assert torch.equal(ours, stock)
    cache = CompressedCache(prepared.config, "h2o@24")
    prepared.generate(one, do_sample=False, max_new_tokens=60, min_new_tokens=60, past_key_values=cache)
    assert max(cache.report()[0]["held"]) <= 24 + 31


def test_generate_prefills_in_chunks_within_the_budget(prepared: PreTrainedModel, prompt: Prompt) -> None:
    ids = prompt["input_ids"][1:]
    stock = prepared.generate(ids, **GREEDY)
    exact = CompressedCache(prepared.config, "exact")
    assert torch.equal(prepared.generate(ids, **GREEDY, prefill_chunk_size=16, past_key_values=exact), stock)
    cache = CompressedCache(prepared.config, "sinks(4,block=8)@24")
    prepared.generate(ids, **GREEDY, prefill_chunk_size=16, past_key_values=cache)
    assert max(cache.report()[0]["held"]) <= 24 + 7
    assert cache.peak_nbytes <= cache.nbytes + 2 * 2 * 16 * 16 * 4  # a chunk's keys and values in one layer


def test_the_rows_of_a_batch_can_be_chosen(prepared: PreTrainedModel, prompt: Prompt) -> None:
    both, alone = (CompressedCache(prepared.config, "h2o(block=8)@24", requests=r) for r in ([0, 1], [1]))
    with torch.no_grad():
        prepared(**prompt, past_key_values=both)
        prepared(prompt["input_ids"][1:], past_key_values=alone)
        both.batch_select_indices(torch.tensor([1]))
        token = torch.tensor([[9]])
        ours = prepared(token, past_key_values=both).logits
        torch.testing.assert_close(ours, prepared(token, past_key_values=alone).logits, atol=2e-5, rtol=1e-4)
        both.batch_repeat_interleave(3)
        assert both.report()[0]["tokens"] == [71] * 6


def test_assisted_decoding_and_prompt_lookup_are_refused(prepared: PreTrainedModel, prompt: Prompt) -> None:
    for how in ({"assistant_model": tiny(num_hidden_layers=1)}, {"prompt_lookup_num_tokens": 3}):
        cache = CompressedCache(prepared.config, "window@24")
        with pytest.raises(ValueError, match="assisted decoding and prompt lookup"):
            prepared.generate(prompt["input_ids"][:1], **GREEDY, **how, past_key_values=cache)


def test_going_backward_is_refused_and_forward_with_gradients_is_not(prepared: PreTrainedModel, prompt: Prompt) -> None:
    loss = prepared(
        **prompt, labels=prompt["input_ids"], past_key_values=CompressedCache(prepared.config, "exact")
    ).loss
    with pytest.raises(RuntimeError, match="no gradient"):
        loss.backward()
    prepared(**prompt, labels=prompt["input_ids"], use_cache=False).loss.backward()
    assert prepared.model.layers[0].self_attn.q_proj.weight.grad is not None


@pytest.mark.slow
def test_a_compiled_model_answers_as_the_plain_one(prompt: Prompt) -> None:
    model = prepare(tiny(num_hidden_layers=1))
    compiled = torch.compile(model, backend="eager")
    caches = [CompressedCache(model.config, "h2o(block=8)@24") for _ in range(2)]
    with torch.no_grad():
        for ids in (prompt["input_ids"], torch.tensor([[7], [8]])):
            plain, ours = (
                f(ids, past_key_values=cache).logits for f, cache in zip((model, compiled), caches, strict=True)
            )
            torch.testing.assert_close(ours, plain, atol=1e-6, rtol=1e-5)
    assert caches[0].report() == caches[1].report()


def test_a_moved_cache_goes_on(prepared: PreTrainedModel, prompt: Prompt) -> None:
    """Here from the CPU to the CPU, by the way that every device takes."""
    moved, still = (CompressedCache(prepared.config, "h2o(block=8)@24") for _ in range(2))
    told: list[int] = []
    moved.call_on_evict(lambda event: told.append(len(event.position)))
    with torch.no_grad():
        for cache in (moved, still):
            prepared(**prompt, past_key_values=cache)
        states, before = [layer.state for layer in moved.compressed], sum(told)
        assert moved.to("cpu") is moved
        assert all(layer.state is old for layer, old in zip(moved.compressed, states, strict=True))
        moved._move("cpu")
        assert all(layer.state is not old for layer, old in zip(moved.compressed, states, strict=True))
        for step in range(10):
            token = torch.tensor([[5 + step], [7]])
            ours, theirs = (prepared(token, past_key_values=cache).logits for cache in (moved, still))
            assert torch.equal(ours, theirs)
    assert sum(told) > before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_cache_follows_its_model_to_the_gpu(prepared: PreTrainedModel, prompt: Prompt) -> None:
    moved, still = (CompressedCache(prepared.config, "h2o(block=8)@24") for _ in range(2))
    token = torch.tensor([[5], [7]])
    with torch.no_grad():
        for cache in (moved, still):
            prepared(**prompt, past_key_values=cache)
        wanted = prepared(token, past_key_values=still).logits
        prepared.to("cuda")
        ours = prepared(token.cuda(), past_key_values=moved.to("cuda")).logits
    torch.testing.assert_close(ours.cpu(), wanted, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("prefill", ["stream", "dense"])
def test_a_prompt_in_one_forward_is_held_as_its_mode_says(
    prepared: PreTrainedModel, prompt: Prompt, prefill: str
) -> None:
    """Dense prefill answers the prompt exactly and takes its bytes for a while; stream never holds more."""
    cache = CompressedCache(prepared.config, f"sinks(4,block=8,prefill={prefill})@24")
    exact = CompressedCache(prepared.config, "exact")
    with torch.no_grad():
        ours, truth = (prepared(**prompt, past_key_values=c).logits[:, -1] for c in (cache, exact))
        cache.seal()
    assert torch.allclose(ours, truth, atol=1e-5) is (prefill == "dense")
    assert (
        cache.report()[0]["held"]
        == [24 + (2 if prefill == "stream" else 0)] * 2 + [24 + (6 if prefill == "stream" else 0)] * 2
    )
    slot = cache.report()[0]["state_bytes"] / (4 * 32)
    if prefill == "dense":
        assert cache.peak_nbytes > 3 * 4 * 70 * slot
    else:
        staged = 2 * 2 * 2 * 70 * 16 * 4
        assert cache.peak_nbytes <= cache.nbytes + staged
