"""What traces record is what attention computes, sinks included, and floors of heads are of this attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from kvfloor import parse
from kvfloor.audit import traces
from kvfloor.audit.heads import head_floors
from kvfloor.audit.nats import TextCell
from kvfloor.audit.output_errors import _in_tokens
from kvfloor.audit.traces import Trace
from kvfloor.audit.worst_case import worst_case_bytes
from kvfloor.floors import row_bits
from kvfloor.hf import floor_shares, prepare
from survey.tiny import CHANGES, HEAD_DIM, LAYERS, tiny_config, tiny_model

CELL = TextCell("a text", 60, 12)
Recording = Callable[[float], tuple[Any, list[Trace]]]


@pytest.fixture(scope="module")
def with_sinks() -> Recording:
    """Return a tiny gpt-oss and its traces on two samples, all of its sink logits set to one number."""

    def recorded(logit: float) -> tuple[Any, list[Trace]]:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = prepare(tiny_model("gpt_oss"))
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.sinks.fill_(logit)
                layer.self_attn.sinks[0] += 1.0
        ids = torch.randint(2, 98, (2, 72), generator=torch.Generator().manual_seed(1)).tolist()
        return model, traces.record(model, [one[:60] for one in ids], [one[60:] for one in ids])

    return recorded


def attention(trace: Trace, sink: torch.Tensor | None) -> torch.Tensor:
    """Return the outputs (rows, g, asked, dv) of the last queries, by the definition of attention with sinks."""
    n, cut = trace.k.shape[1], trace.k.shape[1] - trace.asked
    logits = trace.scale * torch.einsum("rgid,rjd->rgij", trace.q[:, :, cut:].double(), trace.k.double())
    logits = logits.masked_fill(torch.arange(n) > torch.arange(cut, n).unsqueeze(1), -torch.inf)
    if sink is None:
        return logits.softmax(-1) @ trace.v.double().unsqueeze(1)
    rows = sink.double().repeat(len(trace.k) // trace.kv_heads, 1)[:, :, None, None].expand(*logits.shape[:3], 1)
    return torch.cat([logits, rows], -1).softmax(-1)[..., :-1] @ trace.v.double().unsqueeze(1)


@pytest.mark.parametrize("logit", [0.0, 3.0])
def test_exact_answers_are_those_of_a_softmax_with_sinks(with_sinks: Recording, logit: float) -> None:
    model, recorded = with_sinks(logit)
    for trace in recorded:
        sink = model.model.layers[trace.layer].self_attn.sinks.detach().view(trace.kv_heads, -1)
        assert trace.sink is not None and torch.equal(trace.sink, sink)
        torch.testing.assert_close(trace.exact.double(), attention(trace, sink), rtol=1e-4, atol=1e-5)
        assert (attention(trace, None) - trace.exact).abs().max() > 0.01  # else sinks would make no difference


def test_errors_are_measured_with_sinks_on_both_sides(with_sinks: Recording) -> None:
    _, recorded = with_sinks(0.0)
    found = traces.errors(
        recorded, parse("window(block=1)@64")
    )  # every token is within the window of the first queries
    assert max(map(max, found)) < 0.5
    assert max(map(max, traces.errors(recorded, parse("exact")))) == 0.0


def test_where_sinks_take_all_mass_no_floor_is_claimed(with_sinks: Recording) -> None:
    """Every answer is 0 to a millionth, so that a state of 0 bytes is good enough."""
    _, recorded = with_sinks(60.0)
    assert max(float(trace.exact.abs().max()) for trace in recorded) < 1e-6
    floors = head_floors(CELL, recorded)
    assert len(floors) == 4
    assert all((one.floor_bytes, one.asked_floor_bytes, one.readable_groups) == (0, 0, 0) for one in floors)


def test_small_sinks_lower_the_floors_of_heads_and_take_none_away(
    with_sinks: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvfloor.audit.heads.good_error", lambda trace, row: 0.05)  # that of outputs falls with sinks
    _, held = with_sinks(3.0)
    free = [replace(trace, sink=None) for trace in held]
    some, fewer = (sum(one.asked_floor_bytes for one in head_floors(CELL, each)) for each in (free, held))
    assert 0 < fewer < some


def test_heads_that_see_their_sinks_alone_share_the_budget_evenly(with_sinks: Recording) -> None:
    model, _ = with_sinks(0.0)
    first, second = (layer for layer in model.model.layers if not layer.self_attn.sliding_window)
    with torch.no_grad():
        second.self_attn.q_proj.weight.mul_(50)
    ids = torch.randint(2, 98, (80,), generator=torch.Generator().manual_seed(3))
    apart = floor_shares(model, ids, kept=0)
    assert min(apart[1]) > 1.2 * max(apart[0])
    with torch.no_grad():
        for layer in (first, second):
            layer.self_attn.sinks.fill_(2000.0)
    assert floor_shares(model, ids, kept=0) == ((1.0, 1.0), (1.0, 1.0))


# ---- latent attention: a token's value is its key --------------------------------------------------------------------

LATENT = CHANGES["deepseek_v3"]["kv_lora_rank"]


@pytest.fixture(scope="module")
def tied() -> list[Trace]:
    pytest.importorskip("transformers.models.deepseek_v3")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = prepare(tiny_model("deepseek_v3"))
    if not hasattr(model.model.layers[0].self_attn, "expand_kv"):
        pytest.skip("this release of transformers caches every head's keys")
    ids = torch.randint(2, 98, (1, 72), generator=torch.Generator().manual_seed(1)).tolist()
    return traces.record(model, [ids[0][:60]], [ids[0][60:]])


def test_latents_are_traced_once_and_answered_as_the_definition_says(tied: list[Trace]) -> None:
    for trace in tied:
        assert trace.tied and trace.v is trace.k and trace.spec(1).tied
        assert trace.k.shape == (1, 72, LATENT + HEAD_DIM)
        torch.testing.assert_close(trace.exact.double(), attention(trace, None), rtol=1e-4, atol=1e-5)
    assert max(map(max, traces.errors(tied, parse("exact")))) == 0.0


def test_no_floor_is_claimed_of_values_that_are_the_public_keys(tied: list[Trace]) -> None:
    assert head_floors(CELL, tied) == []
    apart = [replace(trace, v=trace.v.clone()) for trace in tied]  # the same numbers, as values of their own
    assert all(one.floor_bytes > 0 for one in head_floors(CELL, apart))


def test_a_budget_in_bytes_holds_tokens_of_one_width(tied: list[Trace]) -> None:
    apart = [replace(trace, v=trace.v.clone()) for trace in tied]
    once, twice = (_in_tokens(parse("window(block=1)@64KiB"), each, 60).budget for each in (tied, apart))
    assert isinstance(once, int) and isinstance(twice, int) and once > 1.7 * twice


def test_the_worst_case_of_latents_hides_them_behind_rotary_keys() -> None:
    config = tiny_config("deepseek_v3")
    width = LATENT + HEAD_DIM
    found = worst_case_bytes(config, 200, width, width, heads=1, layers=LAYERS, tied=True)
    assert found == math.ceil(LAYERS * row_bits(200, LATENT, 0.9) / 8) == 2114
    assert worst_case_bytes(config, 200, width, width, heads=1, layers=LAYERS) > 1.6 * found
    assert worst_case_bytes(tiny_config("llama"), 200, width, width, heads=1, tied=True) == 0
