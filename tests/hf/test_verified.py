"""Verified decoding says what the exact cache says, whatever drafts; in float64, so that rounding decides nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel, RepetitionPenaltyLogitsProcessor
from transformers.generation.streamers import BaseStreamer

from kvfloor import BrokenState
from kvfloor.hf import CompressedCache, VerifiedCache, VerifiedReport, generate_verified, prepare, restore
from kvfloor.hf.layers import watched_cache
from kvfloor.hf.recording import Recorder
from kvfloor.hf.verified.both import ExactAndBounded
from kvfloor.hf.verified.layer import VerifiedLayer
from kvfloor.methods.grammar import parse
from tests.hf.conftest import Prompt, served, tiny

METHODS = (
    "sinks(2,block=4)@16",
    "h2o(recent=4,block=4):k4v4@50%",
    "exact:k4v4",
    *(
        pytest.param(text, marks=pytest.mark.slow)
        for text in (
            "snapkv(window=4,block=4)@16",
            "window(block=4)+value_sum@16",
            "exact|pages(page=4,pages=2)",
            "quant(bits=4)",
        )
    ),
)
FAMILIES = (  # windows of 16 tokens, sinks, latents; slow: a cap on logits, learned positions, other layouts
    *("gemma3_text", "gpt_oss", "deepseek_v3"),
    *(pytest.param(family, marks=pytest.mark.slow) for family in ("gemma2", "gpt2", "opt", "cohere2", "mixtral")),
)


def exactly(model: PreTrainedModel, prompt: Prompt, new: int, **more: Any) -> Tensor:
    """Return the ids that generate() gives with the exact cache, greedily."""
    given = {"do_sample": False, "max_new_tokens": new, "past_key_values": CompressedCache(model, "exact")}
    with torch.no_grad():
        return model.generate(**prompt, **(given | more))


def verified(
    model: PreTrainedModel, prompt: Prompt, method: Any, new: int, **more: Any
) -> tuple[Tensor, VerifiedReport]:
    told = generate_verified(
        model,
        prompt["input_ids"],
        method,
        attention_mask=prompt.get("attention_mask"),
        max_new_tokens=new,
        return_report=True,
        **more,
    )
    assert isinstance(told, tuple)
    return told


def alone(prompt: Prompt, row: int) -> Prompt:
    """Return one item of a batch without its padding."""
    return {"input_ids": prompt["input_ids"][row : row + 1, prompt["attention_mask"][row].bool()]}


@pytest.fixture
def model() -> PreTrainedModel:
    return prepare(served("llama").double())


@pytest.fixture
def ragged() -> Prompt:
    """Return three prompts of 1, 20 and 40 tokens, left-padded."""
    ids = torch.randint(2, 98, (3, 40), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :39], mask[1, :20] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("method", METHODS)
def test_greedy_tokens_are_those_of_the_exact_cache(model: PreTrainedModel, ragged: Prompt, method: str) -> None:
    ids, report = verified(model, ragged, method, 24, draft=4)
    assert torch.equal(ids, exactly(model, ragged, 24))
    assert any(map(sum, report.accepted)) and report.accepted != report.reached


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_layer_is_served(family: str, ragged: Prompt) -> None:
    """Windows of 16 tokens are shorter than the longest prompt, and longer than the shortest.

    In float32, as transformers' eager attention makes NaN of padding in float64; no two logits are near each other.
    """
    model = prepare(served(family))
    ids, report = verified(model, ragged, "sinks(2,block=4)@16", 24, draft=5)
    assert torch.equal(ids, exactly(model, ragged, 24))
    assert report.least_margin is not None and report.least_margin > 1e-5


def test_a_window_may_be_shorter_than_a_draft(ragged: Prompt) -> None:
    model = prepare(served("gemma3_text").double())
    assert model.config.sliding_window == 16
    ids, _ = verified(model, ragged, "exact:k4v4", 24, draft=20)
    assert torch.equal(ids, exactly(model, ragged, 24))


@pytest.mark.parametrize(("draft", "new"), [(1, 5), (8, 1), (8, 2), (30, 12)])
def test_any_number_of_drafts_and_tokens(model: PreTrainedModel, ragged: Prompt, draft: int, new: int) -> None:
    ids, report = verified(model, ragged, "sinks(2,block=4)@16", new, draft=draft)
    assert torch.equal(ids, exactly(model, ragged, new)) and report.tokens == (new, new, new)
    assert all(len(row) == draft for row in report.reached)


def test_a_verification_over_the_bounded_cache_would_show(
    model: PreTrainedModel, ragged: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mutant: what verifies is what drafts."""
    attend = ExactAndBounded.attend
    monkeypatch.setattr(ExactAndBounded, "attend", lambda self, q, k, v, drafting: attend(self, q, k, v, True))
    ids, _ = verified(model, ragged, "sinks(2,block=4)@16", 24, draft=4)
    assert not torch.equal(ids, exactly(model, ragged, 24))


def test_the_built_in_model_in_its_own_dtype(builtin: tuple[Any, Any]) -> None:
    model, tokenizer = builtin
    text = "the mayor keeps the key under the red mat . " * 12
    prompt = dict(tokenizer(text, return_tensors="pt"))
    prompt = {name: prompt[name] for name in ("input_ids", "attention_mask")}
    ids, report = verified(model, prompt, "snapkv(window=8)@32", 40, eos_token_id=())
    assert torch.equal(ids, exactly(model, prompt, 40, eos_token_id=None))
    assert report.least_margin is not None and report.least_margin > 1e-3


# ---- ends ------------------------------------------------------------------------------------------------------


def test_items_end_at_their_own_stop_tokens(model: PreTrainedModel, ragged: Prompt) -> None:
    free = exactly(model, ragged, 24)[:, 40:]
    stops = [int(free[0, 5]), int(free[2, 13])]
    ids, report = verified(model, ragged, "sinks(2,block=4)@16", 24, draft=6, eos_token_id=stops)
    assert torch.equal(ids, exactly(model, ragged, 24, eos_token_id=stops, pad_token_id=0))
    assert report.tokens[0] <= 6 and len(set(report.tokens)) > 1
    for row, count in enumerate(report.tokens):
        single, _ = verified(model, alone(ragged, row), "sinks(2,block=4)@16", 24, draft=6, eos_token_id=stops)
        assert single[0, -count:].tolist() == ids[row, 40 : 40 + count].tolist()


def test_the_models_own_stop_token_and_pad_token_are_used(model: PreTrainedModel, ragged: Prompt) -> None:
    model.generation_config.eos_token_id = int(exactly(model, ragged, 8, eos_token_id=None)[1, 43])
    model.generation_config.pad_token_id = 7
    ids, report = verified(model, ragged, "exact:k4v4", 24)
    assert torch.equal(ids, exactly(model, ragged, 24)) and report.tokens[1] <= 4
    assert generate_verified(model, ragged["input_ids"], "exact", eos_token_id=(), max_new_tokens=9).shape == (3, 49)


class Kept(BaseStreamer):
    def __init__(self) -> None:
        self.got: list[list[int]] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.got.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


def test_a_streamer_gets_the_prompt_and_each_token(model: PreTrainedModel, ragged: Prompt) -> None:
    prompt, streamer = alone(ragged, 2), Kept()
    ids, _ = verified(model, prompt, "sinks(2,block=4)@16", 11, streamer=streamer)
    assert streamer.got == [prompt["input_ids"][0].tolist(), *([token] for token in ids[0, 40:].tolist())]
    assert streamer.ended


def test_logits_processors_see_the_items_own_tokens(model: PreTrainedModel, ragged: Prompt) -> None:
    repeat = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.7)])
    for row in range(3):
        prompt = alone(ragged, row)
        expected = exactly(model, prompt, 16, repetition_penalty=1.7)
        assert not torch.equal(expected, exactly(model, prompt, 16))
        ids, _ = verified(model, prompt, "sinks(2,block=4)@16", 16, draft=4, logits_processor=repeat)
        assert torch.equal(ids, expected)
    together, _ = verified(model, ragged, "sinks(2,block=4)@16", 16, draft=4, logits_processor=repeat)
    assert torch.equal(together[2:], ids)


# ---- sampling --------------------------------------------------------------------------------------------------


def test_sampling_among_one_token_is_greedy(model: PreTrainedModel, ragged: Prompt) -> None:
    ids, report = verified(model, ragged, "sinks(2,block=4)@16", 16, do_sample=True, top_k=1)
    assert torch.equal(ids, exactly(model, ragged, 16)) and report.least_margin is None


def test_a_seed_decides_the_draws(model: PreTrainedModel, ragged: Prompt) -> None:
    state = torch.random.get_rng_state()
    given = {"do_sample": True, "temperature": 1.3, "top_p": 0.95}

    def drawn(**more: Any) -> list[list[int]]:
        return verified(model, ragged, "sinks(2,block=4)@16", 12, **given, **more)[0].tolist()

    assert drawn(seed=5) == drawn(seed=5) == drawn(generator=torch.Generator().manual_seed(5)) != drawn(seed=6)
    assert torch.equal(state, torch.random.get_rng_state())


# ---- turns, and what the caches hold -----------------------------------------------------------------------------


def test_a_conversation_goes_on_over_turns(model: PreTrainedModel, ragged: Prompt) -> None:
    """Item 0 ends early in the first turn; every item's turns are those of the exact cache, alone."""
    stops = [int(exactly(model, ragged, 8)[0, 42])]
    cache = VerifiedCache(model, "sinks(2,block=4)@16")
    first, report = verified(model, ragged, cache, 9, draft=3, eos_token_id=stops)
    mask = torch.cat([ragged["attention_mask"], torch.zeros(3, first.shape[1] - 40, dtype=torch.int64)], 1)
    for row, count in enumerate(report.tokens):
        mask[row, 40 : 40 + count] = 1
    asks = torch.randint(2, 98, (3, 4), generator=torch.Generator().manual_seed(2))
    second = {"input_ids": torch.cat([first, asks], 1), "attention_mask": torch.cat([mask, torch.ones_like(asks)], 1)}
    ids, more = verified(model, second, cache, 9, draft=3, eos_token_id=stops)
    for row, count in enumerate(more.tokens):
        expected = exactly(model, alone(second, row), 9, eos_token_id=stops)[0, -count:]
        assert ids[row, second["input_ids"].shape[1] :][:count].tolist() == expected.tolist()
        assert cache.tokens[row] == second["input_ids"][row, second["attention_mask"][row].bool()].tolist() + (
            expected[:-1].tolist()
        )


@pytest.mark.parametrize("method", ["h2o(recent=4,block=4)@16", "snapkv(window=4,block=4)@16", "tova(block=4)@16"])
def test_the_bounded_state_holds_what_it_would_of_the_exact_stream(
    model: PreTrainedModel, ragged: Prompt, method: str
) -> None:
    """The oracle feeds a state of its own with what the exact cache's layers received, token by token."""
    prompt = alone(ragged, 2)
    cache = VerifiedCache(model, method)
    ids, _ = verified(model, prompt, cache, 24, draft=4)
    exact, layers = watched_cache(model.config)
    seen = Recorder(layers)
    with torch.no_grad():
        model(ids[:, :40], past_key_values=exact)
        for i in range(40, ids.shape[1] - 1):
            model(ids[:, i : i + 1], past_key_values=exact)
    for layer in cache.verified_layers:
        assert isinstance(layer.tokens, ExactAndBounded)
        bounded, (q, k, v) = layer.tokens.bounded, seen.of(layer.index).by_row
        own = parse(method).open(bounded.spec)
        own.step(q[:, :, :40], k[:, :40], v[:, :40])
        own.seal()
        for i in range(40, k.shape[1]):
            own.step(q[:, :, i : i + 1], k[:, i : i + 1], v[:, i : i + 1])
        assert bounded.slots is not None and own.slots is not None
        assert torch.equal(bounded.seen, own.seen)
        held, expected = (state.slots.positions(None, int(state.held.max())).sort(1).values for state in (bounded, own))
        assert torch.equal(held, expected)
        assert int(layer.tokens.exact.seen[0]) == ids.shape[1] - 1 == len(cache.tokens[0])


def test_the_report_adds_up(model: PreTrainedModel, ragged: Prompt) -> None:
    cache = VerifiedCache(model, "sinks(2,block=4)@16")
    _, report = verified(model, ragged, cache, 20, draft=4)
    assert report.tokens == (20, 20, 20) and report.verifications == max(report.rounds)
    for row in range(3):
        # One token comes from the prompt and one after the drafts of a round, but for a last round that needs none.
        assert sum(report.accepted[row]) + report.rounds[row] + 1 in (20, 21)
        assert list(report.reached[row]) == sorted(report.reached[row], reverse=True)
    assert report.hot_bytes == sum(x.tokens.bounded.nbytes for x in cache.verified_layers)  # pyright: ignore
    assert 0 < report.hot_bytes < report.cold_bytes == cache.cold_bytes
    assert report.tokens_per_verification == 57 / sum(report.rounds)
    assert all(0 <= share <= 1 for share in report.acceptance)
    exact = verified(model, ragged, "exact", 20, draft=4)[1]
    assert exact.accepted == exact.reached and exact.verifications == 4


# ---- errors ----------------------------------------------------------------------------------------------------


class Stop(BaseException):
    """Stand in for Ctrl-C."""


def breaking(monkeypatch: pytest.MonkeyPatch, name: str, after: int) -> None:
    """Make the method `name` of a layer raise Stop at its call number `after`, counted from 0."""
    calls, before = [0], getattr(VerifiedLayer, name)

    def call(self: VerifiedLayer, *args: Any, **more: Any) -> Any:
        calls[0] += 1
        if calls[0] == after + 1:
            raise Stop
        return before(self, *args, **more)

    monkeypatch.setattr(VerifiedLayer, name, call)


@pytest.mark.parametrize("after", [4 + 2, 4 * 5 + 1, 4 * 6 + 3])  # in a draft, in the verification, in the next draft
def test_an_interrupted_draft_or_verification_changes_nothing(
    model: PreTrainedModel, ragged: Prompt, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    prompt, cache = alone(ragged, 2), VerifiedCache(model, "h2o(recent=4,block=4)@16")
    with monkeypatch.context() as patch:
        breaking(patch, "answer", after)
        with pytest.raises(Stop):
            verified(model, prompt, cache, 24, draft=4)
    held = len(cache.tokens[0])
    assert held >= 40
    whole = exactly(model, prompt, 24)
    assert cache.tokens[0] == whole[0, :held].tolist()
    rest, _ = verified(model, {"input_ids": whole[:, : held + 1]}, cache, 63 - held, draft=4)
    assert torch.equal(rest, whole)


@pytest.mark.parametrize(("name", "after"), [("commit", 1), ("answer", 2)])  # in a commit, in the prompt
def test_a_commit_or_prompt_that_broke_off_is_told(
    model: PreTrainedModel, ragged: Prompt, monkeypatch: pytest.MonkeyPatch, name: str, after: int
) -> None:
    cache = VerifiedCache(model, "h2o(recent=4,block=4)@16")
    with monkeypatch.context() as patch:
        breaking(patch, name, after)
        with pytest.raises(Stop):
            verified(model, ragged, cache, 24, draft=4)
    with pytest.raises(BrokenState, match="broke off"):
        verified(model, ragged, cache, 24, draft=4)
    cache.reset()
    assert torch.equal(verified(model, ragged, cache, 24, draft=4)[0], exactly(model, ragged, 24))


def test_a_prompt_that_no_layer_took_leaves_the_cache_empty(
    model: PreTrainedModel, ragged: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = VerifiedCache(model, "exact:k4v4")
    with monkeypatch.context() as patch:
        breaking(patch, "answer", 0)
        with pytest.raises(Stop):
            verified(model, ragged, cache, 8)
    assert cache.tokens == [] and verified(model, ragged, cache, 8)[0].shape == (3, 48)


IDS = torch.tensor([[5, 6, 7], [8, 9, 10]])


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"draft": 0}, ValueError, "draft"),
        ({"draft": True}, ValueError, "draft"),
        ({"draft": 2.0}, ValueError, "draft"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens"),
        ({"method": "h2p@512"}, ValueError, "h2o"),
        ({"method": 7}, TypeError, "Method"),
        ({"method": "h2o"}, ValueError, "budget"),
        ({"ids": [[1, 2]]}, TypeError, "tensor"),
        ({"ids": IDS.float()}, TypeError, "float32"),
        ({"ids": IDS[0]}, ValueError, "batch"),
        ({"ids": IDS[:, :0]}, ValueError, "at least one token"),
        ({"ids": IDS[:0]}, ValueError, "at least one token"),
        ({"ids": IDS + 95}, ValueError, "0 .. 99"),
        ({"ids": -IDS}, ValueError, "0 .. 99"),
        ({"attention_mask": IDS[:, :2]}, ValueError, "match"),
        ({"attention_mask": [[1, 1, 1]] * 2}, TypeError, "attention_mask"),
        ({"attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])}, ValueError, "without a token"),
        ({"streamer": Kept()}, ValueError, "one batch item"),
        ({"streamer": print, "ids": IDS[:1]}, TypeError, "BaseStreamer"),
        ({"temperature": 0.5}, ValueError, "do_sample"),
        ({"do_sample": True, "temperature": 0.0}, ValueError, "temperature"),
        ({"do_sample": True, "temperature": "hot"}, TypeError, "temperature"),
        ({"do_sample": True, "top_p": 1.5}, ValueError, "top_p"),
        ({"do_sample": True, "top_k": -1}, ValueError, "top_k"),
        ({"do_sample": True, "seed": 1, "generator": torch.Generator()}, ValueError, "not both"),
        ({"do_sample": True, "generator": 4}, TypeError, "torch.Generator"),
        ({"eos_token_id": ["end"]}, TypeError, "eos_token_id"),
        ({"pad_token_id": "pad"}, TypeError, "pad_token_id"),
    ],
)
def test_bad_input_is_named(model: PreTrainedModel, change: dict[str, Any], error: type[Exception], said: str) -> None:
    given = {"ids": IDS, "method": "exact:k4v4", "max_new_tokens": 2} | change
    with pytest.raises(error, match=said):
        generate_verified(model, **given)


def test_a_cache_goes_on_with_its_own_conversation_only(model: PreTrainedModel) -> None:
    cache = VerifiedCache(model, "exact:k4v4")
    ids = generate_verified(model, IDS, cache, max_new_tokens=3, eos_token_id=())
    assert isinstance(ids, Tensor)
    for other in (IDS, ids[:, :-1], ids + (ids == 6), ids[:1]):
        with pytest.raises(ValueError, match=r"this cache|must begin"):
            generate_verified(model, other, cache)
    with pytest.raises(ValueError, match="context"):
        generate_verified(model, ids, cache, context=9)
    assert generate_verified(model, ids, cache, max_new_tokens=3, eos_token_id=()).shape == (2, 9)


@pytest.mark.parametrize("family", ["lfm2", "gemma3n_text", "llama4_text", "falcon_h1"])
def test_layers_that_cannot_take_drafts_back_are_refused(family: str) -> None:
    model = prepare(served(family))
    with pytest.raises(ValueError, match=r"generate_verified"):
        generate_verified(model, IDS, "exact:k4v4")


def test_encoder_decoders_are_refused() -> None:
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = {"vocab_size": 100, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 64}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    with pytest.raises(ValueError, match="encoder-decoder"):
        generate_verified(prepare(BartForConditionalGeneration(BartConfig(**sizes, **heads)).eval()), IDS, "exact")


def test_a_model_must_be_prepared_and_stay_so(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="prepare"):
        generate_verified(tiny(), IDS, "exact")
    cache = VerifiedCache(model, "exact:k4v4")
    ids = generate_verified(model, IDS, cache, max_new_tokens=2, eos_token_id=())
    assert isinstance(ids, Tensor)
    restore(model)
    with pytest.raises(RuntimeError, match="prepare"):
        generate_verified(model, ids, cache)
    prepare(model)
    assert generate_verified(model, ids, cache, max_new_tokens=2, eos_token_id=()).shape == (2, 7)


def test_autocast_and_a_full_table_of_positions_are_refused() -> None:
    model = prepare(served("gpt2"))
    with torch.autocast("cpu"), pytest.raises(ValueError, match="autocast"):
        generate_verified(model, IDS, "exact")
    with pytest.raises(ValueError, match="256 positions"):
        generate_verified(model, IDS, "exact", max_new_tokens=255)


def test_the_cache_is_for_generate_verified_alone(model: PreTrainedModel) -> None:
    cache = VerifiedCache(model, "exact:k4v4")
    with pytest.raises(ValueError, match="generate_verified alone"):
        model(IDS, past_key_values=cache)
    generate_verified(model, IDS, cache, max_new_tokens=2)
    for change in (
        lambda: cache.crop(-1),
        lambda: cache.reorder_cache(torch.tensor([1, 0])),
        lambda: cache.batch_repeat_interleave(2),
        lambda: cache.batch_select_indices(torch.tensor([0])),
    ):
        with pytest.raises(ValueError, match="cannot be"):
            change()
