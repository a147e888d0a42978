"""A cache with one method per layer, and the methods that `auto` chooses for it from measured costs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from kvfloor import parse
from kvfloor.hf import CompressedCache, UnknownMethod, choose_layers, prepare, saved
from kvfloor.hf.fingerprint import fingerprint
from kvfloor.hf.mixed import cache_shapes
from kvfloor.hf.shapes import model_shape
from kvfloor.methods.mixed.costs import CostTable, LayerCost, write_costs
from kvfloor.planning import plan
from survey.tiny import tiny_model
from tests.hf.conftest import Prompt, Talk, tiny

MIXED = "layers(exact:k4v4,h2o(block=8)@32,exact)"
METHODS = ("exact", "exact:k8v8", "exact:k4v4", "exact:k2v2", "sinks(4)@25%")
COSTS = ((0.0, 0.01, 0.05, 0.4, 0.1), (0.0, 0.001, 0.002, 0.003, 2.0), (0.0, 0.5, 0.6, 3.0, 0.7))
CONTEXT = 200


def costs(model: PreTrainedModel, path: Path) -> str:
    """Write a file of costs for the tiny model of three layers, and return the text of `auto` without its budget."""
    rows = tuple(
        LayerCost(i, i, method, nats, nats, nats)
        for i, line in enumerate(COSTS)
        for method, nats in zip(METHODS, line, strict=True)
    )
    write_costs(path, CostTable(fingerprint(model), 3, ("made up",), CONTEXT, 512, rows))
    return f"auto(rows='{path}')"


def require_plans() -> None:
    """Skip the test if this release of transformers cannot run a model without its weights, as plans do."""
    try:
        model_shape(tiny().config, torch.float32)
    except ValueError as cause:
        if "autocast" not in str(cause):
            raise
        pytest.skip("this release of transformers cannot run a model without its weights")


@torch.inference_mode()
def fill(model: PreTrainedModel, method: str, **more: Any) -> CompressedCache:
    cache = CompressedCache(model, method, context=CONTEXT, **more)
    ids = torch.randint(2, 98, (1, CONTEXT), generator=torch.Generator().manual_seed(0))
    model(ids, past_key_values=cache)
    cache.seal()
    return cache


def test_each_layer_has_the_state_of_its_own_method(prepared: PreTrainedModel) -> None:
    """The first layer's inputs do not depend on any method, so its state is that of a cache with this method alone."""
    first, *_ = fill(prepared, MIXED).compressed
    alone, *_ = fill(prepared, "exact:k4v4").compressed
    assert first.state is not None and alone.state is not None
    assert first.state.to_bytes() == alone.state.to_bytes()
    told = fill(prepared, MIXED).report()
    assert [entry["method"] for entry in told] == ["exact:k4v4", "h2o(block=8)@32", "exact"]
    assert [entry["held"][0] for entry in told] == [CONTEXT, 32, CONTEXT]
    assert [entry["method"] for entry in CompressedCache(prepared, MIXED).report()] == [
        *("exact:k4v4", "h2o(block=8)@32", "exact")
    ]


def test_equal_methods_are_the_uniform_cache(prepared: PreTrainedModel, prompt: Prompt) -> None:
    caches = [CompressedCache(prepared, text) for text in ("h2o(block=8)@32", "layers(3*h2o(block=8)@32)")]
    logits = [prepared(**prompt, past_key_values=cache).logits for cache in caches]
    assert torch.equal(*logits) and caches[0].nbytes == caches[1].nbytes


def test_a_saved_cache_continues_bit_for_bit(prepared: PreTrainedModel, tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(1)
    turns = [torch.randint(2, 98, (2, n), generator=draw) for n in (70, 9, 1, 40)]
    talk = Talk(prepared, CompressedCache(prepared, MIXED))
    other = Talk(prepared, CompressedCache(prepared, MIXED))
    for ids in turns[:2]:
        talk.hear(ids)
        other.hear(ids)
    talk.cache.save(tmp_path / "cache")  # type: ignore[attr-defined]
    again = Talk(prepared, CompressedCache.load(tmp_path / "cache", prepared), talk.mask)
    assert str(again.cache.method) == MIXED  # type: ignore[attr-defined]
    for ids in turns[2:]:
        assert torch.equal(again.hear(ids), other.hear(ids))


def test_what_does_not_fit_the_model_is_refused(prepared: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=r"for 2 layers; this model has 3"):
        CompressedCache(prepared, "layers(2*exact)")
    for more in ({"budgets": [32, 32, 32]}, {"allocate": "pyramid"}):
        with pytest.raises(ValueError, match="leave budgets= and allocate= out"):
            CompressedCache(prepared, "layers(3*exact)", **more)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="evicts none"):
        CompressedCache(prepared, "layers(3*exact)", on_evict=print)


def test_evictions_are_told_of_the_layers_that_evict(prepared: PreTrainedModel) -> None:
    told: list[int] = []
    fill(prepared, MIXED, on_evict=lambda eviction: told.append(eviction.layer))
    assert set(told) == {1}


def test_auto_chooses_the_least_cost_in_the_bytes(prepared: PreTrainedModel, tmp_path: Path) -> None:
    """The real cache keeps to the bytes; more bytes cost no more; all choices together are the oracle."""
    asked = costs(prepared, tmp_path / "costs.json")
    every: dict[tuple[str, ...], float] = {
        (a, b, c): sum(COSTS[i][METHODS.index(m)] for i, m in enumerate((a, b, c)))
        for a in METHODS
        for b in METHODS
        for c in METHODS
    }
    sizes = {method: fill(prepared, f"layers(3*{method})").nbytes // 3 for method in METHODS}
    for kib in (60, 75, 90, 110, 150, 200, 400):
        cache = fill(prepared, f"{asked}@{kib}KiB")
        assert cache.nbytes <= kib * 1024
        picked = tuple(str(cache.method.of_layer(i)) for i in range(3))
        least = min(nats for key, nats in every.items() if sum(sizes[m] for m in key) <= kib * 1024)
        assert every[picked] == pytest.approx(least)
        assert str(choose_layers(prepared, f"{asked}@{kib}KiB", CONTEXT)) == str(cache.method)
    assert str(fill(prepared, f"{asked}@4MiB").method) == "layers(3*exact)"


def test_the_chosen_methods_are_what_is_saved(prepared: PreTrainedModel, tmp_path: Path) -> None:
    cache = fill(prepared, f"{costs(prepared, tmp_path / 'costs.json')}@90KiB")
    cache.save(tmp_path / "cache")
    (tmp_path / "costs.json").unlink()
    again = CompressedCache.load(tmp_path / "cache", prepared)
    assert str(again.method) == str(cache.method) and again.report()[0]["tokens"] == [CONTEXT] * 2


def test_auto_refuses_what_it_cannot_choose_from(prepared: PreTrainedModel, tmp_path: Path) -> None:
    asked = costs(prepared, tmp_path / "costs.json")
    with pytest.raises(ValueError, match=r"1,024 bytes are too few: .* need [0-9,]+ bytes"):
        CompressedCache(prepared, f"{asked}@1KiB", context=CONTEXT)
    with pytest.raises(ValueError, match="measure them with: kvfloor measure-layers"):
        CompressedCache(prepared, "auto@1MiB", context=CONTEXT)
    with pytest.raises(ValueError, match="the prepared model, not its configuration"):
        CompressedCache(prepared.config, f"{asked}@1MiB", context=CONTEXT)
    with pytest.raises(ValueError, match="give context="):
        CompressedCache(prepared, f"{asked}@1MiB")
    with pytest.raises(ValueError, match="context"):
        CompressedCache(prepared, f"{asked}@1MiB", context=0)
    with pytest.raises(ValueError, match="asks for no bytes"):
        CompressedCache(prepared, asked, context=CONTEXT)
    with pytest.raises(ValueError, match="asks for no bytes"):
        choose_layers(prepared, "h2o@64", CONTEXT)
    with pytest.raises(ValueError, match=r"kvfloor\.hf\.prepare"):
        CompressedCache(tiny(), f"{asked}@1MiB", context=CONTEXT)
    other = prepare(tiny(num_hidden_layers=2))
    with pytest.raises(ValueError, match=r"are of another model.*measure-layers"):
        CompressedCache(other, f"{asked}@1MiB", context=CONTEXT)


def test_a_plan_refuses_auto() -> None:
    require_plans()
    with pytest.raises(ValueError, match="is chosen for a model"):
        plan(context=64, methods=["auto@1MiB"])


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "deepseek_v3", "gemma4_text", "qwen3_next"])
def test_sizes_seen_on_one_token_are_those_of_the_plan(family: str) -> None:
    require_plans()
    model = prepare(tiny_model(family))
    shapes, dtype = cache_shapes(model)
    assert dtype == torch.float32
    assert shapes == model_shape(model.config, torch.float32).compressed


def test_a_plan_has_the_bytes_of_the_cache(prepared: PreTrainedModel) -> None:
    require_plans()
    lines = plan(context=CONTEXT, methods=[MIXED], dtype="float32", config=prepared.config).lines
    (size,) = (line.state_bytes for line in lines if line.method == MIXED)
    assert size == fill(prepared, MIXED).nbytes


@pytest.mark.parametrize(
    "text", ["layers(exact:k4v4,other:Policy@32)", "other:k4v4+drop@32", "other:k4v4(first=0)|top_k", "other:full+drop"]
)
def test_a_class_that_a_file_names_is_not_imported(text: str) -> None:
    """The mutants: whatever looks like a store is let through, though it is a class where no store may stand."""
    with pytest.raises(UnknownMethod, match=r"other:\w+ is not imported"):
        saved._method(text, None)
    assert re.search(r"[\w.]+:(?!k[0-9]|full)[A-Za-z_]", "other:k4v4+drop@32") is None


@pytest.mark.parametrize("text", ["exact:k4v4", "h2o:k4v3(first=2)@64", "layers(exact:k5v4,exact:full)", "h2o@64:k4v4"])
def test_a_store_is_no_class(text: str) -> None:
    assert saved._method(text, None) == parse(text)
