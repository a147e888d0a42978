"""A forward that breaks off leaves a cache as it was, with all tokens in, or one that refuses until it is reset."""

from __future__ import annotations

import _thread
import copy
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvfloor import BrokenState
from kvfloor.check.faults import Faults, Injected
from kvfloor.hf import CompressedCache, passage, prepare
from kvfloor.hf.layer import CompressedLayer
from survey.breaking import broken_forwards, forward_of
from survey.tiny import tiny_model
from tests.hf.conftest import served

METHOD = "h2o(block=4)@16"
IDS = torch.randint(2, 98, (2, 60), generator=torch.Generator().manual_seed(3))
# The first layer is a sliding one; hybrid layers, changed in place after the attention; linear and full in turn;
# layers without keys of their own; latents; convolutions.
QUICK = ("gemma2", "zamba", "lfm2")
MIXED = (
    "llama",
    "gemma3_text",
    "qwen3_next",
    "jamba",
    "falcon_h1",
    "zaya",
    "gemma3n_text",
    "deepseek_v3",
    "kimi_linear",
)
LONG_FORWARDS = {"kimi_linear": 12}
"""Families whose forward is thousands of operations one token after the other -> how many of them are made to fail."""


def started(family: str, method: str = METHOD) -> tuple[Any, CompressedCache]:
    """A model, and a cache with a prompt and three decoded tokens in it."""
    model = prepare(served(family))
    cache, forward = CompressedCache(model.config, method), forward_of(model)
    forward(cache, IDS[:, :19])
    for i in range(19, 22):
        forward(cache, IDS[:, i : i + 1])
    return model, cache


def require_whole(family: str, method: str, most: int | None) -> None:
    model, cache = started(family, method)
    for n in (1, 5):
        tally = broken_forwards(model, cache, IDS[:, 22 : 22 + n], IDS[:, 30:31], most)
        assert not tally.silent, (n, tally.silent[:3])
        assert tally.refused, n
    fresh = broken_forwards(model, CompressedCache(model.config, method), IDS[:, :9], IDS[:, 30:31], most)
    assert not fresh.silent, fresh.silent[:3]


@pytest.mark.parametrize("family", QUICK)
def test_a_forward_that_fails_anywhere_leaves_no_half_filled_cache(family: str) -> None:
    require_whole(family, METHOD, 12)


@pytest.mark.slow
@pytest.mark.parametrize("family", (*QUICK, *MIXED))
def test_it_is_so_for_every_kind_of_layers(family: str) -> None:
    require_whole(family, METHOD, LONG_FORWARDS.get(family, 300))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["exact", "sinks(2,block=4)@16", "subgen_sketch(block=4,s=16)", "quant(group=4)"])
def test_it_is_so_for_every_kind_of_method(method: str) -> None:
    require_whole("gemma2", method, 300)


# ---- generate ----------------------------------------------------------------------------------------------


def generated(model: Any, cache: CompressedCache, ids: Tensor, tokens: int) -> Tensor:
    return model.generate(ids, past_key_values=cache, max_new_tokens=tokens, do_sample=False)


def goes_on(model: Any, cache: CompressedCache, expected: Tensor, ids: Tensor) -> bool:
    """Whether generate goes on from `get_seq_length` with the tokens of an undisturbed run; False if it refuses."""
    held = cache.get_seq_length()
    given = expected[:, : held + 1] if held else ids
    try:
        out = generated(model, cache, given, max(1, expected.shape[1] - given.shape[1]))
    except BrokenState:
        return False
    assert torch.equal(out[:, : expected.shape[1]], expected), f"other tokens after {held}"
    return True


@pytest.mark.parametrize("family", ["gemma2", "lfm2"])
def test_generate_that_fails_goes_on_rightly_or_refuses(family: str) -> None:
    model = prepare(served(family))
    ids, went_on = IDS[:1, :20], 0
    expected = generated(model, CompressedCache(model.config, METHOD), ids, 8)
    cache = CompressedCache(model.config, METHOD)
    with Faults() as faults:  # the cache is made outside, as below: its own operations are not counted
        generated(model, cache, ids, 8)
    draw = random.Random(0)
    for at in (*draw.sample(range(1, faults.done), 14), faults.done - 1):
        cache = CompressedCache(model.config, METHOD)
        with pytest.raises(Injected), Faults(at):
            generated(model, cache, ids, 8)
        went_on += goes_on(model, cache, expected, ids)
        cache.reset()
        assert torch.equal(generated(model, cache, ids, 8), expected)
    assert went_on  # at least after the last operation, where every layer holds its tokens


@contextmanager
def ctrl_c(after: float) -> Iterator[None]:
    """Ctrl-C so many seconds from now, wherever the main thread is then."""
    timer = threading.Timer(after, _thread.interrupt_main)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma2", "zamba"])
def test_ctrl_c_at_any_moment_of_generate(family: str) -> None:
    model = prepare(served(family))
    ids, went_on, refused = IDS[:1, :20], 0, 0
    begin = time.perf_counter()
    expected = generated(model, CompressedCache(model.config, METHOD), ids, 12)
    lasts = time.perf_counter() - begin
    draw = random.Random(1)
    for _ in range(60):
        cache = CompressedCache(model.config, METHOD)
        try:
            with ctrl_c(draw.uniform(0.02, 0.95) * lasts):
                generated(model, cache, ids, 12)
            time.sleep(0)  # an interrupt that came at the very end
        except KeyboardInterrupt:
            done = goes_on(model, cache, expected, ids)
            went_on, refused = went_on + done, refused + (not done)
            cache.reset()
            assert torch.equal(generated(model, cache, ids, 12), expected)
    assert refused


# ---- who may fail where ------------------------------------------------------------------------------------


def fails(model: Any, path: str, error: type[BaseException] = MemoryError, before: bool = False) -> Any:
    """A hook by which this module fails, before it runs or after."""

    def fall(*_: Any) -> None:
        raise error("no room")

    module = model.get_submodule(path)
    return module.register_forward_pre_hook(fall) if before else module.register_forward_hook(fall)


@pytest.mark.parametrize("family", ["gemma2", "gemma3n_text"])
@pytest.mark.parametrize("place", ["layers.0", "layers.1.mlp", "layers.2.self_attn"])
@pytest.mark.parametrize("n", [1, 6])
def test_a_forward_that_fails_in_or_after_a_stock_layer_breaks_the_cache(family: str, place: str, n: int) -> None:
    """The first layer of these is a sliding one, which no compressed layer would notice."""
    model, cache = started(family)
    hook = fails(model, f"model.{place}")
    with pytest.raises(MemoryError):
        forward_of(model)(cache, IDS[:, 22 : 22 + n])
    hook.remove()
    for _ in range(2):
        with pytest.raises(BrokenState, match=r"the last forward broke off .*layer \d does not.*reset\(\)"):
            forward_of(model)(cache, IDS[:, 22 : 22 + n])


def test_before_the_first_layer_nothing_has_moved() -> None:
    model, cache = started("gemma2")
    expected = forward_of(model)(copy.deepcopy(cache), IDS[:, 22:25])
    for path, before in (("model.embed_tokens", False), ("model.layers.0.self_attn.q_proj", True)):
        hook = fails(model, path, KeyboardInterrupt, before)
        with pytest.raises(KeyboardInterrupt):
            forward_of(model)(cache, IDS[:, 22:25])
        hook.remove()
    assert torch.equal(forward_of(model)(cache, IDS[:, 22:25]), expected)


def test_after_the_last_layer_all_tokens_are_in_and_the_length_says_so() -> None:
    model, cache = started("gemma2")
    twin = copy.deepcopy(cache)
    forward_of(model)(twin, IDS[:, 22:25])
    hook = fails(model, "lm_head")
    with pytest.raises(MemoryError):
        forward_of(model)(cache, IDS[:, 22:25])
    hook.remove()
    assert cache.get_seq_length() == twin.get_seq_length() == 25
    assert torch.equal(forward_of(model)(cache, IDS[:, 25:26]), forward_of(model)(twin, IDS[:, 25:26]))


def test_a_listener_that_raises_breaks_the_cache() -> None:
    model, cache = started("gemma2")

    def fail(eviction: Any) -> None:
        raise ValueError("a listener's mistake")

    cache.call_on_evict(fail)
    with pytest.raises(ValueError, match="a listener's mistake"):
        forward_of(model)(cache, IDS[:, 22:30])
    with pytest.raises(BrokenState):
        forward_of(model)(cache, IDS[:, 22:30])


def test_what_the_first_layer_refuses_leaves_the_cache_as_it_was() -> None:
    model = prepare(tiny_model("llama"))
    cache, forward = CompressedCache(model.config, METHOD), forward_of(model)
    with pytest.raises(ValueError, match="4-d"), torch.no_grad():
        model(IDS[:, :5], attention_mask=torch.ones(2, 1, 5, 5, dtype=torch.bool), past_key_values=cache)
    with pytest.raises(ValueError, match="request ids"):
        forward(CompressedCache(model.config, METHOD, requests=[1]), IDS[:, :5])
    one = CompressedCache(model.config, METHOD)
    assert torch.equal(forward(cache, IDS[:1, :5]), forward(one, IDS[:1, :5])), "another batch may follow"


@pytest.mark.parametrize("change", ["reorder_cache", "batch_select_indices"])
def test_layers_that_were_reordered_in_part_break_the_cache(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, cache = started("llama")
    whole: Callable[..., None] = CompressedLayer.batch_select_indices

    def fail(self: CompressedLayer, indices: Tensor) -> None:
        if self.index == 2:
            raise MemoryError("no room for the rows")
        whole(self, indices)

    monkeypatch.setattr(CompressedLayer, "batch_select_indices", fail)
    with pytest.raises(MemoryError):
        getattr(cache, change)(torch.tensor([1, 0]))
    with pytest.raises(BrokenState, match=f"{change} broke off"):
        forward_of(model)(cache, IDS[:, 22:23])
    with pytest.raises(BrokenState, match=f"{change} broke off"):
        getattr(cache, change)(torch.tensor([1, 0]))


def test_cropping_is_refused_before_any_layer_is_cropped() -> None:
    model, cache = started("gemma2")
    expected = forward_of(model)(copy.deepcopy(cache), IDS[:, 22:23])
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop(-3)
    assert torch.equal(forward_of(model)(cache, IDS[:, 22:23]), expected)


# ---- whole caches ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gemma2", "zamba", "gemma3n_text", "lfm2"])
def test_reset_gives_a_new_cache_whatever_was_half_done(family: str) -> None:
    model, cache = started(family)
    fresh = CompressedCache(model.config, METHOD)
    expected = [forward_of(model)(fresh, ids) for ids in (IDS[:1, :7], IDS[:1, 7:8])]
    for at in (60, 170, 290):
        broken = copy.deepcopy(cache)
        with pytest.raises(Injected), Faults(at):
            forward_of(model)(broken, IDS[:, 22:23])
        broken.reset()
        assert broken.get_seq_length() == 0 and broken.bytes == CompressedCache(model.config, METHOD).bytes
        for ids, logits in zip((IDS[:1, :7], IDS[:1, 7:8]), expected, strict=True):
            assert torch.equal(forward_of(model)(broken, ids), logits)


@pytest.mark.parametrize("family", ["gemma2", "zamba"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_whole_forward_is_never_taken_for_a_broken_one(family: str, mode: Callable[[], Any], tmp_path: Path) -> None:
    model = prepare(served(family))
    cache = CompressedCache(model.config, METHOD)
    with mode():
        for start, stop in ((0, 20), (20, 21), (21, 22), (22, 31), (31, 32)):
            model(IDS[:, start:stop], past_key_values=cache, use_cache=True)
            cache = copy.deepcopy(cache)
            cache.save(tmp_path / "cache")
            cache.reorder_cache(torch.tensor([1, 0]))
        cache = CompressedCache.load(tmp_path / "cache", model)
        model(IDS[:, 32:33], past_key_values=cache, use_cache=True)
    cache.check_whole()


def test_a_copy_made_in_the_middle_of_a_forward_refuses() -> None:
    model, cache = started("llama")
    copies: list[CompressedCache] = []
    cache.compressed[2].record = lambda *_: copies.append(copy.deepcopy(cache))
    forward_of(model)(cache, IDS[:, 22:23])
    forward_of(model)(cache, IDS[:, 23:24])
    with pytest.raises(BrokenState):
        forward_of(model)(copies[0], IDS[:, 23:24])


def test_a_model_that_was_not_prepared_is_told_so() -> None:
    for family in ("llama", "gemma2"):
        model = tiny_model(family)
        cache = CompressedCache(model.config, METHOD)
        with pytest.raises(RuntimeError, match=r"kvfloor.hf.prepare\(model\)"):
            forward_of(model)(cache, IDS[:, :9])
        prepare(model)
        if family == "gemma2":  # its first layer is transformers' own, and has the tokens
            with pytest.raises(BrokenState):
                forward_of(model)(cache, IDS[:, :9])
        else:
            forward_of(model)(cache, IDS[:, :9])
            assert cache.get_seq_length() == 9


@pytest.mark.parametrize(("family", "blind", "most"), [("zamba", (), 60), ("gemma2", ("_fault",), 25)])
def test_a_mutant_that_compares_nothing_is_found(
    family: str, blind: tuple[str, ...], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passage.Passage, "_half_filled", lambda *_: set())
    for name in blind:
        monkeypatch.setattr(passage.Passage, name, lambda *_: None)
    # Layers that differ in length give transformers 5.2 a mask of a wrong one, which is an error of its own.
    with pytest.raises((AssertionError, ValueError), match=r"other logits|the attention mask has \d+ slots"):
        require_whole(family, METHOD, most)
