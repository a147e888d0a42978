"""Planned bytes are those of a real cache of the real model; floors, fits and refusals follow from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, T5Config

from kvfloor import floors, models
from kvfloor.hf import CompressedCache, prepare
from kvfloor.hf.shapes import model_shape
from kvfloor.models.configuration import configuration
from kvfloor.models.load import load
from kvfloor.planning import MemoryPlan, plan
from survey.tiny import tiny_config, tiny_model

CONTEXT, BATCH = 150, 2  # longer than the tiny models' windows, and no multiple of a block or a group
METHODS = (
    *("exact", "quant", "quant(bits=4)", "sinks@32", "sinks@25%", "h2o@48", "h2o@25%", "snapkv@64", "tova@40"),
    *("h2o+moments@64", "exact|pages", "window@1MiB", "h2o@1MiB"),
)
FAMILIES = {
    "builtin": {},
    "llama": {},  # grouped queries
    "gemma3_text": {},  # sliding windows between
    "deepseek_v3": {},  # one latent vector per token
    "gemma4_text": {},  # kv heads of two widths, and layers that read the keys of others
    "qwen3_next": {},  # linear states between
}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    built = load()[0] if request.param == "builtin" else tiny_model(request.param)
    return prepare(built)


def fed(model: Any, method: str, sizes: tuple[int, ...]) -> CompressedCache:
    """Return a cache after forwards of these many tokens."""
    cache = CompressedCache(model.config, method, context=sum(sizes))
    for n in sizes:
        with torch.no_grad():
            model(input_ids=torch.full((BATCH, n), 7), past_key_values=cache, use_cache=True)
    return cache


def planned(model: Any, **changes: Any) -> MemoryPlan:
    given = {"context": CONTEXT, "batch": BATCH, "dtype": "float32", "config": model.config} | changes
    return plan("a model", **given)


def test_planned_bytes_are_a_real_caches(model: Any) -> None:
    lines = {line.method: line for line in planned(model, methods=METHODS).lines}
    assert set(METHODS) < set(lines)
    for method in METHODS:
        cache, line = fed(model, method, (CONTEXT,)), lines[method]
        before = cache.nbytes
        cache.seal()
        assert line.state_bytes == cache.nbytes, method
        own = line.cache_bytes - line.state_bytes
        assert line.prompt_bytes == max(before, cache.nbytes) + own, method
        held = {int(n) for layer in cache.compressed for n in layer.state.held}  # type: ignore[union-attr]
        assert line.budget_tokens is None or max(held) <= line.budget_tokens + 31, method


def test_planned_bytes_of_other_layers_are_a_real_caches(model: Any) -> None:
    own = planned(model).own_bytes
    assert own == fed(model, "exact", (CONTEXT - 1, 1)).bytes["stock"]
    kinds = {type(layer).__name__ for layer in fed(model, "exact", (1,)).layers}
    assert (own > 0) == bool(kinds - {"CompressedLayer", "DummyLayer"})


def test_short_contexts_are_a_real_caches_too(model: Any) -> None:
    for context in (1, 2, 9):
        found = planned(model, context=context, methods=("h2o@48", "snapkv@64"))
        cache = fed(model, "h2o@48", (context,))
        assert {line.method: line.state_bytes for line in found.lines}["h2o@48"] == cache.nbytes
        sizes = (context - 1, 1) if context > 1 else (1,)
        assert found.own_bytes == fed(model, "exact", sizes).bytes["stock"]


def test_weights_count_tied_ones_once(model: Any) -> None:
    numbers = sum(p.numel() for p in {p.data_ptr(): p for p in model.parameters()}.values())
    found = planned(model)
    assert found.parameters == numbers and found.weights_bytes == 4 * numbers


def test_a_tied_embedding_is_not_counted_twice() -> None:
    tied, untied = (
        plan(config=tiny_config("llama", vocab_size=1000, tie_word_embeddings=tie), context=8) for tie in (True, False)
    )
    assert untied.parameters - tied.parameters == 1000 * 64


def test_dtype_sets_the_bytes_of_weights_and_cache() -> None:
    half, full = (plan(context=300, dtype=dtype) for dtype in ("bfloat16", "float32"))
    assert full.weights_bytes == 2 * half.weights_bytes
    assert full.lines[0].state_bytes == 2 * half.lines[0].state_bytes
    model = prepare(load()[0].to(torch.bfloat16))
    cache = CompressedCache(model.config, "quant(bits=4)")
    with torch.no_grad():
        model(input_ids=torch.full((1, 300), 7), past_key_values=cache, use_cache=True)
    assert {line.method: line.state_bytes for line in half.lines}["quant(bits=4)"] == cache.nbytes


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "deepseek_v3"])
def test_the_stock_line_is_transformers_own_cache(family: str) -> None:
    from transformers import DynamicCache

    model = tiny_model(family)
    cache = DynamicCache(config=model.config)
    for n in (CONTEXT - 1, 1):
        model(input_ids=torch.full((BATCH, n), 7), past_key_values=cache, use_cache=True)
    tensors = [x for layer in cache.layers for x in vars(layer).values() if isinstance(x, torch.Tensor)]
    stored = sum(x.untyped_storage().nbytes() for x in tensors)
    assert plan(context=CONTEXT, batch=BATCH, dtype="float32", config=model.config).lines[0].cache_bytes == stored


def test_the_floor_is_the_sum_over_layers() -> None:
    found = plan(config=tiny_config("gemma3_text"), context=CONTEXT, batch=BATCH)
    full = floors.space(CONTEXT, 16, heads=2, values="binary").bytes
    window = floors.space(CONTEXT, 16, heads=2, attention="window", window=16, values="binary").bytes
    assert found.floor_bytes == pytest.approx(BATCH * (2 * full + 2 * window), abs=8) and found.floor_layers == 4
    assert found.floor_eta is None
    latent = plan(config=tiny_config("deepseek_v3"), context=CONTEXT)
    assert latent.floor_bytes == latent.floor_layers == 0


@pytest.mark.parametrize(("dtype", "values"), [("bfloat16", "bf16"), ("float16", "fp16"), ("float32", "fp32")])
def test_the_floor_at_a_relative_error_is_that_of_the_caches_own_numbers(dtype: str, values: str) -> None:
    def floor(eta: float | None = None) -> int:
        return plan(config=tiny_config("llama"), context=CONTEXT, dtype=dtype, eta=eta).floor_bytes

    layers = plan(config=tiny_config("llama"), context=CONTEXT).floor_layers
    told = floors.space(CONTEXT, 16, heads=2, eta=0.1, values=values)
    assert floor(eta=0.1) == layers * told.bytes
    assert floor() < floor(eta=0.5) < floor(eta=0.1) < floor(eta=0.0)
    with pytest.raises(ValueError, match=r"eta must lie in \[0, 1\), got 1"):
        floor(eta=1.0)


def test_requests_and_longest_context_fit_and_one_more_does_not() -> None:
    found = plan(context=512, memory="8MiB")
    free = 8 * 2**20 - found.weights_bytes
    for line in found.lines:
        assert (
            line.requests is not None
            and line.requests * line.cache_bytes <= free < (line.requests + 1) * line.cache_bytes
        )
        assert (line.longest_context is None) != line.grows
    stock, exact = found.lines[:2]
    for line in (stock, exact):
        assert line.longest_context is not None
        sizes = [plan(context=int(line.longest_context * x)).lines for x in (1, 1.01)]
        fits, not_fits = ({one.method: one.cache_bytes for one in size}[line.method] for size in sizes)
        assert fits <= free < not_fits
    batched = plan(context=512, memory="8MiB", batch=4)
    assert batched.lines[0].requests == stock.requests


def test_longest_context_leaves_room_for_windows_and_for_a_dense_prompt() -> None:
    config = tiny_config("gemma3_text")
    weights = plan(config=config, context=8).weights_bytes
    budget = weights + 600_000
    found = plan(config=config, context=512, memory=budget, methods=("snapkv@32", "window@32"))
    lines = {line.method: line for line in found.lines}
    stock = plan(config=config, context=lines["stock"].longest_context or 0).lines[0].cache_bytes
    assert 0.98 * 600_000 < stock <= 600_000
    assert lines["window@32"].longest_context is None and lines["snapkv@32"].longest_context is not None
    held = (
        plan(config=config, context=lines["snapkv@32"].longest_context, methods=("snapkv@32",)).lines[-1].prompt_bytes
    )
    assert 0.7 * 600_000 < held <= 600_000


def test_the_document_is_plain() -> None:
    document = json.loads(json.dumps(plan(context=64, memory="1GiB").as_dict(), allow_nan=False))
    assert document["schema"] == 1 and document["memory_bytes"] == 2**30
    assert [line["method"] for line in document["lines"]] == [
        *("stock", "exact", "quant", "quant(bits=4)", "sinks@25%", "h2o@25%"),
    ]
    assert [line["budget_tokens"] for line in document["lines"]] == [None, None, None, None, 16, 16]


def test_no_weight_is_made() -> None:
    config = tiny_config("llama", num_hidden_layers=2)
    config.hidden_size, config.intermediate_size, config.vocab_size = 8192, 2**20, 2**18  # 50 billion numbers
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 64, 8, 128
    found = plan(config=config, context=1024)
    assert found.parameters > 5e10 and found.lines[0].state_bytes == 2 * 1024 * 8 * 256 * 2


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "context": ({"context": 0}, "context"),
    "batch": ({"batch": 0}, "batch"),
    "dtype": ({"dtype": "int8"}, "bfloat16"),
    "memory": ({"memory": "24"}, "24GiB"),
    "no memory": ({"memory": "0GiB"}, "24GiB"),
    "weights": ({"memory": "1MiB"}, "703,232 bytes are missing"),
    "no budget": ({"methods": ["h2o"], "budgets": []}, "h2o@512"),
    "small budget": ({"methods": ["sinks(9)@4"]}, "too small"),
    "few bytes": ({"methods": ["h2o@1KiB"]}, "raise the budget"),
    "law": ({"methods": ["tensor"]}, "tensor attention"),
    "family": ({"config": T5Config()}, "t5"),
    "encoder": ({"config": BertConfig(num_hidden_layers=1)}, "encoder"),
    "own attention": ({"config": tiny_config("bloom")}, "ignores"),
    "impossible sizes": ({"config": tiny_config("llama", num_key_value_heads=3)}, "3 kv heads"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused(case: str) -> None:
    arguments, told = REFUSED[case]
    with pytest.raises(ValueError, match=r".") as caught:
        plan(**({"context": 64} | arguments))
    assert told in str(caught.value) and len(str(caught.value)) < 600


def test_configurations_of_names_folders_and_files(tmp_path: Path) -> None:
    folder = models.builtin_path()
    found = [configuration(given).to_dict() for given in ("builtin", folder, folder / "config.json")]
    assert found[0] == found[1] == found[2] and found[0]["model_type"] == "llama"
    bare = tmp_path / "mine.json"
    bare.write_bytes((folder / "config.json").read_bytes())
    assert plan(bare, 64).lines == plan(context=64).lines


BROKEN = {
    "not JSON": ("{", "not JSON"),
    "no object": ("[]", "JSON object"),
    "deep": ("[" * 100_000, "not JSON"),
    "no type": ("{}", "model_type None"),
    "unknown type": ('{"model_type": "hal9000"}', "'hal9000'"),
    "strange type": ('{"model_type": ["llama"]}', "does not know"),
    "strange size": ('{"model_type": "llama", "hidden_size": "wide"}', "configuration"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_configurations_are_refused(case: str, tmp_path: Path) -> None:
    text, told = BROKEN[case]
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config") as caught:
        plan(tmp_path, 64)
    assert told in str(caught.value)


def test_a_published_model_is_planned_only_if_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvfloor.models.packaged import PACKAGED

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ValueError, match="not fetched yet"):
        plan("smollm2", 64)
    about = PACKAGED["smollm2"]
    folder = tmp_path / "kvfloor" / f"{Path(about.file).stem}-{about.sha256[:16]}"
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes((models.builtin_path() / "config.json").read_bytes())
    assert plan("smollm2", 64).lines == plan(context=64).lines


def test_remote_code_is_never_run(tmp_path: Path) -> None:
    plain = json.loads((models.builtin_path() / "config.json").read_text())
    plain["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (tmp_path / "evil.py").write_text("raise SystemExit('run')")
    (tmp_path / "config.json").write_text(json.dumps(plain))
    assert plan(tmp_path, 64).parameters == plan(context=64).parameters


def test_shapes_follow_the_models_own_forward() -> None:
    shape = model_shape(tiny_config("gemma4_text"), torch.float32)
    assert [(layer.layer, layer.heads, layer.d, layer.dv, layer.g) for layer in shape.compressed] == [
        *((1, 2, 32, 32, 2), (3, 2, 32, 32, 2)),
    ]
    assert [(layer.layer, layer.heads, layer.d, layer.window) for layer in shape.windows] == [
        *((0, 2, 16, 16), (2, 2, 16, 16)),
    ]
