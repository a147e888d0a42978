"""A cache that compacts its finished turns: generate() goes on, in padded batches, over turns, saved and loaded."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from kvfloor import BrokenState
from kvfloor.check.faults import Faults, Injected
from kvfloor.hf import CompressedCache, prepare
from kvfloor.methods.compaction.compact import CompactState
from kvfloor.methods.compaction.weighted import LOG_WEIGHT
from tests.hf.conftest import Prompt, Talk, tiny


def talked(model: PreTrainedModel, prompt: Prompt, method: str = "compact") -> tuple[CompressedCache, Talk]:
    cache = CompressedCache(model, method)
    talk = Talk(model, cache)
    talk.hear(prompt["input_ids"], prompt["attention_mask"])
    return cache, talk


def states(cache: CompressedCache) -> list[CompactState]:
    return [layer.state for layer in cache.compressed]  # type: ignore[misc]


def more(n: int, seed: int = 5) -> torch.Tensor:
    return torch.randint(2, 98, (2, n), generator=torch.Generator().manual_seed(seed))


def test_until_a_span_is_compacted_the_cache_is_exact(model: PreTrainedModel, prompt: Prompt) -> None:
    prepare(model)
    answers = [talked(model, prompt, method)[1].hear(more(9)) for method in ("compact", "exact")]
    assert torch.equal(*answers)


def test_every_layer_and_row_keeps_its_share_and_generate_goes_on(prepared: PreTrainedModel, prompt: Prompt) -> None:
    cache, _ = talked(prepared, prompt)
    before = cache.nbytes
    cache.compact(to=0.1)
    assert cache.nbytes < 0.5 * before
    for entry in cache.report():
        assert entry["tokens"] == [50, 50, 70, 70] and entry["held"] == [5, 5, 7, 7]
    ids = torch.cat([prompt["input_ids"], more(3)], 1)
    mask = torch.cat([prompt["attention_mask"], torch.ones(2, 3, dtype=torch.int64)], 1)
    how: dict[str, Any] = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    told = prepared.generate(ids, attention_mask=mask, past_key_values=cache, **how)
    assert told.shape == (2, 85)
    assert cache.report()[0]["held"] == [19, 19, 21, 21]


def test_the_log_weights_count_in_the_models_answers(prepared: PreTrainedModel, prompt: Prompt) -> None:
    """Half the tokens stay: the fitted ones answer nearer to the exact cache than the same tokens without weights."""
    _, exact = talked(prepared, prompt, "exact")
    cache, talk = talked(prepared, prompt)
    truth = exact.hear(more(9)).log_softmax(-1)
    cache.compact(to=0.5)
    bare = copy.deepcopy(cache)
    for state in states(bare):
        getattr(state.slots.columns, LOG_WEIGHT).zero_()

    def divergence(one: CompressedCache) -> float:
        told = Talk(prepared, one, talk.mask).hear(more(9)).log_softmax(-1)
        return float((truth.exp() * (truth - told)).sum(-1).mean())

    assert divergence(cache) < 0.5 * divergence(bare)


def test_turns_are_compacted_one_after_the_other(prepared: PreTrainedModel, prompt: Prompt) -> None:
    cache, talk = talked(prepared, prompt)
    cache.compact(to=0.1)
    talk.hear(more(40))
    cache.compact((70, 110), to=0.25)  # the second item's newest turn; the first one's has positions from 50 on
    assert cache.report()[0]["held"] == [5 + 20 + 5, 5 + 20 + 5, 17, 17]
    talk.hear(more(1))
    cache.compact()
    assert cache.report()[0]["held"] == [math.ceil(0.05 * 91)] * 2 + [math.ceil(0.05 * 111)] * 2


def test_rows_in_the_batch_are_compacted_as_alone(prepared: PreTrainedModel, prompt: Prompt) -> None:
    cache, talk = talked(prepared, prompt)
    cache.compact(to=0.2)
    both = talk.hear(more(4))
    alone = CompressedCache(prepared, "compact")
    prepared(prompt["input_ids"][:1, 20:], past_key_values=alone)
    alone.compact(to=0.2)
    with torch.inference_mode():
        one = prepared(more(4)[:1], past_key_values=alone).logits
    assert torch.allclose(both[:1], one, atol=1e-4)


def test_a_compacted_cache_is_saved_copied_repeated_and_reset(
    prepared: PreTrainedModel, prompt: Prompt, tmp_path: Path
) -> None:
    cache, talk = talked(prepared, prompt)
    cache.compact((0, 60), to=0.1)
    cache.save(tmp_path / "turn")
    copies = [CompressedCache.load(tmp_path / "turn", prepared), copy.deepcopy(cache)]
    repeated = copy.deepcopy(cache)
    repeated.batch_select_indices(torch.tensor([1, 0]))
    truth = talk.hear(more(4))
    mask = talk.mask[:, :-4]
    for one in copies:
        assert torch.equal(Talk(prepared, one, mask).hear(more(4)), truth)
    swapped = Talk(prepared, repeated, mask[[1, 0]]).hear(more(4)[[1, 0]])
    assert torch.allclose(swapped, truth[[1, 0]], atol=1e-5)
    cache.reset()
    with pytest.raises(ValueError, match="no tokens that could be compacted"):
        cache.compact()


def test_slots_of_a_compacted_span_cannot_be_hidden_later(prepared: PreTrainedModel, prompt: Prompt) -> None:
    cache, talk = talked(prepared, prompt)
    cache.compact((0, 40), to=0.1)
    mask = talk.mask.clone()
    with pytest.raises(ValueError, match="stand for each other"):
        talk.hear(more(2), hide=(1, slice(30, 32)))
    talk.mask = mask
    talk.hear(more(2), hide=(1, slice(60, 62)))
    assert cache.report()[0]["held"] == [4 + 10 + 2] * 2 + [4 + 30 + 2 - 2] * 2


@pytest.mark.parametrize(
    ("span", "to", "said"),
    [
        (None, 0.0, "share of a span's tokens"),
        (None, 1.5, "share of a span's tokens"),
        (None, math.nan, "share of a span's tokens"),
        ((0, 71), 0.1, "within the 70 tokens"),
        ((9, 9), 0.1, "start < stop"),
        (slice(0, 9, 3), 0.1, "start < stop"),
    ],
)
def test_bad_arguments_leave_the_cache_as_it_was(
    prepared: PreTrainedModel, prompt: Prompt, span: Any, to: float, said: str
) -> None:
    cache, _ = talked(prepared, prompt)
    before = [state.to_bytes() for state in states(cache)]
    with pytest.raises(ValueError, match=said):
        cache.compact(span, to)
    assert [state.to_bytes() for state in states(cache)] == before
    cache.check_whole()


def test_other_methods_and_empty_caches_are_refused(prepared: PreTrainedModel, prompt: Prompt) -> None:
    with pytest.raises(ValueError, match=r"h2o\(block=4\)@16 compacts no spans.*\"compact\""):
        talked(prepared, prompt, "h2o(block=4)@16")[0].compact()
    with pytest.raises(ValueError, match="feed a prompt first"):
        CompressedCache(prepared, "compact").compact()
    with pytest.raises(ValueError, match='positions="cache"'):
        CompressedCache(prepared, "compact", positions="cache")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_an_exception_within_leaves_the_cache_as_it_was_or_makes_it_refuse(
    prepared: PreTrainedModel, prompt: Prompt, share: float
) -> None:
    cache, talk = talked(prepared, prompt)
    with Faults() as faults:
        copy.deepcopy(cache).compact(to=0.1)
    broken = copy.deepcopy(cache)
    at = int(faults.done * share)
    with pytest.raises(Injected), Faults(at):
        broken.compact(to=0.1)
    with pytest.raises(BrokenState, match="reset"):
        Talk(prepared, broken, talk.mask).hear(more(2))
    broken.reset()
    Talk(prepared, broken).hear(prompt["input_ids"], prompt["attention_mask"])
    broken.compact(to=0.1)


def test_a_model_given_as_a_configuration_warns_that_the_rotation_is_unknown(prepared: PreTrainedModel) -> None:
    with pytest.warns(UserWarning, match="give the prepared model"):
        CompressedCache(prepared.config, "compact")
    cache = CompressedCache(prepared, "compact")
    prepared(more(9), past_key_values=cache)
    assert all(state.spec.applied is not None for state in states(cache))


def test_other_dtypes_compact_as_well() -> None:
    model = prepare(tiny().bfloat16())
    cache = CompressedCache(model, "compact")
    model(more(80), past_key_values=cache)
    cache.compact(to=0.1)
    with torch.inference_mode():
        assert bool(torch.isfinite(model(more(3), past_key_values=cache).logits).all())
