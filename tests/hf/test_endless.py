"""Positions within the cache: a stream without an end answers as its window fed afresh; refusals say why."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvfloor.core.rotation import Rotation
from kvfloor.hf import CompressedCache, prepare
from kvfloor.hf.positions import Memo, TurnBack, plain, rotations, table_room
from survey import conversations
from survey.tiny import families, tiny_model
from tests.hf.conftest import served, tiny

SINKS, BUDGET = 3, 16
METHOD = f"sinks({SINKS},block=1)@{BUDGET}"
PIECES = (37, 1, 1, 20, 1, 200, 1, 30)  # tokens per forward: 291, past the 256 positions of a tiny model
ROTARY = (
    "llama", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "cohere", "glm", "helium", "gpt_neox", "phi",
    "stablelm", "smollm3", "nanochat", "gpt_oss", "deepseek_v2", "deepseek_v3", "olmo2", "granite",
)  # fmt: skip
MORE = ("gemma3n_text", "gemma4_text", "zamba2", "granitemoehybrid", "jamba", "mixtral")  # exact only


def known(names: tuple[str, ...]) -> list[str]:
    return [name for name in names if name in families()]


def one_layer(family: str, **changes: Any) -> PreTrainedModel:
    """A tiny model whose only layer attends to everything: no token's key depends on what came before it."""
    declared: dict[str, Any] = {}
    if family in ("gemma2", "gemma3_text", "gpt_oss"):
        declared = {"layer_types": ["full_attention"], "sliding_window": 24}
    if family in ("deepseek_v2", "deepseek_v3"):
        declared = {"first_k_dense_replace": 1}
    return tiny_model(family, num_hidden_layers=1, **declared, **changes)


def some(n: int, seed: int = 3, batch: int = 1) -> Tensor:
    return torch.randint(2, 98, (batch, n), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def streamed(model: Any, cache: CompressedCache, ids: Tensor, pieces: tuple[int, ...] = PIECES, **more: Any) -> Tensor:
    """Logits (tokens, vocabulary) of one row, a forward per piece."""
    parts = ids.split(pieces, 1)
    return torch.cat([model(part, past_key_values=cache, **more).logits[0] for part in parts])


@torch.inference_mode()
def afresh(model: Any, ids: Tensor, at: int) -> Tensor:
    """The logits after token `at`, where the sinks and the newest tokens are all there is."""
    window = ids[:, : at + 1]
    if at + 1 > BUDGET + 1:  # the token itself beside what the budget holds
        window = torch.cat([ids[:, :SINKS], ids[:, at + 1 - (BUDGET + 1 - SINKS) : at + 1]], 1)
    return model(window, use_cache=False).logits[0, -1]


def agree(mine: Tensor, theirs: Tensor, tolerance: float = 2e-5) -> bool:
    return bool((mine - theirs).abs().max() <= tolerance * theirs.abs().max())


PLACES = (0, 15, 16, 17, 40, 59, 130, 255, 256, 259, 290)


@pytest.mark.parametrize("family", known(ROTARY))
def test_a_long_stream_answers_as_its_window_fed_afresh(family: str) -> None:
    stock, model = one_layer(family), prepare(one_layer(family))
    ids = some(sum(PIECES))
    logits = streamed(model, CompressedCache(model, METHOD, positions="cache"), ids)
    expected = [afresh(stock, ids, at) for at in PLACES]
    assert all(agree(logits[at], one) for at, one in zip(PLACES, expected, strict=True))
    if rotations(model) != [None]:
        drifting = streamed(model, CompressedCache(model, METHOD), ids)
        assert not agree(drifting[290], expected[-1], 1e-3)  # the comparison sees what turning changes


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=lambda scaling: scaling["rope_type"],
)  # fmt: skip
def test_scalings_whose_frequencies_are_fixed_are_served(scaling: dict[str, Any]) -> None:
    changes = {"rope_parameters": scaling | {"rope_theta": 10000.0}}
    stock, model = one_layer("llama", **changes), prepare(one_layer("llama", **changes))
    assert rotations(model) != rotations(prepare(one_layer("llama")))
    ids = some(sum(PIECES))
    logits = streamed(model, CompressedCache(model, METHOD, positions="cache"), ids)
    assert all(agree(logits[at], afresh(stock, ids, at)) for at in PLACES)


@pytest.mark.parametrize("far", [10**6 + 3, 2**24 + 5, 10**9])
def test_a_stream_is_exact_however_far_it_is(far: int) -> None:
    """Angles at such positions are rounded in float32 by whole radians; turned back with the same rounding."""
    model = prepare(one_layer("llama"))
    ids = some(120)
    near = streamed(model, CompressedCache(model, METHOD, positions="cache"), ids, (120,))
    there = torch.arange(far, far + 120).unsqueeze(0)
    away = streamed(model, CompressedCache(model, METHOD, positions="cache"), ids, (120,), position_ids=there)
    assert agree(away, near)
    drifting = streamed(model, CompressedCache(model, "exact"), ids, (120,), position_ids=there)
    assert not agree(drifting, streamed(model, CompressedCache(model, "exact"), ids, (120,)), 1e-3)


@cache
def chunks_shift_positions() -> bool:
    """Whether this release's own generate() answers otherwise where it feeds the prompt in chunks (5.2: by one)."""
    model = tiny_model("llama")
    whole, chunks = (run(model, None) for run in (conversations.by_generate, conversations.in_chunks))
    return conversations.difference(chunks, whole) > 1e-4


@pytest.mark.parametrize("family", (*ROTARY, *MORE))
def test_while_nothing_leaves_it_is_the_stock_model(family: str) -> None:
    stock, model = served(family), prepare(served(family))
    for run in conversations.RUNS:
        right = run
        if run is conversations.in_chunks and chunks_shift_positions():
            if len(CompressedCache(model, "exact").compressed) < model.config.get_text_config().num_hidden_layers:
                continue  # its sliding layers are transformers' own, and are given the shifted positions
            right = conversations.by_generate  # ranks in the cache do not shift
        mine = run(model, CompressedCache(model, "exact", positions="cache"))
        assert conversations.difference(mine, right(stock, None)) < 1e-4


@pytest.mark.parametrize("method", ["sinks(2,block=4)@16", "h2o(recent=4,block=4)@16", "tova(block=4)@24"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "cohere"])
def test_padded_rows_and_chunks_change_nothing(family: str, method: str) -> None:
    model = prepare(tiny_model(family))
    ids, mask = some(90, batch=2), torch.ones(2, 90, dtype=torch.int64)
    ids[0, :25], mask[0, :25] = 0, 0

    @torch.inference_mode()
    def logits(pieces: list[int], rows: slice, start: int = 0) -> Tensor:
        cache: Any = CompressedCache(model, method, positions="cache", requests=[0, 1][rows])
        out, stop = [], start
        for piece in pieces:
            at, stop = stop, stop + piece
            place = (mask[rows, start:stop].cumsum(1) - 1).clamp_min(0)[:, at - start :]
            out.append(
                model(
                    ids[rows, at:stop],
                    attention_mask=mask[rows, start:stop],
                    position_ids=place,
                    past_key_values=cache,
                ).logits
            )
        return torch.cat(out, 1)

    whole = logits([90], slice(0, 2))
    pieces = logits([30, 1, 1, 8, 50], slice(0, 2))
    alone = logits([65], slice(0, 1), start=25)
    assert agree(pieces[1], whole[1]) and agree(pieces[0, 25:], whole[0, 25:])
    assert agree(alone[0], whole[0, 25:])


def test_a_saved_cache_and_copies_and_beams_go_on(tmp_path: Path) -> None:
    model, ids = prepare(tiny_model("llama")), some(80)
    cache = CompressedCache(model, "h2o(recent=4,block=4)@16", positions="cache")
    with torch.no_grad():
        model(ids[:, :50], past_key_values=cache)
        cache.save(tmp_path / "cache")
        loaded, copied = CompressedCache.load(tmp_path / "cache", model), copy.deepcopy(cache)
        expected = model(ids[:, 50:], past_key_values=cache).logits
        for other in (loaded, copied):
            assert torch.equal(model(ids[:, 50:], past_key_values=other).logits, expected)
    cache = CompressedCache(model, "sinks(4,block=4)@16", positions="cache")
    out = model.generate(ids, past_key_values=cache, num_beams=3, max_new_tokens=20, do_sample=False)
    assert out.shape == (1, 100) and int(cache.compressed[0].state.held.max()) <= 20  # type: ignore[union-attr]


def test_decoding_answers_as_the_chunks_do() -> None:
    model, ids = prepare(tiny_model("llama")), some(40)
    cache = CompressedCache(model, "sinks(4,block=4)@16", positions="cache")
    out: Any = model.generate(
        ids,
        past_key_values=cache,
        max_new_tokens=300,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    again = streamed(model, CompressedCache(model, "sinks(4,block=4)@16", positions="cache"), out.sequences, (340,))
    assert agree(torch.cat(out.logits), again[39:-1])


def test_positions_are_taken_anew_in_every_forward() -> None:
    """A caller may count one tensor of positions up in place."""
    model, ids = prepare(one_layer("llama")), some(60)
    expected = streamed(model, CompressedCache(model, METHOD, positions="cache"), ids, (60,))
    cache, place, out = CompressedCache(model, METHOD, positions="cache"), torch.zeros(1, 1, dtype=torch.int64), []
    with torch.inference_mode():
        for token in ids.split(1, 1):
            out.append(model(token, position_ids=place, past_key_values=cache).logits[0])
            place += 1
    assert agree(torch.cat(out), expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.06), (torch.float16, 0.01)])
def test_half_precision_is_served(dtype: torch.dtype, tolerance: float) -> None:
    stock, model = one_layer("llama"), prepare(one_layer("llama").to(dtype))
    model.model.rotary_emb.inv_freq = stock.model.rotary_emb.inv_freq.clone()  # as from_pretrained keeps it
    ids = some(sum(PIECES))
    logits = streamed(model, CompressedCache(model, METHOD, positions="cache"), ids).float()
    assert all(agree(logits[at], afresh(stock, ids, at), tolerance) for at in PLACES)
    assert not agree(
        streamed(model, CompressedCache(model, METHOD), ids).float()[290], afresh(stock, ids, 290), tolerance
    )


def test_memory_counts_the_keys_as_they_came() -> None:
    model, ids = prepare(tiny_model("llama")), some(60)
    held = []
    for positions in ("stream", "cache"):
        cache = CompressedCache(model, "sinks(4,block=4)@16", positions=positions)  # type: ignore[arg-type]
        streamed(model, cache, ids, (60,))
        held.append(cache.nbytes)
    keys = 4 * 2 * (16 + 4) * 16 * 4  # layers, kv heads, slots, width, bytes
    assert held[1] - held[0] == keys
    in_bytes = CompressedCache(model, "sinks(4,block=4)@64KiB", positions="cache")
    streamed(model, in_bytes, some(200), (200,))
    assert 48 * 1024 < in_bytes.nbytes <= 64 * 1024


# ---- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("gpt2", {}, "learned table of 256 positions"),
        ("opt", {}, "learned table of 256 positions"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "dynamic NTK"),
        (
            "phi3",
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "short_factor": [1.0] * 8,
                    "long_factor": [2.0] * 8,
                    "original_max_position_embeddings": 64,
                }
            },
            "LongRoPE",
        ),
        ("ministral3", {}, "does not turn its keys and queries by one rotation"),  # scales queries by position
        ("llama4_text", {}, "passes no position_ids"),
    ],
)
def test_models_whose_positions_are_no_fixed_rotation_are_refused(
    family: str, changes: dict[str, Any], reason: str
) -> None:
    if family not in families():
        pytest.skip("this release does not know the family")
    model = prepare(tiny_model(family, **changes))
    with pytest.raises(ValueError, match=reason):
        CompressedCache(model, METHOD, positions="cache")


def test_what_must_be_given_is_named() -> None:
    model = tiny()
    with pytest.raises(ValueError, match="give the model, prepared"):
        CompressedCache(model, METHOD, positions="cache")
    prepare(model)
    with pytest.raises(ValueError, match="give the model, prepared"):
        CompressedCache(model.config, METHOD, positions="cache")
    with pytest.raises(ValueError, match='"stream" or in the "cache", got \'here\''):
        CompressedCache(model, METHOD, positions="here")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"call model\.eval"):
        CompressedCache(model.train(), METHOD, positions="cache")


@pytest.mark.parametrize("method", ["quant", "subgen_sketch", "exact|pages", "window+taylor@64", "window+less@64"])
def test_methods_that_cannot_turn_keys_are_refused_by_name(method: str) -> None:
    with pytest.raises(ValueError, match=r"turns every key .* does not hold them whole"):
        CompressedCache(prepare(tiny()), method, positions="cache")


class Twisted(nn.Module):
    """A rotary module whose angles are not what its frequencies say."""

    def __init__(self, inner: nn.Module, wrong: str) -> None:
        super().__init__()
        self.inner, self.wrong = inner, wrong

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.inner(x, position_ids * 2 if self.wrong == "faster" else position_ids)
        if self.wrong == "one pair":
            cos, sin = cos.clone(), sin.clone()
            cos[..., 3], sin[..., 3] = 1.0, 0.0
        return (cos, sin) if self.wrong != "larger" else (cos * (1 + position_ids[..., None] / 64), sin)


@pytest.mark.parametrize("wrong", ["faster", "one pair", "larger"])
def test_a_turn_that_the_models_frequencies_do_not_explain_is_refused(wrong: str) -> None:
    model = prepare(tiny())
    model.model.rotary_emb = Twisted(model.model.rotary_emb, wrong)
    with pytest.raises(ValueError, match="layer 0 does not turn its keys"):
        CompressedCache(model, METHOD, positions="cache")


def test_positions_that_enter_the_hidden_states_are_refused() -> None:
    model = prepare(tiny())

    def added(module: nn.Module, given: tuple[Tensor, ...], named: dict[str, Any]) -> Any:
        return (given[0] + 0.1 * named["position_ids"].unsqueeze(-1), *given[1:]), named

    model.model.layers[1].register_forward_pre_hook(added, with_kwargs=True)
    with pytest.raises(ValueError, match="positions enter its hidden states"):
        CompressedCache(model, METHOD, positions="cache")


def test_positions_of_images_are_refused_and_those_of_text_are_not() -> None:
    text = torch.arange(5).expand(3, 2, 5)
    assert torch.equal(plain(text), torch.arange(5).expand(2, 5))
    other = text.clone()
    other[1, 0, 2] += 1
    turn = TurnBack(Rotation((1.0,)), 0, Memo())
    x = torch.randn(2, 1, 5, 2)
    with pytest.raises(ValueError, match="those of images"):
        turn(x, x, x, other)
    with pytest.raises(ValueError, match="no position_ids"):
        turn(x, x, x, None)


# ---- a table's end -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_bigcode", "biogpt"])
def test_a_table_that_is_used_up_is_said_before_it_is_overrun(family: str) -> None:
    model, ids = prepare(tiny_model(family)), some(250)
    room = table_room(model)
    assert room == 256
    cache = CompressedCache(model.config, METHOD)
    out = model.generate(ids, past_key_values=cache, max_new_tokens=7, do_sample=False)  # to the last position
    assert out.shape == (1, 257)
    with pytest.raises(ValueError, match="learned table of 256 positions"), torch.inference_mode():
        model(out[:, -1:], past_key_values=cache)
    cache.reset()
    with torch.inference_mode():
        model(ids, past_key_values=cache)


def test_models_without_a_table_have_none() -> None:
    assert table_room(tiny()) is None and table_room(None) is None
