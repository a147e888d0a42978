"""One run of the model serves every cache that compresses at the prompt's end: the cache is as if it had run itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from kvfloor.core.bounded import Bounded
from kvfloor.hf import CompressedCache, prepare
from kvfloor.hf.decode import Dialogue
from kvfloor.hf.intake import Room, SharedPrompt, is_exact_in_the_prompt, record_intake
from kvfloor.methods.grammar import parse
from survey.tiny import tiny_model
from tests.hf.conftest import served

CHUNK = 16
LENGTHS = (83, 50, 70)
DENSE = (
    "snapkv(window=8,block=4)@20",
    "snapkv(decode=evict,block=4)@20",
    "k_center(block=4)@20",
    "keydiff(prefill=dense,block=4)@20",
    "h2o(prefill=dense,block=4)@20",
    "expected(prefill=dense,block=4)@20",
    "raas(page=4,sinks=2,block=4)@20",
    "window(prefill=dense,block=4)+value_sum@20",
)


def contexts(lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    draw = torch.Generator().manual_seed(4)
    return [torch.randint(2, 98, (n,), generator=draw).tolist() for n in lengths]


def opened(model: PreTrainedModel, method: str, batch: int = len(LENGTHS), **more: Any) -> Dialogue:
    return Dialogue.start(model, CompressedCache(model, method, seed=3, **more), batch)


def prompt(model: PreTrainedModel, methods: tuple[str, ...], **more: Any) -> SharedPrompt:
    return SharedPrompt(model, contexts(), CHUNK, [parse(method) for method in methods], **more)


@contextmanager
def counted(model: PreTrainedModel) -> Iterator[list[int]]:
    """Collect the slots of each forward of the model."""
    slots: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda _module, _args, given: slots.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    yield slots
    hook.remove()


def differences(one: Dialogue, other: Dialogue) -> list[str]:
    """Name what differs between two dialogues after the same prompt: contents, bytes, mask, and what follows."""
    caches: list[Any] = [one.cache, other.cache]
    found = []
    for cache in caches:
        cache.seal()
    for a, b in zip(*(cache.compressed for cache in caches), strict=True):
        if not torch.equal(a.state.slots.position, b.state.slots.position):
            found.append(f"kept tokens of layer {a.index}")
        if not torch.equal(a.state.seen, b.state.seen) or a.seen != b.seen:
            found.append(f"clocks of layer {a.index}")
    for name in ("nbytes", "peak_nbytes"):
        if getattr(caches[0], name) != getattr(caches[1], name):
            found.append(name)
    if not torch.equal(one.mask, other.mask) or not torch.equal(caches[0].presence.pads, caches[1].presence.pads):
        found.append("pads")
    rest = contexts((9, 9, 9))
    for (_, mine), (_, theirs) in zip(one.predict(rest), other.predict(rest), strict=True):
        if not torch.allclose(mine, theirs, atol=2e-5):
            found.append("predictions")
    return found


@pytest.mark.parametrize("method", DENSE)
def test_a_cache_filled_from_the_record_is_as_if_it_had_run_the_model(prepared: PreTrainedModel, method: str) -> None:
    shared = prompt(prepared, (method,))
    exact, mine, own = (opened(prepared, text) for text in ("exact", method, method))
    shared.feed(exact)
    with counted(prepared) as forwards:
        shared.feed(mine)
    assert not forwards
    own.feed(contexts(), CHUNK)
    assert differences(mine, own) == []


def test_the_queries_that_decide_are_among_those_given(
    prepared: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mutant: a record that gives no queries at all keeps other tokens."""
    own, mine = opened(prepared, DENSE[0]), opened(prepared, DENSE[0])
    own.feed(contexts(), CHUNK)
    monkeypatch.setattr(Bounded, "prompt_queries", 0)
    prompt(prepared, DENSE).feed(mine)
    assert any("kept" in one for one in differences(mine, own))


def test_the_model_runs_once_for_all_such_methods(prepared: PreTrainedModel) -> None:
    """Exact, once recorded, is measured like any method; one that evicts on the way needs a run of its own."""
    shared = prompt(prepared, DENSE)
    dialogues = [opened(prepared, method) for method in (*DENSE, "exact", "h2o(block=4)@20")]
    with counted(prepared) as forwards:
        for dialogue in dialogues:
            shared.feed(dialogue)
    assert sum(forwards) == 3 * max(LENGTHS)


def test_exact_records_on_its_way_but_only_for_somebody(prepared: PreTrainedModel) -> None:
    for methods, runs in ((("h2o@20",), 2), (("h2o@20", DENSE[0]), 1)):
        shared = prompt(prepared, methods)
        with counted(prepared) as forwards:
            shared.feed(opened(prepared, "exact"))
            shared.feed(opened(prepared, DENSE[0]))
        assert sum(forwards) == runs * max(LENGTHS)


def test_a_record_too_large_is_not_kept(prepared: PreTrainedModel) -> None:
    room = Room(left=10_000)
    shared, own = prompt(prepared, DENSE, room=room), opened(prepared, DENSE[0])
    mine = opened(prepared, DENSE[0])
    shared.feed(opened(prepared, "exact"))
    shared.feed(mine)
    own.feed(contexts(), CHUNK)
    assert differences(mine, own) == [] and room.left == 10_000


def test_prompts_share_room(prepared: PreTrainedModel) -> None:
    """Of two prompts with room for one record, the second is run through the model for each method."""
    needed = Room()
    prompt(prepared, DENSE[:2], room=needed).feed(opened(prepared, "exact"))
    room = Room(left=2 * (Room().left - needed.left) - 1)
    for runs in (0, 1):
        shared = prompt(prepared, DENSE[:2], room=room)
        shared.feed(opened(prepared, "exact"))
        dialogue = opened(prepared, DENSE[0])
        with counted(prepared) as forwards:
            shared.feed(dialogue)
        assert sum(forwards) == runs * max(LENGTHS)


@pytest.mark.parametrize("family", ["gemma2", "gemma3n_text", "deepseek_v3", "lfm2", "gpt_oss"])
def test_other_families_get_a_record_or_run(family: str) -> None:
    """Sliding layers, shared keys, latent attention, convolutions, and a sink's logit."""
    served(family)
    model = prepare(tiny_model(family))
    shared = prompt(model, (DENSE[0],))
    mine, own = opened(model, DENSE[0]), opened(model, DENSE[0])
    shared.feed(mine)
    own.feed(contexts(), CHUNK)
    assert differences(mine, own) == []


@pytest.mark.parametrize(
    ("method", "more", "told"),
    [("h2o@20", {}, "keeps all of it"), (DENSE[0], {"positions": "cache"}, "rotated")],
)
def test_a_cache_that_cannot_be_filled_is_refused(
    prepared: PreTrainedModel, method: str, more: dict[str, Any], told: str
) -> None:
    record = record_intake(opened(prepared, "exact"), contexts(), CHUNK, Room())
    assert record is not None
    with pytest.raises(ValueError, match=told):
        record.give(opened(prepared, method, **more))
    fed = opened(prepared, DENSE[0])
    record.give(fed)
    with pytest.raises(ValueError, match="empty"):
        record.give(fed)


def test_a_method_that_was_not_announced_is_not_given_too_few_queries(prepared: PreTrainedModel) -> None:
    """The record is for SnapKV's newest queries; a dense H2O, which learns from all, is served by the model."""
    shared = prompt(prepared, (DENSE[0],))
    shared.feed(opened(prepared, "exact"))
    mine, own = opened(prepared, "h2o(prefill=dense,block=4)@20"), opened(prepared, "h2o(prefill=dense,block=4)@20")
    shared.feed(mine)
    own.feed(contexts(), CHUNK)
    assert differences(mine, own) == []
    record = record_intake(opened(prepared, "exact"), contexts(), CHUNK, Room(), asked=12)
    assert record is not None
    with pytest.raises(ValueError, match="more queries than the newest 12"):
        record.give(opened(prepared, "h2o(prefill=dense,block=4)@20"))


@pytest.mark.parametrize(
    ("text", "exact"),
    [(text, True) for text in DENSE] + [("exact", False), ("h2o@64", False), ("snapkv|top_k(k=2)@64", False)],
)
def test_only_methods_that_keep_and_read_the_whole_prompt_are_filled(text: str, exact: bool) -> None:
    assert is_exact_in_the_prompt(parse(text)) is exact
