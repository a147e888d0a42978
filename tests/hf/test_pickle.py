"""Pickled, sent through torch.save or copied, a cache goes on to the bit and shares nothing with the first one."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvfloor import parse
from kvfloor.hf import CompressedCache, prepare
from tests.hf.conftest import served, tiny

IDS = torch.randint(1, 98, (2, 40), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS)
MASK[0, :7] = 0


def through_torch(cache: CompressedCache) -> CompressedCache:
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {"pickle": lambda cache: pickle.loads(pickle.dumps(cache)), "torch": through_torch, "deepcopy": copy.deepcopy}
METHODS = ["exact", "sinks(4,block=8)@16", "h2o(block=4)@16", "random(block=4)@16", "window(block=4)+value_sum@16"]


def filled(model: Any, method: str) -> CompressedCache:
    cache = CompressedCache(model.config, method)
    with torch.no_grad():
        model(IDS, attention_mask=MASK, past_key_values=cache)
    return cache


@torch.no_grad()
def onward(model: Any, cache: CompressedCache) -> Tensor:
    mask, said = MASK, []
    for n in (1, 1, 9, 1):
        mask = torch.cat([mask, torch.ones(2, n, dtype=mask.dtype)], 1)
        said.append(model(IDS[:, :n], attention_mask=mask, past_key_values=cache).logits)
    return torch.cat(said, 1)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", [*METHODS, "quant(bits=4)", "subgen_sketch@64", "balance@64", "exact|hip(k=16)"])
def test_it_goes_on_to_the_bit_and_shares_nothing(way: str, method: str) -> None:
    model = prepare(tiny())
    cache = filled(model, method)
    there = WAYS[way](cache)
    first = onward(model, there)
    assert torch.equal(onward(model, cache), first)
    assert cache.report() == there.report()
    there.reset()
    assert there.nbytes == 0 and cache.nbytes > 0 and cache.get_seq_length() == 52


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["gemma3_text", "falcon_h1", "deepseek_v3", "gemma3n_text"])
def test_so_do_other_layers_beside_it(family: str, way: str) -> None:
    model = prepare(served(family))
    cache = filled(model, "h2o(block=4)@16")
    there = WAYS[way](cache)
    assert torch.equal(onward(model, there), onward(model, cache))


@pytest.mark.parametrize("way", ["pickle", "torch"])
def test_an_empty_one_can_be_sent_and_a_used_one_be_saved_afterwards(way: str, tmp_path: Path) -> None:
    model = prepare(tiny())
    empty = WAYS[way](CompressedCache(model.config, "window(block=4)@16"))
    with torch.no_grad():
        model(IDS, attention_mask=MASK, past_key_values=empty)
    there = WAYS[way](empty)
    with pytest.raises(ValueError, match="after a forward"):
        there.save(tmp_path / "cache")
    onward(model, there)
    there.save(tmp_path / "cache")


def test_what_was_evicted_does_not_travel() -> None:
    model = prepare(tiny())
    cache = filled(model, "window(block=4)@16")
    assert len(pickle.dumps(cache)) < cache.nbytes + 20_000
    grown = filled(model, "exact")
    for layer in grown.compressed:
        layer.state.forget(torch.tensor([0]), torch.tensor([32]))  # type: ignore[union-attr]
        gone = layer.state.slots.k[32]  # type: ignore[union-attr]
        assert gone.any() and gone.numpy().tobytes() not in layer.__getstate__()["state"][1]


def test_in_the_middle_of_a_forward_it_is_refused() -> None:
    model = prepare(tiny())
    cache = CompressedCache(model.config, "exact")
    cache.compressed[0].update(torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16))
    with pytest.raises(ValueError, match="pickle after it"):
        pickle.dumps(cache)


def test_a_copy_tells_who_was_told_and_a_pickled_one_no_one() -> None:
    model = prepare(tiny())
    told: list[int] = []
    cache = CompressedCache(model.config, parse("window(block=4)@16"), on_evict=lambda event: told.append(event.layer))
    with torch.no_grad():
        model(IDS, past_key_values=cache)
        ways: tuple[tuple[str, Callable[[int, int], bool]], ...] = (
            ("deepcopy", lambda before, after: after > before),
            ("pickle", lambda before, after: after == before),
        )
        for way, right in ways:
            before = len(told)
            model(IDS, past_key_values=WAYS[way](cache))
            assert right(before, len(told)), way
