"""After a forward or generate() that was given a compressed cache, that cache was used, or there was an error."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from kvfloor import BrokenState
from kvfloor.hf import CompressedCache, prepare, restore
from kvfloor.hf.decode import Dialogue
from survey import conversations
from survey.tiny import tiny_model

IDS = torch.randint(3, 98, (1, 80), generator=torch.Generator().manual_seed(1))
GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
SWITCH = 48  # tokens above which these models turn their keys by other angles


def _switching(family: str) -> Any:
    rope: dict[str, Any] = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
        "original_max_position_embeddings": SWITCH,
        "factor": 4.0,
    }
    rope |= {"short_mscale": 1.0, "long_mscale": 1.3} if family == "phimoe" else {}
    return tiny_model(family, original_max_position_embeddings=SWITCH, rope_parameters=rope)


@pytest.fixture(params=["phi3", "phimoe"])
def switching(request: pytest.FixtureRequest) -> Any:
    return _switching(request.param)


def asks_no_cache(model: Any) -> bool:
    """Whether this release compares its own count of positions with the switch, whatever cache it was given."""
    return "cache_position" in inspect.signature(model.prepare_inputs_for_generation).parameters


def test_below_the_switch_nothing_changes(switching: Any) -> None:
    if asks_no_cache(switching):
        pytest.skip("generate() of this release drops a cache unasked, so that it is refused below the switch too")
    right = switching.generate(IDS[:, :20], **GREEDY)
    cache = CompressedCache(switching.config, "exact")
    assert torch.equal(prepare(switching).generate(IDS[:, :20], past_key_values=cache, **GREEDY), right)
    assert cache.get_seq_length() == 31


@pytest.mark.parametrize(("prompt", "seen"), [(44, 48), (60, 0)])
def test_generating_over_the_switch_is_an_error(switching: Any, prompt: int, seen: int) -> None:
    cache = CompressedCache(prepare(switching).config, "exact")
    seen = 0 if asks_no_cache(switching) else seen
    with pytest.raises(ValueError, match=rf"above {SWITCH} tokens .* the {seen} in this cache .* in one forward"):
        switching.generate(IDS[:, :prompt], past_key_values=cache, **GREEDY)
    assert cache.get_seq_length() == seen


def test_chunks_over_the_switch_are_an_error(switching: Any) -> None:
    cache = CompressedCache(prepare(switching).config, "exact")
    with torch.no_grad():
        switching(IDS[:, :40], past_key_values=cache)
        with pytest.raises(ValueError, match="turns its keys by other angles"):
            switching(IDS[:, 40:50], past_key_values=cache)
        switching(IDS[:, 40:SWITCH], past_key_values=cache)
    assert cache.get_seq_length() == SWITCH and cache.bytes["staged"] == 0


def test_a_prompt_over_the_switch_given_in_one_forward_goes_on(switching: Any) -> None:
    right = switching.generate(IDS[:, :60], **GREEDY)
    cache = CompressedCache(prepare(switching).config, "exact")
    with torch.no_grad():
        switching(IDS[:, :59], past_key_values=cache)
    assert torch.equal(switching.generate(IDS[:, :60], past_key_values=cache, **GREEDY), right)
    assert cache.get_seq_length() == 71


def test_a_survey_and_an_audit_see_that_another_cache_was_used() -> None:
    mine, other = CompressedCache(tiny_model("llama").config, "exact"), hf.DynamicCache()

    def model(**_: Any) -> Any:
        return SimpleNamespace(past_key_values=other, logits=torch.zeros(1, 1, 4))

    assert conversations.same_cache(mine, SimpleNamespace(past_key_values=mine)) is mine
    with pytest.raises(RuntimeError, match="a CompressedCache was given, a DynamicCache was used"):
        conversations.same_cache(mine, model())
    dialogue = Dialogue(model, mine, torch.zeros(1, 0, dtype=torch.int64))  # pyright: ignore[reportArgumentType]
    model.device = torch.device("cpu")  # pyright: ignore[reportFunctionMemberAccess]
    with pytest.raises(RuntimeError, match="given a CompressedCache and used a DynamicCache"):
        dialogue.feed([[1, 2, 3]])


# ---- other attention ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "deepseek_v3"])
@pytest.mark.parametrize("switch", [restore, lambda model: model.set_attn_implementation("eager")])
def test_attention_switched_back_midway_is_an_error_and_changes_nothing(family: str, switch: Any) -> None:
    model: Any = prepare(tiny_model(family))
    cache, right = CompressedCache(model.config, "exact"), CompressedCache(model.config, "exact")
    with torch.no_grad():
        model(IDS[:, :30], past_key_values=cache)
        model(IDS[:, :30], past_key_values=right)
        switch(model)
        with pytest.raises(RuntimeError, match=r"cannot read a compressed cache: call kvfloor\.hf\.prepare\(model\)"):
            model(IDS[:, 30:31], past_key_values=cache)
        prepare(model)
        after, expected = (model(IDS[:, 30:31], past_key_values=each).logits for each in (cache, right))
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layers", [1, 4])
def test_a_model_that_was_never_prepared_gives_no_second_token(layers: int) -> None:
    """One layer's first forward is answered rightly by any attention; a second one or a second layer is not reached."""
    model: Any = tiny_model("llama", num_hidden_layers=layers)
    cache = CompressedCache(model.config, "exact")
    with pytest.raises(RuntimeError, match=r"never asked for by kvfloor's attention.*prepare\(model\) first"):
        model.generate(IDS, past_key_values=cache, **GREEDY)
    prepare(model)
    assert torch.equal(model.generate(IDS, past_key_values=cache, **GREEDY), model.generate(IDS, **GREEDY))


# ---- what cannot go on -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_prefix_of_one_goes_on_as_three_only_when_it_is_repeated(family: str) -> None:
    model: Any = prepare(tiny_model(family))
    cache = CompressedCache(model.config, "exact")
    three = torch.cat([IDS[:, :30].expand(3, -1), IDS[:, 30:60].reshape(3, 10)], 1)
    with torch.no_grad():
        model(IDS[:, :30], past_key_values=cache)
        with pytest.raises(ValueError, match=r"holds a batch of 1 and cannot go on with one of 3: .*repeat_interleave"):
            model(three[:, 30:], past_key_values=cache)
        cache.batch_repeat_interleave(3)
        mine = model(three[:, 30:], past_key_values=cache).logits
        right = model(three).logits[:, 30:]
    torch.testing.assert_close(mine, right, rtol=0, atol=1e-4 * float(right.abs().max()))


def _bart() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in _BART.items()}
    config = hf.BartConfig(vocab_size=100, d_model=64, **sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    config.decoder_start_token_id = 1
    model: Any = hf.BartForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = model.generation_config.forced_eos_token_id = None
    return model


_BART = {"layers": 2, "attention_heads": 4, "ffn_dim": 96}


@pytest.mark.parametrize("decoded", [5, 80])
def test_an_encoder_decoder_model_needs_a_cache_for_each(decoded: int) -> None:
    model = _bart()
    right = model.generate(IDS, **GREEDY)
    prepare(model)
    alone = CompressedCache(model.config, "exact")
    with pytest.raises(
        (ValueError, BrokenState), match=r"give an encoder-decoder model EncoderDecoderCache\(CompressedCache"
    ):
        model(IDS, decoder_input_ids=IDS[:, :decoded], past_key_values=alone)
    both = hf.EncoderDecoderCache(CompressedCache(model.config, "exact"), hf.DynamicCache())
    assert torch.equal(model.generate(IDS, **GREEDY, past_key_values=both), right)


@pytest.mark.parametrize("how", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": True}])
def test_assisted_decoding_is_refused(how: dict[str, Any]) -> None:
    model: Any = prepare(tiny_model("llama"))
    options = {name: tiny_model("llama", seed=1) if given is True else given for name, given in how.items()}
    options["eos_token_id"] = 99  # transformers 5.2 needs one for its prompt lookup
    with pytest.raises(ValueError, match="cannot be cropped, as assisted decoding and prompt lookup ask"):
        model.generate(IDS, **GREEDY, **options, past_key_values=CompressedCache(model.config, "exact"))


# ---- images ------------------------------------------------------------------------------------------------


def _gemma3() -> Any:
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    text = heads | {"vocab_size": 120, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}
    text |= {"sliding_window": 16, "pad_token_id": 0}
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = small | {"image_size": 16, "patch_size": 4, "vision_use_head": False}
    types = {"layer_types": ["sliding_attention", "full_attention"] * 2}
    special = {"image_token_index": 110, "boi_token_index": 111, "eoi_token_index": 112, "mm_tokens_per_image": 16}
    config: Any = hf.Gemma3Config(text_config={**text, **types}, vision_config={**vision}, **special)
    model: Any = hf.Gemma3ForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    return model


def test_images_are_refused_before_anything_changes_and_text_goes_on() -> None:
    model = _gemma3()
    ids = IDS[:, :50].clone()
    ids[0, 4:20] = 110
    image = {"pixel_values": torch.randn(1, 3, 16, 16), "token_type_ids": (ids == 110).long()}
    with_image = model.generate(ids, **image, **GREEDY)
    text = model.generate(ids[:, 20:], **GREEDY)
    prepare(model)
    assert torch.equal(model.generate(ids, **image, **GREEDY), with_image)
    cache = CompressedCache(model.config, "exact")
    with pytest.raises(ValueError, match="tokens see each other: give it text alone, or use a stock cache"):
        model.generate(ids, **image, past_key_values=cache, **GREEDY)
    assert cache.bytes == CompressedCache(model.config, "exact").bytes and cache.get_seq_length() == 0
    answer: Tensor = model.generate(ids[:, 20:], past_key_values=cache, **GREEDY)
    assert torch.equal(answer, text)
