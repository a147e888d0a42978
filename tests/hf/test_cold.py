"""A cache with a cold tier decodes what it decodes without one, and keeps its promise about the error or says so."""

from __future__ import annotations

import copy
import errno
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvfloor import BrokenState
from kvfloor.hf import CompressedCache, PromiseBroken, prepare
from kvfloor.methods.tiered.cold_blocks import ColdTierError
from kvfloor.methods.tiered.tiered import Tiered
from tests.hf.conftest import served, tiny

IDS = torch.randint(1, 98, (2, 60), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS)
MASK[0, :7] = 0
PLACES = ("ram", "disk")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return prepare(tiny(num_hidden_layers=2))


def text(cold: str, epsilon: float = 0.001) -> str:
    return f"tiered(epsilon={epsilon},page=8,recent=0,cold={cold})"


def cache_of(model: Any, cold: str, epsilon: float = 0.001, **how: Any) -> CompressedCache:
    return CompressedCache(model, text(cold, epsilon), **how)


@torch.no_grad()
def fed(model: Any, cache: CompressedCache, start: int = 0, stop: int = 40) -> Tensor:
    """Feed these slots of a left-padded batch, and return their logits."""
    return model(IDS[:, start:stop], attention_mask=MASK[:, :stop], past_key_values=cache).logits


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("how", [{}, {"num_beams": 2, "num_return_sequences": 2}])
def test_it_generates_the_same(model: Any, place: str, how: dict[str, int]) -> None:
    def said(cache: CompressedCache) -> Tensor:
        return model.generate(
            IDS[:, :30], attention_mask=MASK[:, :30], past_key_values=cache, max_new_tokens=9, do_sample=False, **how
        )

    assert torch.equal(said(cache_of(model, place, 0.0)), said(CompressedCache(model, "exact")))
    assert torch.equal(said(cache_of(model, place)), said(cache_of(model, "device")))


@pytest.mark.parametrize("place", PLACES)
def test_turns_and_chunks_give_the_same_bits(model: Any, place: str) -> None:
    caches = [cache_of(model, where) for where in ("device", place)]
    for start, stop in ((0, 21), (21, 34), (34, 35), (35, 36), (36, 51), (51, 52)):
        wanted, found = (fed(model, cache, start, stop) for cache in caches)
        assert torch.equal(found, wanted)
    fetched = [[entry["certified"]["tokens_fetched"] for entry in cache.report()] for cache in caches]
    assert fetched[0] == fetched[1] and min(fetched[0]) > 0


@pytest.mark.parametrize("place", PLACES)
def test_copies_and_files_go_on_to_the_bit(model: Any, place: str, tmp_path: Path) -> None:
    cache = cache_of(model, place, max_error=0.01)
    fed(model, cache)
    cache.save(tmp_path / "cache")
    saved = (tmp_path / "cache").read_bytes()
    assert str(tmp_path).encode() not in saved
    twins = [
        CompressedCache.load(tmp_path / "cache", model),
        CompressedCache.load(tmp_path / "cache", model, method=parsed(place, tmp_path)),
        copy.deepcopy(cache),
        pickle.loads(pickle.dumps(cache)),
    ]
    stores = {id(one.compressed[0].state.slots.cold) for one in (cache, *twins)}  # type: ignore[union-attr]
    assert len(stores) == len(twins)  # deepcopy alone shares its past
    wanted = fed(model, cache, 40, 60)
    assert all(torch.equal(fed(model, twin, 40, 60), wanted) for twin in twins)
    assert twins[0].arguments == cache.arguments and twins[0].arguments["max_error"] == 0.01
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def parsed(place: str, folder: Path) -> Tiered:
    return Tiered(epsilon=0.001, page=8, recent=0, cold=place, folder=str(folder) if place == "disk" else None)


def test_reset_closes_the_files(model: Any) -> None:
    before = len(os.listdir("/proc/self/fd"))
    cache = cache_of(model, "disk")
    fed(model, cache)
    assert len(os.listdir("/proc/self/fd")) == before + 2
    cache.reset()
    assert len(os.listdir("/proc/self/fd")) == before
    fed(model, cache)
    del cache
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("place", PLACES)
def test_layers_that_lend_their_keys_give_the_same_bits(place: str) -> None:
    lender = prepare(served("gemma3n_text"))
    caches = [CompressedCache(lender.config, text(where)) for where in ("device", place)]
    for start, stop in ((0, 30), (30, 31), (31, 47)):
        wanted, found = (fed(lender, cache, start, stop) for cache in caches)
        assert torch.equal(found, wanted)


def test_dropped_slots_are_attended_to_no_more(model: Any) -> None:
    caches = [cache_of(model, where) for where in ("device", *PLACES)]
    said = []
    for cache in caches:
        fed(model, cache)
        mask = MASK.clone()
        mask[1, 3:9] = 0
        with torch.no_grad():
            said.append(model(IDS[:, 40:], attention_mask=mask, past_key_values=cache).logits)
    assert torch.equal(said[0], said[1]) and torch.equal(said[0], said[2])


@pytest.mark.parametrize("place", PLACES)
def test_bytes_are_told_hot_and_cold(model: Any, place: str) -> None:
    cache, device, exact = cache_of(model, place), cache_of(model, "device"), CompressedCache(model, "exact")
    for one in (cache, device, exact):
        fed(model, one)
    told, entries = cache.bytes, cache.report()
    assert told["hot"] == cache.nbytes == sum(entry["state_bytes"] for entry in entries) < device.nbytes
    assert told["cold"] == sum(entry["certified"]["cold_bytes"] for entry in entries) > 0 == device.bytes["cold"]
    assert told["total"] == sum(told[name] for name in ("hot", "cold", "staged", "stock", "masks"))
    for entry in entries:
        one = entry["certified"]
        assert one["hot_bytes"] == entry["state_bytes"]
        assert one["queries"] == sum(entry["tokens"]) and 0 < one["unfetched"] < one["queries"]
        assert one["bytes_fetched"] == one["tokens_fetched"] * 2 * 16 * 4 > 0 < one["cold_bytes_read"]
        assert 0 < one["largest_bound"] <= 0.001 * (1 + 1e-5) and one["violations"] == 0 and one["max_error"] is None
    assert exact.report()[0]["certified"] is None


# ---- the promise ---------------------------------------------------------------------------------------------------


def test_fallback_fetches_until_the_promise_holds(model: Any) -> None:
    cache, strict = cache_of(model, "ram", 0.5, max_error=0.001), cache_of(model, "ram", 0.001)
    assert torch.equal(fed(model, cache), fed(model, strict))
    assert str(cache.method) == str(strict.method)
    for entry in cache.report():
        one = entry["certified"]
        assert one["max_error"] == 0.001 and one["violations"] == 0 and one["tokens_fetched"] > 0
    assert str(cache_of(model, "ram", 0.0001, max_error=0.001).method) == text("ram", 0.0001)


def test_flag_goes_on_and_counts_by_layer(model: Any) -> None:
    cache, loose = (cache_of(model, "ram", 0.5, **how) for how in ({"max_error": 0.001, "on_violation": "flag"}, {}))
    assert torch.equal(fed(model, cache), fed(model, loose))
    counts = [entry["certified"]["violations"] for entry in cache.report()]
    found = loose.compressed[0].state.tally  # type: ignore[union-attr]
    assert all(counts) and found.largest > 0.001 and found.broken == 0
    assert counts[0] <= 2 * sum(cache.report()[0]["tokens"])
    before = counts
    fed(model, cache, 40, 60)
    assert all(a < b for a, b in zip(before, (e["certified"]["violations"] for e in cache.report()), strict=True))


def test_a_bound_that_keeps_the_promise_is_no_violation(model: Any) -> None:
    wide = cache_of(model, "ram", 0.5, max_error=0.5, on_violation="raise")
    fed(model, wide)
    assert all(entry["certified"]["violations"] == 0 for entry in wide.report())


def test_a_promise_with_a_delta_says_that_it_is_statistical(model: Any) -> None:
    text = "tiered(epsilon=0.5,page=8,recent=0,keys=6,values=6,delta=0.001)"
    certain, chance = cache_of(model, "ram", 0.5, max_error=0.02), CompressedCache(model, text, max_error=0.02)
    assert str(chance.method) == text.replace("0.5", "0.02", 1).replace("epsilon=0.02,", "")
    for cache in (certain, chance):
        fed(model, cache)
    for always, entry in zip(certain.report(), chance.report(), strict=True):
        assert (always["certified"]["statistical"], always["certified"]["delta"]) == (0, 0.0)
        one = entry["certified"]
        assert one["delta"] == 0.001 and 0 < one["statistical"] <= 2 * sum(entry["tokens"]) and one["violations"] == 0


def test_raise_names_the_layer_and_the_cache_refuses_until_reset(model: Any) -> None:
    cache = cache_of(model, "disk", 0.5, max_error=0.001, on_violation="raise")
    with pytest.raises(PromiseBroken, match=r"layer 0: [0-9]+ answers have a bound above max_error = 0.001"):
        fed(model, cache)
    for again in (lambda: fed(model, cache), lambda: cache.save("nowhere"), cache.seal):
        with pytest.raises(BrokenState, match="layer 0"):
            again()
    cache.reset()
    with pytest.raises(PromiseBroken):
        fed(model, cache)


def test_layers_that_are_exact_promise_too(model: Any) -> None:
    cache = CompressedCache(model, f"layers(exact,{text('ram', 0.5)})", max_error=0.01)
    assert str(cache.method) == f"layers(exact,{text('ram', 0.01)})"
    fed(model, cache)
    assert [entry["certified"] is None for entry in cache.report()] == [True, False]


@pytest.mark.parametrize(
    "method",
    [
        "h2o@32",
        "sinks@16",
        "window+clusters@24",
        "exact:k4v4",
        "exact|pages(pages=2)",
        "quant",
        "layers(2*exact,h2o@9)",
    ],
)
def test_what_bounds_no_error_promises_none(model: Any, method: str) -> None:
    with pytest.raises(ValueError, match=r"max_error needs a method that bounds .* small state of evicted tokens"):
        CompressedCache(model, method, max_error=0.02)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"max_error": -0.1}, "max_error must lie in"),
        ({"max_error": float("nan")}, "max_error must lie in"),
        ({"max_error": float("inf")}, "max_error must lie in"),
        ({"max_error": 0.1, "on_violation": "ignore"}, "fallback, flag, raise, got 'ignore'"),
        ({"on_violation": "raise"}, "give max_error= too"),
    ],
)
def test_impossible_promises_are_refused(model: Any, how: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        cache_of(model, "ram", **how)


# ---- a disk that is full -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 1])
def test_a_full_disk_leaves_the_cache_as_it_was_or_broken(
    model: Any, layer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, twin = cache_of(model, "disk"), cache_of(model, "device")
    assert torch.equal(fed(model, cache), fed(model, twin))
    system, asked = os.posix_fallocate, 0

    def refuse(file: int, offset: int, size: int) -> None:
        nonlocal asked
        asked += 1
        if asked > layer:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        system(file, offset, size)

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", refuse)
        with pytest.raises(ColdTierError, match="No space left"):
            fed(model, cache, 40, 60)
    if layer:
        with pytest.raises(BrokenState, match="broke off"):
            fed(model, cache, 40, 60)
        cache.reset()
        fed(model, cache)
    assert torch.equal(fed(model, cache, 40, 60), fed(model, twin, 40, 60))
