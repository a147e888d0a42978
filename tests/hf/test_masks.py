"""Masks about slots that are already cached: what they hide is attended to no more and is not shown again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache

from kvfloor.hf import CompressedCache, prepare
from survey.tiny import tiny_model
from tests.hf.conftest import Talk, served, tiny

PADS = 4


def spoken(seed: int, *shape: int) -> Tensor:
    return torch.randint(2, 97, shape, generator=torch.Generator().manual_seed(seed))


def padded(n: int, left: int) -> Tensor:
    """The mask of n slots whose first row begins with so many pads."""
    mask = torch.ones(2, n, dtype=torch.int64)
    mask[0, :left] = 0
    return mask


def follow(model: Any, method: str, left: int = 0) -> float:
    """Hide slots of row 0 in two of five turns; the largest difference to a stock cache over its largest logit."""
    mine = Talk(model, CompressedCache(model.config, method))
    theirs = Talk(model, DynamicCache(config=model.config))
    apart = 0.0
    for seed, (n, hide) in enumerate(
        [(20, None), (1, None), (6, (0, slice(15, 19))), (1, None), (1, (0, slice(20, 24))), (5, None), (1, None)]
    ):
        pads = padded(n, left) if seed == 0 else None
        found, right = (talk.hear(spoken(seed, 2, n), pads, hide)[:, -1] for talk in (mine, theirs))
        apart = max(apart, float((found - right).abs().max() / right.abs().max()))
    return apart


FAMILIES = [
    "llama",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "gpt2",
    "gemma3n_text",
    "deepseek_v3",
    "falcon_h1",
    "gpt_oss",
]


@pytest.mark.parametrize("left", [0, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_later_mask_hides_is_attended_to_no_more(family: str, left: int) -> None:
    model = prepare(served(family))
    assert follow(model, "exact", left) < 1e-4
    assert follow(model, "window(block=4)@64", left) < 1e-4  # nothing has left: as exact


@pytest.mark.parametrize("method", ["h2o(block=8)@64", "snapkv(block=4)@64", "exact|top_k(k=64)", "ridge_leverage@64"])
def test_methods_that_keep_whole_tokens_drop_what_is_hidden(method: str) -> None:
    assert follow(prepare(tiny()), method) < 1e-4


def _ends_early(model: Any) -> tuple[Tensor, int]:
    """A prompt of two rows, and a token that row 0 answers among the first five of eight and row 1 does not."""
    for seed in range(1, 50):
        ids = spoken(seed, 2, 12)
        answer = model.generate(ids, max_new_tokens=8, do_sample=False)[:, 12:].tolist()
        end = next((x for x in answer[0][2:5] if x not in answer[1]), None)
        if end is not None:
            return ids, end
    raise AssertionError("no row ends early")


@pytest.mark.parametrize("method", ["exact", "window(block=1)@64", "sinks(2,block=4)@64"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_a_row_that_ended_early_goes_on_as_the_row_alone(family: str, method: str) -> None:
    """generate() pads a row that has ended, and takes the pads in; the next turn's mask hides them."""
    model: Any = prepare(tiny_model(family))
    usual: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    ids, end = _ends_early(model)
    model.generation_config.eos_token_id = end
    turns = [spoken(seed, 2, 5) for seed in (2, 3)]

    def converse(cache: Cache) -> tuple[Tensor, list[Tensor], Tensor]:
        said, mask, logits = ids, torch.ones_like(ids), []
        for turn in (None, *turns):
            if turn is not None:
                said, mask = torch.cat([said, turn], 1), torch.cat([mask, torch.ones_like(turn)], 1)
            start = said.shape[1]
            out = model.generate(said, attention_mask=mask, past_key_values=cache, max_new_tokens=8, **usual)
            said = out.sequences
            new = torch.ones_like(said[:, start:])
            ended = (said[:, start:] == end).cumsum(1) - (said[:, start:] == end).int() > 0
            mask = torch.cat([mask, new.masked_fill(ended, 0)], 1)
            logits.append(torch.stack(out.logits, 1))
        return said, logits, mask

    right, their_logits, mask = converse(DynamicCache(config=model.config))
    assert int((mask == 0).sum()) >= 3
    cache = CompressedCache(model.config, method)
    found, my_logits, _ = converse(cache)
    assert torch.equal(found, right)
    for mine, theirs in zip(my_logits, their_logits, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)
    if family == "gemma3_text":  # its sliding layers are transformers' own, where pads take places in the window
        return
    alone = CompressedCache(model.config, method)
    own = ids[:1]
    for turn in (None, *turns):
        own = own if turn is None else torch.cat([own, turn[:1]], 1)
        own = model.generate(own, attention_mask=torch.ones_like(own), past_key_values=alone, max_new_tokens=8, **usual)
        own = own.sequences
    assert own[0].tolist() == found[0][mask[0].bool()].tolist()


def test_a_mask_that_shows_pads_is_refused_and_changes_nothing() -> None:
    model = prepare(tiny())
    ids, mask = spoken(4, 2, 12), torch.ones(2, 12, dtype=torch.int64)
    mask[0, :PADS] = 0
    cache = CompressedCache(model.config, "exact")
    more, ones = spoken(5, 2, 3), torch.ones(2, 3, dtype=torch.int64)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
        twin = copy.deepcopy(cache)
        with pytest.raises(ValueError, match="slot 0 of row 0 and 3 more"):
            model(more, attention_mask=torch.ones(2, 15, dtype=torch.int64), past_key_values=cache)
        right = model(more, attention_mask=torch.cat([mask, ones], 1), past_key_values=twin).logits
        assert torch.equal(model(more, past_key_values=cache).logits, right)  # no mask says nothing about the past


def test_a_token_that_was_hidden_is_not_shown_again() -> None:
    talk = Talk(prepare(tiny()), CompressedCache(tiny().config, "exact"))
    talk.hear(spoken(0, 2, 9))
    talk.hear(spoken(1, 2, 2), hide=(1, slice(3, 5)))
    talk.hear(spoken(2, 2, 2))
    talk.mask = talk.mask.clone()
    talk.mask[1, 4] = 1
    with pytest.raises(ValueError, match="shows slot 4 of row 1, which an earlier mask hid"):
        talk.hear(spoken(3, 2, 2))


@pytest.mark.parametrize("method", ["subgen_sketch@64", "balance@64", "exact|hip(k=16)"])
def test_what_cannot_be_taken_out_again_is_refused_with_the_next_step(method: str) -> None:
    model = prepare(tiny())
    talk = Talk(model, CompressedCache(model.config, method))
    talk.hear(spoken(0, 2, 9))
    twin = copy.deepcopy(talk.cache)
    mask = talk.mask
    with pytest.raises(ValueError, match="start again with an empty state"):
        talk.hear(spoken(1, 2, 2), hide=(1, slice(3, 5)))
    talk.mask = mask
    other = Talk(model, twin)
    other.mask = mask
    assert torch.equal(talk.hear(spoken(1, 2, 2)), other.hear(spoken(1, 2, 2)))


def test_a_summary_gives_nothing_back_but_what_is_still_held_is_dropped() -> None:
    model = prepare(tiny())
    talk = Talk(model, CompressedCache(model.config, "window(block=4)+value_sum@8"))
    talk.hear(spoken(0, 2, 20))
    talk.hear(spoken(1, 2, 1), hide=(0, slice(18, 20)))
    with pytest.raises(ValueError, match="in the summary of"):
        talk.hear(spoken(2, 2, 1), hide=(0, slice(2, 3)))


def test_what_has_left_may_be_hidden_too() -> None:
    model = prepare(tiny())
    one, other = (Talk(model, CompressedCache(model.config, "window(block=4)@8")) for _ in range(2))
    for talk in (one, other):
        talk.hear(spoken(0, 2, 24))
    with torch.inference_mode():
        hidden = one.hear(spoken(1, 2, 1), hide=(0, slice(0, 9)))[:, -1]
        where = torch.tensor([[15], [24]])
        mask = torch.ones(2, 25, dtype=torch.int64)
        shown = model(spoken(1, 2, 1), attention_mask=mask, position_ids=where, past_key_values=other.cache).logits
    torch.testing.assert_close(hidden, shown[:, -1])


def test_beams_and_saved_caches_take_the_record_along(tmp_path: Path) -> None:
    model = prepare(tiny())
    talk = Talk(model, CompressedCache(model.config, "exact"))
    talk.hear(spoken(0, 2, 12), padded(12, 3))
    talk.hear(spoken(1, 2, 2), hide=(1, slice(4, 6)))
    talk.cache.save(tmp_path / "cache")  # type: ignore[attr-defined]
    loaded = Talk(model, CompressedCache.load(tmp_path / "cache", model))
    turned = Talk(model, copy.deepcopy(talk.cache))
    loaded.mask = talk.mask
    turned.cache.batch_select_indices(torch.tensor([1, 0]))
    turned.mask = talk.mask.flip(0)
    ids = spoken(2, 2, 4)
    right = talk.hear(ids, hide=(0, slice(5, 7)))
    assert torch.equal(loaded.hear(ids, hide=(0, slice(5, 7))), right)
    torch.testing.assert_close(turned.hear(ids.flip(0), hide=(1, slice(5, 7))), right.flip(0))
    turned.cache.batch_repeat_interleave(2)
    assert turned.cache.presence.pads.tolist() == [[2, 0], [2, 1], [2, 2], [3, 0], [3, 1], [3, 2]]  # type: ignore


def test_another_batch_is_told_to_repeat_its_rows() -> None:
    model = prepare(tiny())
    cache = CompressedCache(model.config, "exact")
    with torch.no_grad():
        model(spoken(0, 1, 9), past_key_values=cache)
        with pytest.raises(ValueError, match="batch_repeat_interleave"):
            model(spoken(1, 3, 2), past_key_values=cache)
        cache.batch_repeat_interleave(3)
        assert model(spoken(1, 3, 2), past_key_values=cache).logits.shape[0] == 3
