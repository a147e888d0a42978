"""Families: the survey's checks on a dozen of them, its committed results, refusals, and mutants that it rejects.

The slow suite runs the survey over every family of the installed release and compares it with docs/models/.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from kvfloor.hf import CompressedCache, families, prepare
from kvfloor.hf.layer import CompressedLayer
from kvfloor.hf.masks import LazyMask
from kvfloor.hf.prepare import attention
from survey import conversations
from survey import families as survey
from survey.tiny import cycled, tiny_config, tiny_model

COMMITTED = {path.stem: json.loads(path.read_text()) for path in Path("docs/models").glob("*.json")}
INSTALLED = transformers.__version__
# One of each kind: grouped heads, latents, positions, softcap, sinks, chunks, shared keys, linear, convolution, hybrid.
REPRESENTATIVES = (
    "cohere2 deepseek_v3 falcon_h1 gemma2 gemma3n_text gemma4_text gpt2 gpt_oss lfm2 llama4_text mixtral opt qwen3_moe "
    "qwen3_next"
).split()
NAMED = (
    "llama llama4_text mistral mixtral qwen2 qwen2_moe qwen3 qwen3_moe gemma gemma2 gemma3_text phi phi3 phimoe gpt2 "
    "gpt_neox gpt_oss olmo olmo2 olmo3 olmoe cohere cohere2 glm glm4 glm4_moe granite granitemoe starcoder2 smollm3 "
    "helium stablelm persimmon ernie4_5 seed_oss hunyuan_v1_dense arcee apertus exaone4 bitnet dots1 opt "
    "ministral gemma3n_text deepseek_v2 deepseek_v3 glm4_moe_lite longcat_flash youtu"
).split()
NAMED_SINCE_LATER = (
    "gemma4_text nemotron qwen3_next qwen3_5_text lfm2 bamba falcon_h1 zamba zamba2 jamba gpt_bigcode minimax_m2"
).split()


def committed(family: str, release: str = INSTALLED) -> dict[str, Any] | None:
    rows = COMMITTED[release]["rows"] if release in COMMITTED else []
    return next((row for row in rows if row["family"] == family), None)


def agrees(found: survey.Finding) -> None:
    """What is measured now is what was committed for this release, to the figures' rounding."""
    row = committed(found.family)
    assert row is not None, f"{found.family} is not in docs/models/{INSTALLED}.json: run make models"
    assert (found.verdict, found.layers, found.held) == (row["verdict"], row["layers"], row["held"])
    if found.verdict == "identical":
        assert found.difference is not None and found.difference <= survey.TOLERANCE
        assert found.evicted is not None and found.evicted > 100 * survey.TOLERANCE  # so that a wrong layer would show


@pytest.mark.parametrize("family", REPRESENTATIVES)
def test_a_family_is_what_the_table_says(family: str) -> None:
    if family not in survey.families():
        pytest.skip(f"transformers {INSTALLED} does not know {family}")
    agrees(survey.look_at(family))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_family_is_what_the_table_says() -> None:
    for found in survey.survey():
        agrees(found)


def test_the_table_has_every_family_of_the_installed_release() -> None:
    assert INSTALLED in COMMITTED, f"docs/models has {sorted(COMMITTED)}, installed is {INSTALLED}: run make models"
    assert sorted(row["family"] for row in COMMITTED[INSTALLED]["rows"]) == survey.families()


@pytest.mark.parametrize("release", COMMITTED)
def test_the_table_keeps_what_was_promised(release: str) -> None:
    rows = {row["family"]: row for row in COMMITTED[release]["rows"]}
    assert len(COMMITTED) == 2
    assert not [family for family, row in rows.items() if row["verdict"] == "differs"]
    identical = {family for family, row in rows.items() if row["verdict"] == "identical"}
    named = {*NAMED, *(() if release == min(COMMITTED) else NAMED_SINCE_LATER)}
    assert named <= identical
    assert all(rows[family]["difference"] <= survey.TOLERANCE for family in identical)
    assert all(rows[family]["evicted"] > 100 * survey.TOLERANCE for family in identical)
    assert all(row["reason"] for family, row in rows.items() if family not in identical)


# ---- mutants: one wrong line each, which the survey must tell from the right one -------------------------------


def _without(name: str) -> Any:
    right = CompressedLayer.answer

    def answer(
        self: CompressedLayer, query: Any, key: Any, value: Any, padding: Any, scale: Any, softcap: Any, sink: Any
    ):
        given = {"padding": padding, "softcap": softcap, "sink": sink} | {name: None}
        return right(self, query, key, value, given["padding"], scale, given["softcap"], given["sink"])

    return answer


@pytest.mark.parametrize(("family", "forgotten"), [("gpt_oss", "sink"), ("gemma2", "softcap"), ("qwen3", "padding")])
def test_a_forgotten_argument_shows(monkeypatch: pytest.MonkeyPatch, family: str, forgotten: str) -> None:
    monkeypatch.setattr(CompressedLayer, "answer", _without(forgotten))
    found = survey.look_at(family)
    assert found.verdict == "differs" and (found.difference or 1.0) > 10 * survey.TOLERANCE


def test_readers_that_see_the_whole_forward_show(monkeypatch: pytest.MonkeyPatch) -> None:
    right = CompressedLayer._answer_reader

    def late(self: CompressedLayer, *arguments: Any) -> Any:
        assert self.state is not None
        self._before = self.state.clone()
        return right(self, *arguments)

    monkeypatch.setattr(CompressedLayer, "_answer_reader", late)
    assert survey.look_at("gemma3n_text").verdict == "differs"


# ---- sink logits -----------------------------------------------------------------------------------------------


def test_a_sink_is_one_more_logit_without_a_value() -> None:
    model = prepare(tiny_model("llama"))
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 5, 16, generator=draw) for heads in (4, 2, 2))
    sink = torch.tensor([-1.0, 0.0, 1.0, 30.0])
    layer = CompressedCache(model.config, "exact").compressed[0]
    keys, values = layer.update(k, v)
    out = layer.answer(q, keys, values, None, 0.25, None, sink)
    logits = torch.einsum("bhid,bhjd->bhij", q, k.repeat_interleave(2, 1)) * 0.25
    logits = logits.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    weights = torch.cat([logits, sink.view(1, 4, 1, 1).expand(2, 4, 5, 1)], -1).softmax(-1)[..., :-1]
    wanted = (weights @ v.repeat_interleave(2, 1)).transpose(1, 2)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-6)


# ---- layers ----------------------------------------------------------------------------------------------------


def test_only_full_attention_is_compressed() -> None:
    roles = [role for role, _ in families.layer_roles(tiny_config("gemma3_text"))]
    assert roles == ["own", "full", "own", "full"]
    with pytest.raises(ValueError, match="no full-attention layer"):
        CompressedCache(tiny_config("mistral", sliding_window=8), "exact")


def test_who_reads_whose_keys() -> None:
    assert families.key_readers(tiny_config("gemma3n_text"))[:4] == [0, 0, 1, 1]
    assert not any(families.key_readers(tiny_config("llama")))


def test_a_reader_leaves_no_trace() -> None:
    """What the keys' owner keeps does not depend on the layers that read it, and nothing of theirs stays."""
    model = prepare(tiny_model("gemma3n_text"))
    cache = CompressedCache(model.config, "h2o(recent=4,block=8)@16")
    conversations.by_forwards(model, cache)
    owner = cache.compressed[-1]
    assert owner._readers == 1 and owner._before is None and owner.state is not None
    assert int(owner.state.seen.max()) == conversations.PROMPT + conversations.TURN


def test_keys_asked_twice_without_announcement_are_refused() -> None:
    layer = CompressedCache(tiny_config("llama"), "exact").compressed[0]
    q, k = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 3, 16)
    keys, values = layer.update(k, k)
    layer.answer(q, keys, values, None, 0.25, None)
    with pytest.raises(RuntimeError, match="asked again"):
        layer.answer(q, keys, values, None, 0.25, None)


def test_layer_types_in_turn() -> None:
    assert cycled(["full_attention", "conv", "full_attention"], 4) == ["conv", "full_attention"] * 2


def test_beams_reorder_both_halves_of_a_hybrid_layer() -> None:
    family = "falcon_h1"
    if families.own_cache_class(tiny_model(family)):
        pytest.skip(f"refused with transformers {INSTALLED}")
    ids, mask = conversations.prompt(20)
    options: dict[str, Any] = {"attention_mask": mask, "num_beams": 3, "max_new_tokens": 8, "do_sample": False}
    stock = tiny_model(family).generate(ids, **options)
    model = prepare(tiny_model(family))
    assert torch.equal(model.generate(ids, **options, past_key_values=CompressedCache(model.config, "exact")), stock)


def test_a_hybrid_layer_forgets_both_halves() -> None:
    model = tiny_model("falcon_h1")
    if families.own_cache_class(model):
        pytest.skip(f"refused with transformers {INSTALLED}")
    cache = CompressedCache(prepare(model).config, "exact")
    with torch.inference_mode():
        first = conversations.by_forwards(model, cache)
        cache.reset()
        assert torch.equal(conversations.by_forwards(model, cache).logits, first.logits)


# ---- refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("bloom", "BloomForCausalLM ignores"),
        ("codegen", "CodeGenForCausalLM ignores"),
        ("falcon", "FalconForCausalLM ignores"),
        ("gptj", "GPTJForCausalLM ignores"),
        ("mpt", "MptForCausalLM ignores"),
        ("glm_moe_dsa", "indexer"),
        ("doge", "mask of its own"),
        ("jetmoe", "repeats its keys"),
        ("mamba", "ignores|no full-attention"),
    ],
)
def test_a_family_is_refused_by_name(family: str, why: str) -> None:
    found = survey.look_at(family)
    assert found.verdict == "refused"
    assert re.search(why, found.reason)


def test_sparse_attention_is_refused_by_both_ends() -> None:
    if "deepseek_v32" not in CONFIG_MAPPING:
        pytest.skip("this release of transformers has no such family")
    config = tiny_config("deepseek_v32")
    with pytest.raises(ValueError, match="deepseek_v32 models cannot have a compressed cache: its attention is sparse"):
        CompressedCache(config, "exact")
    with pytest.raises(ValueError, match="DeepseekV32ForCausalLM cannot have a compressed cache: its attention is spa"):
        prepare(AutoModelForCausalLM.from_config(config))


def test_what_only_the_call_tells_is_refused_there() -> None:
    layer = CompressedCache(tiny_config("llama"), "exact").compressed[0]
    module = torch.nn.Linear(1, 1)
    q, k = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 3, 16)
    keys, values = layer.update(k, k)
    with pytest.raises(ValueError, match="bias by position"):
        attention(module, q, keys, values, None, position_bias=torch.zeros(1, 4, 3, 3))
    keys, values = layer.update(k, k)
    with pytest.raises(ValueError, match="looks ahead"):
        attention(module, q, keys, values, None, is_causal=False)
    short = LazyMask({"attention_mask": torch.ones(1, 2, dtype=torch.bool)})
    keys, values = layer.update(k, k)
    with pytest.raises(ValueError, match="mask has 2 slots and the cache 3"):
        attention(module, q, keys, values, short)


def test_a_rule_that_adds_nothing_is_plain_and_one_that_adds_is_refused() -> None:
    """As with images whose tokens see each other: a prompt of text alone is served."""
    model = prepare(tiny_model("llama"))
    right = conversations.by_forwards(model, CompressedCache(model.config, "exact"))
    create = vars(sys.modules[type(model).__module__])["create_causal_mask"]

    def beside(rule: Callable[..., Any]) -> conversations.Heard:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                sys.modules[type(model).__module__],
                "create_causal_mask",
                lambda **given: create(**given, or_mask_function=rule),
            )
            return conversations.by_forwards(model, CompressedCache(model.config, "exact"))

    assert torch.equal(beside(lambda batch, head, q, k: (q < 5) & (k < 0)).logits, right.logits)
    with pytest.raises(ValueError, match="plain causal rule"):
        beside(lambda batch, head, q, k: (q < 5) & (k < 5))


def test_a_survey_of_an_unknown_family_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        survey.main(["lama"])
    assert stopped.value.code == 2 and "no causal language model named lama" in capsys.readouterr().err


def test_the_survey_writes_one_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert survey.main(["bloom", "--json", "--write", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert json.loads(out) == json.loads((tmp_path / f"{INSTALLED}.json").read_text())
    assert json.loads(out)["rows"][0]["verdict"] == "refused"
