"""A prepared model gives what it gave before with every cache of transformers: tokens, logits, weights and errors."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import transformers as hf
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation.configuration_utils import ALL_CACHE_IMPLEMENTATIONS, CompileConfig

from kvfloor.hf import CompressedCache, prepare
from kvfloor.hf.prepare import is_prepared
from survey.tiny import families, tiny_model

FAST = ("llama", "gemma2", "gemma3_text", "gemma4_text", "gpt_oss", "bart")
MORE = (
    *("qwen3", "mistral", "phi3", "gpt2", "opt", "cohere2", "olmo2", "granitemoehybrid", "bamba", "lfm2"),
    *("qwen3_next", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "gemma3n_text", "llama4_text", "ministral"),
    *("smollm3", "falcon_h1"),
)
SLOTS, ANSWER = 40, 6
Make = Callable[[PreTrainedModel], Any]


def _static(model: PreTrainedModel) -> Cache:
    return hf.StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=SLOTS + ANSWER + 8)


def _quantised(model: PreTrainedModel) -> Cache:
    return hf.QuantizedCache("quanto", config=model.config.get_text_config(decoder=True))


def _both(model: PreTrainedModel) -> Cache:
    own = hf.DynamicCache(config=model.config.get_text_config(decoder=True))
    return hf.EncoderDecoderCache(own, hf.DynamicCache())


CACHES: dict[str, Make] = {
    "none": lambda model: None,
    "bare dynamic": lambda model: hf.DynamicCache(),
    "dynamic": lambda model: hf.DynamicCache(config=model.config.get_text_config(decoder=True)),
    "dynamic, offloaded": lambda model: hf.DynamicCache(
        config=model.config.get_text_config(decoder=True), offloading=True
    ),
    "static": _static,
    "quantised": _quantised,
    "encoder and decoder": _both,
}


def _prompt() -> dict[str, Tensor]:
    ids = torch.randint(1, 98, (2, SLOTS), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :10] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _heard(model: Any, make: Make = CACHES["none"], **options: Any) -> tuple[Tensor, Tensor] | type[Exception]:
    """The tokens and the logits of a greedy answer, or the kind of error that there is instead."""
    try:
        options = {"disable_compile": True, "past_key_values": make(model)} | options
        out: Any = model.generate(
            **_prompt(),
            max_new_tokens=ANSWER,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            **options,
        )
    except Exception as error:
        return type(error)
    return out.sequences, torch.stack(out.logits)  # of the newest token each time


def _same(before: Any, after: Any, what: str) -> None:
    if isinstance(before, type):
        assert after == before, f"{what}: {before} before, {after} on the prepared model"
        return
    assert not isinstance(after, type), f"{what}: {after} on the prepared model"
    assert torch.equal(before[0], after[0]), what
    torch.testing.assert_close(after[1], before[1], rtol=0, atol=1e-5 * float(before[1].abs().max()), msg=what)


def _unchanged(model: PreTrainedModel, attention: str | None = None) -> None:
    if attention is not None:
        model.set_attn_implementation(attention)

    def all_of_them() -> dict[str, Any]:
        named = {name: _heard(model, make) for name, make in CACHES.items()}
        for name in ALL_CACHE_IMPLEMENTATIONS:
            named[f"cache_implementation={name}"] = _heard(model, cache_implementation=name)
        return named

    before = all_of_them()
    assert sum(not isinstance(heard, type) for heard in before.values()) >= 3
    prepare(model)
    for name, after in all_of_them().items():
        _same(before[name], after, name)


@pytest.mark.parametrize("family", FAST)
def test_every_stock_cache_is_unchanged(family: str) -> None:
    if family not in families():
        pytest.skip("this release of transformers has no such family")
    _unchanged(tiny_model(family))


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted({*FAST, *MORE} & set(families())))
def test_every_stock_cache_is_unchanged_over_eager_attention(family: str) -> None:
    _unchanged(tiny_model(family), "eager")


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(set(MORE) & set(families())))
def test_every_stock_cache_is_unchanged_in_more_families(family: str) -> None:
    _unchanged(tiny_model(family))


def test_half_of_the_caches_are_really_tried() -> None:
    """The comparison is worth something only where a stock model answers."""
    model = tiny_model("llama")
    named = {name: _heard(model, make) for name, make in CACHES.items()}
    answered = {name for name, heard in named.items() if not isinstance(heard, type)}
    assert {"none", "bare dynamic", "dynamic", "static"} <= answered
    if importlib.util.find_spec("optimum"):
        assert "quantised" in answered


# ---- compiled ----------------------------------------------------------------------------------------------


def _compiled(family: str) -> None:
    """generate() compiles the forward of a static cache by itself; here by a backend that takes no minutes."""
    model: Any = tiny_model(family)
    options: dict[str, Any] = {
        "cache_implementation": "static",
        "disable_compile": False,
        "compile_config": CompileConfig(backend="eager", fullgraph=True, mode=cast(Any, None)),
    }
    model.generation_config.disable_compile = False
    torch._dynamo.reset()
    before = _heard(model, **options)
    assert not isinstance(before, type)
    prepare(model)
    torch._dynamo.reset()
    _same(before, _heard(model, **options), family)


def _forward_compiled(family: str, **changes: Any) -> None:
    model = tiny_model(family, **changes)
    torch._dynamo.reset()

    def logits() -> Tensor:
        with torch.no_grad():
            return torch.compile(model, backend="eager")(**_prompt(), past_key_values=_static(model)).logits

    before = logits()
    prepare(model)
    torch.testing.assert_close(logits(), before, rtol=0, atol=1e-5 * float(before.abs().max()))


def test_a_compiled_forward_over_a_static_cache_is_unchanged() -> None:
    _forward_compiled("llama", num_hidden_layers=1)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted({*FAST, "qwen3", "deepseek_v3"} - {"bart"}))
def test_a_compiled_forward_over_a_static_cache_is_unchanged_in_more_families(family: str) -> None:
    _forward_compiled(family)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "gpt_oss"])
def test_generating_with_a_compiled_static_cache_is_unchanged(family: str) -> None:
    _compiled(family)


# ---- other ways to be asked --------------------------------------------------------------------------------


def test_continuous_batching_names_restore() -> None:
    model: Any = prepare(tiny_model("llama"))
    with pytest.raises(ValueError, match=r"kvfloor\.hf\.restore\(model\)"):
        model.generate_batch([[5, 6, 7]], generation_config=model.generation_config)
    assert is_prepared(model)


def _keeps_the_wish_for_weights(model: PreTrainedModel) -> bool:
    """Whether model and attention take `output_attentions` by name and collect it, and do not pass it on."""
    attentions = [part for part in model.modules() if type(part).__name__.endswith("Attention")]
    asked = [inspect.signature(part.forward).parameters for part in (model.base_model, *attentions)]
    return all("output_attentions" in names for names in asked)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "deepseek_v3"])
def test_attention_weights_are_those_of_eager_attention(family: str, attention: str) -> None:
    model = tiny_model(family)
    model.set_attn_implementation("eager")
    right = model(**_prompt(), output_attentions=True).attentions
    if not (family == "gemma2" and attention == "sdpa"):  # sdpa cannot cap logits
        model.set_attn_implementation(attention)
    if attention == "sdpa" and _keeps_the_wish_for_weights(model):
        pytest.skip(f"{family} of this release tells no attention function that weights are asked for")
    prepare(model)
    mine = model(**_prompt(), output_attentions=True, past_key_values=_static(model) if family == "gpt2" else None)
    assert len(mine.attentions) == len(right) > 0
    for ours, theirs in zip(mine.attentions, right, strict=True):
        width = theirs.shape[-1]
        torch.testing.assert_close(ours[..., :width][0, :, 10:], theirs[0, :, 10:], rtol=0, atol=1e-5)
        torch.testing.assert_close(ours[..., :width][1], theirs[1], rtol=0, atol=1e-5)


def test_weights_of_an_unpadded_prompt_look_back_only() -> None:
    model: Any = tiny_model("llama")
    ids = _prompt()["input_ids"]
    model.set_attn_implementation("eager")
    right = model(ids, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    mine = prepare(model)(ids, output_attentions=True).attentions
    torch.testing.assert_close(torch.stack(mine), torch.stack(right), rtol=0, atol=1e-5)


@pytest.mark.skipif("gemma4_text" not in families(), reason="this release of transformers has no such family")
def test_layers_that_answer_the_last_tokens_alone_are_unchanged() -> None:
    """Layers without keys of their own cut the mask to the tokens whose logits are asked for: they need one to cut."""
    model: Any = tiny_model("gemma4_text")
    ids = _prompt()["input_ids"]
    with torch.no_grad():
        right = model(ids).logits[:, -3:]
        assert torch.allclose(model(ids, logits_to_keep=3).logits, right, atol=1e-4)
        assert torch.allclose(prepare(model)(ids, logits_to_keep=3).logits, right, atol=1e-4)


def test_a_compressed_cache_has_no_weights_and_stays_as_it_was() -> None:
    model = prepare(tiny_model("llama"))
    cache, other = (CompressedCache(model.config, "exact") for _ in range(2))
    ids = _prompt()["input_ids"]
    with torch.no_grad():
        model(ids[:, :20], past_key_values=cache)
        with pytest.raises(ValueError, match="output_attentions=True asks for the weight of every token"):
            model(ids[:, 20:], past_key_values=cache, output_attentions=True)
        assert cache.bytes["staged"] == 0
        model(ids[:, :20], past_key_values=other)
        after, right = (model(ids[:, 20:], past_key_values=c).logits for c in (cache, other))
    assert torch.equal(after, right)


# ---- masks that models pass on or use as tensors -----------------------------------------------------------


def _paligemma() -> Any:
    torch.manual_seed(0)
    text = hf.GemmaConfig(
        vocab_size=120,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        pad_token_id=0,
    )
    vision = hf.SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
        vision_use_head=False,
    )
    config = hf.PaliGemmaConfig(
        vision_config=vision, text_config=text, image_token_index=110, projection_dim=64, hidden_size=64
    )
    model = hf.PaliGemmaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def _with_an_image() -> dict[str, Any]:
    ids = torch.randint(3, 100, (1, 50), generator=torch.Generator().manual_seed(2))
    ids[0, :16] = 110
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(3)),
        "token_type_ids": torch.zeros_like(ids),
    }


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_model_that_passes_its_mask_on_is_unchanged(attention: str) -> None:
    model = _paligemma()
    model.set_attn_implementation(attention)
    inputs = _with_an_image()
    text = {name: inputs[name][:, 16:] for name in ("input_ids", "attention_mask", "token_type_ids")}
    usual: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "disable_compile": True}

    def heard() -> list[Tensor]:
        return [
            model.generate(**given, **usual, cache_implementation=kind)
            for given in (inputs, text)
            for kind in (None, "static")
        ]

    before = heard()
    prepare(model)
    assert all(torch.equal(a, b) for a, b in zip(before, heard(), strict=True))
    cache = CompressedCache(model.config, "exact")
    with pytest.raises(ValueError, match="plain causal rule"):
        model.generate(**inputs, **usual, past_key_values=cache)
    assert cache.nbytes == 0 and cache.get_seq_length() == 0
