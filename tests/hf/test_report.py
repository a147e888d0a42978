"""What a cache tells about itself: rows' tokens and bytes, evictions as they happen, a forward that broke off."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from kvfloor import BrokenState
from kvfloor.hf import CompressedCache, Eviction, prepare
from kvfloor.methods.grammar import default_method
from kvfloor.methods.registry import TABLE, kind
from tests.hf.conftest import Prompt, tiny

METHODS = sorted(
    name for name, part in TABLE.items() if kind(part) in ("policy", "method", "summary", "selector") and name != "less"
)


@pytest.mark.parametrize("name", METHODS)
def test_the_rows_bytes_are_the_states(prepared: PreTrainedModel, prompt: Prompt, name: str) -> None:
    cache = CompressedCache(prepared.config, default_method(name))
    prepared(**prompt, past_key_values=cache)
    for entry in cache.report():
        assert sum(entry["row_bytes"]) == pytest.approx(entry["state_bytes"], rel=1e-9)
        assert entry["tokens"] == [50, 50, 70, 70]
        assert [t - e for t, e in zip(entry["tokens"], entry["evicted"], strict=True)] == entry["held"]


def test_a_row_with_twice_the_tokens_has_twice_the_bytes(prepared: PreTrainedModel, prompt: Prompt) -> None:
    cache = CompressedCache(prepared.config, "window(block=1)", budgets=[[511, 1023], 64, 64])
    prepared(**prompt, past_key_values=cache)
    small, large = cache.report()[0]["row_bytes"][:2]
    assert large / small == pytest.approx(2, rel=0.01)


def test_evictions_are_told_once_each_with_place_and_position(prepared: PreTrainedModel, prompt: Prompt) -> None:
    told: list[Eviction] = []
    cache = CompressedCache(prepared.config, "h2o(block=4)@24", on_evict=told.append)
    prepared.generate(**prompt, do_sample=False, max_new_tokens=12, past_key_values=cache)
    for layer in cache.compressed:
        state, gone = layer.state, {}
        for event in told:
            if event.layer == layer.index:
                for item, head, position in zip(
                    event.item.tolist(), event.head.tolist(), event.position.tolist(), strict=True
                ):
                    gone.setdefault((item, head), []).append(position)
        view = state.slots.view()  # type: ignore[union-attr]
        for row in range(4):
            kept = view.position[row, : int(state.held[row])].tolist()  # type: ignore[union-attr]
            assert sorted(gone[divmod(row, 2)] + kept) == list(range(int(state.seen[row])))  # type: ignore[union-attr]
    cache.call_on_evict(None)
    before = len(told)
    more, mask = torch.full((2, 140), 7), torch.ones(2, 140, dtype=torch.int64)
    mask[0, :20] = 0  # the prompt's pads
    prepared.generate(more, attention_mask=mask, do_sample=False, max_new_tokens=2, past_key_values=cache)
    assert len(told) == before


def test_a_copy_of_a_state_tells_no_one(prepared: PreTrainedModel, prompt: Prompt) -> None:
    told: list[Eviction] = []
    cache = CompressedCache(prepared.config, "window(block=1)@24", on_evict=told.append)
    prepared(**prompt, past_key_values=cache)
    state = cache.compressed[0].state
    assert state is not None
    copy, before = state.clone(), len(told)
    k, v = torch.zeros(4, 3, 16), torch.zeros(4, 3, 16)
    copy.append(k, v)
    assert len(told) == before
    state.append(k, v)
    assert len(told) == before + 3


def test_the_guarantee_is_evaluated_on_what_was_seen(prepared: PreTrainedModel, prompt: Prompt) -> None:
    cache = CompressedCache(prepared.config, "subgen_sketch(delta=0.01,radius=0.001,s=5000,t=4)")
    prepared(**prompt, past_key_values=cache)
    stated = cache.report()[0]["guarantee"]
    assert stated["holds"] is False and "was asked" in stated["why"] and 0 < stated["epsilon"] < 1
    window = CompressedCache(prepared.config, "window@24")
    prepared(**prompt, past_key_values=window)
    assert window.report()[0]["guarantee"] is None


def test_an_empty_cache_reports_nothing_held(llama: PreTrainedModel) -> None:
    report = CompressedCache(llama.config, "window@24").report()
    assert [entry["layer"] for entry in report] == [0, 1, 2]
    assert all(entry["held"] == [] and entry["state_bytes"] == 0 and entry["seen"] == 0 for entry in report)


def test_bytes_are_told_by_kind(llama: PreTrainedModel, prompt: Prompt) -> None:
    model = tiny(
        "qwen3",
        num_hidden_layers=2,
        layer_types=["full_attention", "sliding_attention"],
        sliding_window=16,
        use_sliding_window=True,
    )
    prepare(model)
    cache = CompressedCache(model.config, "window(block=1)@24")
    model(**prompt, past_key_values=cache)
    told = cache.bytes
    keys_and_values = (
        cache.layers[1].keys.untyped_storage().nbytes() + cache.layers[1].values.untyped_storage().nbytes()
    )  # type: ignore[union-attr]
    assert 0 < keys_and_values <= told["stock"] <= keys_and_values + 64  # and its counters
    assert told["staged"] == 0 and told["hot"] == cache.nbytes == cache.compressed[0].state.nbytes  # type: ignore[union-attr]
    assert told["masks"] == 16 * 20  # the prompt's pads
    assert told["total"] == told["hot"] + told["stock"] + told["masks"]
    staged: dict[str, int] = {}
    cache.compressed[0].record = lambda *_: staged.update(cache.bytes)
    model(torch.full((2, 5), 7), past_key_values=cache)
    assert staged["staged"] == 2 * 2 * 2 * 5 * model.config.head_dim * 4


def test_after_a_forward_that_broke_off_the_cache_says_so(prepared: PreTrainedModel, prompt: dict[str, Any]) -> None:
    cache = CompressedCache(prepared.config, "window@32")
    prepared(**prompt, past_key_values=cache)
    weight = prepared.model.layers[1].self_attn.q_proj.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(float("nan"))
        with pytest.raises(ValueError, match="NaN"):
            prepared(torch.full((2, 1), 7), past_key_values=cache)
        weight.copy_(kept)
        with pytest.raises(BrokenState, match="broke off"):
            prepared(torch.full((2, 1), 7), past_key_values=cache)
        cache.reset()
        prepared(**prompt, past_key_values=cache)
    assert cache.get_seq_length() == 70


def test_a_first_forward_that_never_reached_a_layer_is_told_by_the_next(
    prepared: PreTrainedModel, prompt: dict[str, Any]
) -> None:
    cache = CompressedCache(prepared.config, "window@32")

    def fall(*_: Any) -> None:
        raise MemoryError("no room between the layers")

    hook = prepared.model.layers[0].mlp.register_forward_hook(fall)
    with pytest.raises(MemoryError):
        prepared(**prompt, past_key_values=cache)
    hook.remove()
    assert [layer.state is None for layer in cache.compressed][:2] == [False, True]
    with pytest.raises(BrokenState, match="broke off"):
        prepared(torch.full((2, 1), 7), past_key_values=cache)
    cache.reset()
    prepared(**prompt, past_key_values=cache)
    assert cache.get_seq_length() == 70
