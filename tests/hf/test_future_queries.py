"""Expected attention in a model: statistics of the queries before RoPE, if the cache is given the model."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvfloor.hf import CompressedCache, prepare
from kvfloor.hf.positions import rotations
from tests.hf.conftest import served, tiny

METHOD = "expected(heads=each,sinks=4,block=8,prefill=dense)@24"


def some(n: int, batch: int = 1) -> Tensor:
    return torch.randint(2, 98, (batch, n), generator=torch.Generator().manual_seed(3))


@torch.inference_mode()
def fed(model: Any, cache: CompressedCache, ids: Tensor, **more: Any) -> CompressedCache:
    model(ids, past_key_values=cache, **more)
    cache.seal()
    return cache


def spec_of(cache: CompressedCache, place: int = 0) -> Any:
    state = cache.compressed[place].state
    assert state is not None
    return state.spec


def test_the_statistics_are_those_of_the_queries_before_the_rotation() -> None:
    """Of a padded batch, against what the layers' own projections gave out."""
    model = prepare(tiny("llama").eval())
    heard: list[Tensor] = []
    hooks = [
        layer.self_attn.q_proj.register_forward_hook(lambda module, given, out: heard.append(out.double()))
        for layer in model.model.layers  # pyright: ignore[reportGeneralTypeIssues, reportAttributeAccessIssue]
    ]
    probed = CompressedCache(model, METHOD)
    heard.clear()
    mask = torch.ones(2, 61, dtype=torch.int64)
    mask[1, :13] = 0
    places = (mask.cumsum(1) - 1).clamp_min(0)
    fed(model, probed, some(61, 2), attention_mask=mask, position_ids=places)
    for hook in hooks:
        hook.remove()
    for layer, out in zip(probed.compressed, heard, strict=True):
        state: Any = layer.state
        mean, covariance = state.memory.gaussian(None)
        kv_heads, d = state.spec.rows // 2, state.spec.d
        queries = out.view(2, 61, kv_heads, -1, d)
        for item, pads in ((0, 0), (1, 13)):
            for head in range(kv_heads):
                for i in range(queries.shape[3]):
                    mine = queries[item, pads + 4 :, head, i]
                    row = item * kv_heads + head
                    torch.testing.assert_close(mean[row, i].double(), mine.mean(0), rtol=1e-4, atol=1e-5)
                    wanted = torch.cov(mine.T, correction=0)
                    torch.testing.assert_close(covariance[row, i].double(), wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "glm", "deepseek_v3"])
def test_the_rotation_is_measured_where_a_policy_wants_it(family: str) -> None:
    model, ids = prepare(served(family)), some(40)
    given = fed(model, CompressedCache(model, METHOD), ids)
    assert [spec_of(given, i).applied for i in range(len(given.compressed))] == rotations(model)
    assert spec_of(given).applied is not None and spec_of(given).rotation is None
    assert spec_of(fed(model, CompressedCache(model.config, METHOD), ids)).applied is None
    assert spec_of(fed(model, CompressedCache(model, "h2o(block=8)@24"), ids)).applied is None
    ranked = spec_of(fed(model, CompressedCache(model, METHOD, positions="cache"), ids))
    assert ranked.applied is None and ranked.rotation is not None


def test_leverage_is_that_of_the_keys_before_the_rotation_where_wanted() -> None:
    """Against what the layers' own projections gave out; cached keys have another Gram matrix."""
    model, heard = prepare(tiny("llama").eval()), []
    method = "ridge_leverage(sketch=64,block=8,prefill=dense,keys={})@24"
    before, after = (CompressedCache(model, method.format(keys)) for keys in ("unrotated", "cached"))
    hooks = [
        layer.self_attn.k_proj.register_forward_hook(lambda module, given, out: heard.append(out[0].double()))
        for layer in model.model.layers  # pyright: ignore[reportGeneralTypeIssues, reportAttributeAccessIssue]
    ]
    fed(model, before, some(64))
    for hook in hooks:
        hook.remove()
    fed(model, after, some(64))
    for layer, other, out in zip(before.compressed, after.compressed, heard, strict=True):
        state: Any = layer.state
        rotated: Any = other.state
        keys = out.view(64, state.spec.rows, -1).transpose(0, 1)
        wanted = keys.transpose(1, 2) @ keys
        torch.testing.assert_close(state.memory.gram.double(), wanted, rtol=1e-4, atol=1e-4)
        assert float((rotated.memory.gram.double() - wanted).abs().max()) > 0.01 * float(wanted.abs().max())


def test_a_model_without_a_rotation_is_served_by_the_queries_as_given() -> None:
    model = prepare(served("gpt2"))
    cache = fed(model, CompressedCache(model, METHOD), some(40))
    assert spec_of(cache).applied is None
    assert cache.compressed[0].state is not None and cache.compressed[0].state.held.tolist()[0] == 24


def test_a_saved_cache_goes_on_with_its_rotation(tmp_path: Path) -> None:
    model = prepare(served("llama"))
    for source in (model, model.config):
        cache = fed(model, CompressedCache(source, METHOD), some(40))
        cache.save(tmp_path / "cache")
        again = CompressedCache.load(tmp_path / "cache", model)
        assert spec_of(again) == spec_of(cache)
        with torch.inference_mode():
            both = [model(some(30), past_key_values=one).logits for one in (cache, again)]
        assert torch.equal(*both)


def test_a_configuration_alone_is_told_to_be_the_worse_choice() -> None:
    model = prepare(tiny("llama").eval())
    with pytest.warns(UserWarning, match="give the prepared model"):
        CompressedCache(model.config, METHOD)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CompressedCache(model, METHOD)
        CompressedCache(model, METHOD, positions="cache")
        CompressedCache(model.config, "h2o(block=8)@24")
