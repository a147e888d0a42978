"""prepare() and restore() on what people hold: wrapped, copied and pickled models, models of several parts."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from kvfloor.hf import CompressedCache, prepare, restore
from kvfloor.hf.prepare import is_prepared
from kvfloor.hf.selection import before, configurations, name_over
from kvfloor.hf.wrappers import unwrapped
from survey.tiny import tiny_config, tiny_model

IDS = torch.randint(1, 98, (1, 40), generator=torch.Generator().manual_seed(1))


def _logits(model: Any, cache: Any = None) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, past_key_values=cache).logits


def _served(model: Any) -> None:
    """A compressed cache works on the model, wrapped as it is, and can be saved."""
    inner = tiny_model("llama")
    cache = CompressedCache(model, "exact")
    torch.testing.assert_close(_logits(model, cache), _logits(inner), rtol=0, atol=1e-4)
    assert cache.get_seq_length() == IDS.shape[1]


@pytest.mark.parametrize("wrap", [lambda model: torch.compile(model, backend="eager"), torch.nn.DataParallel])
def test_wrapped_models_are_prepared_and_restored(wrap: Any, tmp_path: Path) -> None:
    model = wrap(tiny_model("llama", num_hidden_layers=1))
    inner = unwrapped(model)
    right = _logits(inner)
    assert prepare(model) is model and is_prepared(model)
    cache = CompressedCache(model, "exact")
    torch.testing.assert_close(_logits(inner, cache), right, rtol=0, atol=1e-4)
    cache.save(tmp_path / "cache")
    assert CompressedCache.load(tmp_path / "cache", model).get_seq_length() == IDS.shape[1]
    assert restore(model) is model and not is_prepared(model)


def test_adapted_models_are_prepared() -> None:
    peft: Any = pytest.importorskip("peft")
    model = peft.get_peft_model(
        tiny_model("llama"), peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"])
    )
    assert is_prepared(prepare(model))
    _served(model)
    _served(torch.nn.DataParallel(model))
    assert not is_prepared(restore(model))


def test_prefix_tuning_is_refused_and_prompt_tuning_served() -> None:
    peft: Any = pytest.importorskip("peft")
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    model = prepare(peft.get_peft_model(tiny_model("llama"), prompt)).eval()
    cache = CompressedCache(model, "exact")
    usual: dict[str, Any] = {"input_ids": IDS, "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(**usual, past_key_values=cache), model.generate(**usual))
    assert cache.get_seq_length() == 5 + 40 + 3
    prefix = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    other = peft.get_peft_model(tiny_model("llama"), prefix)
    for refused in (prepare, lambda model: CompressedCache(model, "exact")):
        with pytest.raises(ValueError, match="prefix tuning puts a cache"):
            refused(other)


def test_accelerated_models_are_prepared() -> None:
    accelerate: Any = pytest.importorskip("accelerate")
    model = accelerate.Accelerator(cpu=True).prepare(tiny_model("llama"))
    assert is_prepared(prepare(model))
    _served(model)
    hooked = accelerate.cpu_offload(tiny_model("llama"), execution_device=torch.device("cpu"))
    _served(prepare(hooked))


def test_what_is_no_model_is_refused_by_name() -> None:
    for given in (torch.nn.Linear(1, 1), torch.nn.DataParallel(torch.nn.Linear(1, 1)), "llama", None):
        for call in (prepare, restore, lambda model: CompressedCache(model, "exact")):
            with pytest.raises(TypeError, match=rf"got {type(given).__name__}: give the model that is inside it"):
                call(given)  # pyright: ignore[reportArgumentType]
        assert not is_prepared(given)


# ---- copies ------------------------------------------------------------------------------------------------


def test_a_deep_copy_works_and_its_cache_is_saved_once_it_is_prepared(tmp_path: Path) -> None:
    model = prepare(tiny_model("llama"))
    twin = copy.deepcopy(model)
    _served(twin)
    cache = CompressedCache(twin, "exact")
    _logits(twin, cache)
    with pytest.raises(ValueError, match=r"call kvfloor\.hf\.prepare\(model\) on a copy"):
        cache.save(tmp_path / "cache")
    prepare(twin)
    cache.save(tmp_path / "cache")
    restore(twin)
    assert before(twin.config._attn_implementation) is None and is_prepared(model)


def test_a_pickled_model_is_what_it_was() -> None:
    written = io.BytesIO()
    torch.save(prepare(tiny_model("llama")), written)
    written.seek(0)
    model = torch.load(written, weights_only=False)
    _served(model)
    assert restore(model).config._attn_implementation == "sdpa"


def test_a_reloaded_model_is_not_prepared(tmp_path: Path) -> None:
    prepare(tiny_model("llama")).save_pretrained(tmp_path)
    assert "kvfloor" not in (tmp_path / "config.json").read_text()
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not is_prepared(model) and model.config._attn_implementation == "sdpa"


def test_two_models_of_one_configuration_are_told_apart() -> None:
    config = tiny_config("llama")
    model, other = (AutoModelForCausalLM.from_config(config).eval() for _ in range(2))
    prepare(model)
    assert other.config._attn_implementation == config._attn_implementation == "sdpa"
    prepare(other)
    restore(model)
    cache = CompressedCache(config, "exact")
    torch.testing.assert_close(_logits(other, cache), _logits(restore(other)), rtol=0, atol=1e-4)
    assert model.config is model.get_decoder().config and model.config is not other.config


# ---- parts -------------------------------------------------------------------------------------------------


def _llava() -> PreTrainedModel:
    small: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    vision = hf.CLIPVisionConfig(**small, image_size=16, patch_size=4, projection_dim=32)
    text = hf.LlamaConfig(
        vocab_size=120, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
    )
    return hf.LlavaForConditionalGeneration(hf.LlavaConfig(vision_config=vision, text_config=text)).eval()


@pytest.mark.parametrize("vision", ["eager", "sdpa"])
@pytest.mark.parametrize("text", ["eager", "sdpa"])
def test_each_part_gets_its_own_attention_back(vision: str, text: str) -> None:
    model = _llava()
    model.set_attn_implementation({"vision_config": vision, "text_config": text})

    def parts() -> list[str | None]:
        return [config._attn_implementation for config in configurations(model)]

    earlier = parts()
    assert {vision, text} <= set(earlier)
    prepare(prepare(model))
    assert [before(name) for name in parts()] == earlier
    restore(restore(model))
    assert parts() == earlier


def test_a_part_switched_by_hand_keeps_what_was_selected() -> None:
    model = prepare(_llava())
    model.set_attn_implementation({"vision_config": "eager"})
    restore(model)
    assert model.config.vision_config._attn_implementation == "eager"
    assert model.config.text_config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["eager", "sdpa", "flash_attention_2", "flex_attention", "kernels-community/flash-x"])
def test_names_lead_back_and_spell_out_what_transformers_looks_for(name: str) -> None:
    assert before(name_over(name)) == name and before(name) is None
    assert not any(word in name_over(name) for word in ("flash", "flex", "/"))


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_layers_that_move_what_they_are_given_may_move_the_cache_where_it_is(family: str) -> None:
    """accelerate's hooks do, within a forward, where nobody told them to leave it."""

    def move(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        del module
        return args, {name: x.to("cpu") if hasattr(x, "to") else x for name, x in kwargs.items()}

    model: Any = prepare(tiny_model(family))
    ids = torch.randint(2, 98, (1, 40), generator=torch.Generator().manual_seed(1))
    cache = CompressedCache(model.config, "sinks(2,block=4)@16")
    right = model.generate(ids, past_key_values=cache, max_new_tokens=6)
    for layer in model.model.layers:
        for module in (layer, layer.self_attn):
            module.register_forward_pre_hook(move, with_kwargs=True)
    cache = CompressedCache(model.config, "sinks(2,block=4)@16")
    assert torch.equal(model.generate(ids, past_key_values=cache, max_new_tokens=6), right)
    cache.check_whole()
