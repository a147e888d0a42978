"""Budgets of a cache: per-head ones free bytes, shared-out ones add up, pinned spans stay, the bound is kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from kvfloor.hf import CompressedCache, floor_shares, prepare
from kvfloor.hf.allocate import pyramid, spread
from tests.hf.conftest import Prompt

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12}
TABLE = [[40, 24], 32, [24, 64]]


def held(cache: CompressedCache) -> list[list[int]]:
    return [entry["held"] for entry in cache.report()]


def test_heads_keep_their_own_budgets_and_the_rest_is_freed(prepared: PreTrainedModel, prompt: Prompt) -> None:
    ragged = CompressedCache(prepared.config, "sinks(4,block=1)", budgets=TABLE)
    prepared.generate(**prompt, **GREEDY, past_key_values=ragged)
    assert held(ragged) == [[40, 24] * 2, [32] * 4, [24, 61, 24, 64]]  # the padded row saw 61 tokens
    even = CompressedCache(prepared.config, "sinks(4,block=1)@64")
    prepared.generate(**prompt, **GREEDY, past_key_values=even)
    per_token = {entry["state_bytes"] // (4 * 65) for entry in even.report()}  # 64 and the block of one
    assert len(per_token) == 1
    tokens = 2 * (40 + 24 + 32 + 32 + 24 + 64)
    assert ragged.nbytes < even.nbytes * (tokens + 12) / (12 * 65) * 1.05


def test_a_ragged_cache_answers_as_its_rows_alone(prepared: PreTrainedModel, prompt: Prompt) -> None:
    both = CompressedCache(prepared.config, "h2o(block=8)", budgets=TABLE)
    together = prepared.generate(**prompt, **GREEDY, past_key_values=both)
    alone = CompressedCache(prepared.config, "h2o(block=8)", budgets=TABLE)
    only = prepared.generate(prompt["input_ids"][:1, 20:], **GREEDY, past_key_values=alone)
    assert torch.equal(together[0, 70:], only[0, 50:])
    assert [line[:2] for line in held(both)] == held(alone)


def test_one_budget_for_all_heads_is_the_uniform_table(prepared: PreTrainedModel, prompt: Prompt) -> None:
    outs = []
    for arguments in (
        {"method": "h2o@32"},
        {"method": "h2o", "budgets": [32, [32, 32], 32]},
        {"method": "h2o@32", "allocate": [1, 1, 1]},
    ):
        cache = CompressedCache(prepared.config, **arguments)  # type: ignore[arg-type]
        outs.append((prepared(**prompt, past_key_values=cache).logits, cache.nbytes))
    assert all(torch.equal(logits, outs[0][0]) and size == outs[0][1] for logits, size in outs)


@pytest.mark.parametrize(
    "method", ["h2o(block=8)@192KiB", "sinks(4,block=8)@192KiB", "window(block=8)+value_sum@192KiB"]
)
@pytest.mark.parametrize("allocate", ["uniform", "pyramid", [[1.0, 3.0], [0.5, 0.5], 1.0]])
def test_bytes_never_pass_the_declared_bound(
    prepared: PreTrainedModel, prompt: Prompt, method: str, allocate: Any
) -> None:
    cache = CompressedCache(prepared.config, method, allocate=allocate)
    staged = 2 * 2 * 2 * 10 * 16 * 4  # keys and values of ten tokens: 2 items, 2 heads, width 16, four bytes
    with torch.no_grad():
        for start in range(0, 70, 10):
            prepared(
                prompt["input_ids"][:, start : start + 10],
                attention_mask=prompt["attention_mask"][:, : start + 10],
                past_key_values=cache,
            )
            assert cache.nbytes <= 192 * 1024
            assert cache.peak_nbytes <= 192 * 1024 + staged
    assert cache.nbytes > 0.9 * 192 * 1024


def test_the_pyramid_falls_with_depth_and_keeps_the_mean(llama: PreTrainedModel) -> None:
    assert pyramid(1) == ((1.0,),)
    shares = [line[0] for line in pyramid(5)]
    assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(5)
    assert shares[-1] == pytest.approx(1 / 20)
    prepare(llama)
    cache = CompressedCache(llama.config, "sinks(4,block=1)@60", allocate="pyramid")
    llama(torch.randint(2, 98, (1, 200), generator=torch.Generator().manual_seed(0)), past_key_values=cache)
    by_layer = [line[0] for line in held(cache)]
    assert by_layer[0] > by_layer[1] > by_layer[2] >= 5 and sum(by_layer) == 180


@given(
    st.lists(st.lists(st.floats(0.01, 50), min_size=1, max_size=4), min_size=1, max_size=6),
    st.integers(1, 500),
    st.integers(1, 40),
)
def test_spreading_keeps_the_sum_the_least_and_the_order(shares: list[list[float]], budget: int, least: int) -> None:
    if budget < least:
        with pytest.raises(ValueError, match="too small to share out"):
            spread(shares, budget, least)
        return
    table = spread(shares, budget, least)
    flat, wanted = [x for line in table for x in line], [x for line in shares for x in line]
    assert [len(line) for line in table] == [len(line) for line in shares]
    assert sum(flat) == budget * len(flat) and min(flat) >= least
    assert all(
        x + 1 >= y for x, a in zip(flat, wanted, strict=True) for y, b in zip(flat, wanted, strict=True) if a >= b
    )


def test_the_floor_gives_the_budget_to_the_heads_that_read_many_tokens_apart(prepared: PreTrainedModel) -> None:
    """Layer 0 gets queries of no length (it reads nothing apart), layer 2 long ones."""
    with torch.no_grad():
        prepared.model.layers[0].self_attn.q_proj.weight.zero_()
        prepared.model.layers[2].self_attn.q_proj.weight.mul_(200)
    ids = torch.randint(2, 98, (80,), generator=torch.Generator().manual_seed(3))
    with pytest.raises(ValueError, match="from 0 to 1"):
        floor_shares(prepared, ids, kept=1.5)
    assert floor_shares(prepared, ids, kept=1) == ((1, 1),) * 3
    assert min(min(line) for line in floor_shares(prepared, ids)) > 0.5
    shares = floor_shares(prepared, ids, kept=0)
    assert [len(line) for line in shares] == [2, 2, 2]
    assert max(shares[0]) < 0.3 < 1 < min(shares[2])
    assert sum(map(sum, shares)) == pytest.approx(6)
    cache = CompressedCache(prepared, "sinks(4,block=1)@40", allocate=floor_shares(prepared, ids))
    prepared(torch.randint(2, 98, (1, 300), generator=torch.Generator().manual_seed(0)), past_key_values=cache)
    assert sum(map(sum, held(cache))) == 240
    assert max(held(cache)[0]) < min(held(cache)[2])


def test_pinned_spans_never_leave(prepared: PreTrainedModel, prompt: Prompt) -> None:
    kept = []
    for pinned in ([], [(3, 9), (20, 25)]):
        cache = CompressedCache(prepared.config, "window(block=1)@24", pinned=pinned)
        prepared.generate(**prompt, **GREEDY, past_key_values=cache)
        state = cache.compressed[1].state
        kept.append(
            [set(row[:n].tolist()) for row, n in zip(state.slots.view().position, state.held.tolist(), strict=True)]
        )  # type: ignore[union-attr]
    wanted = {*range(3, 9), *range(20, 25)}
    assert not any(wanted & row for row in kept[0])
    assert all(wanted <= row and len(row) == 24 for row in kept[1])  # a padded row counts its own tokens


def test_what_does_not_go_together_is_refused(prepared: PreTrainedModel, prompt: Prompt) -> None:
    config = prepared.config
    refusals: list[tuple[dict[str, Any], str]] = [
        ({"method": "h2o@32", "budgets": [32, 32, 32]}, "takes no '@'"),
        ({"method": "h2o", "budgets": [32, 32]}, "2 layers; this model has 3"),
        ({"method": "h2o", "budgets": [32, 0, 32]}, "positive whole numbers"),
        ({"method": "h2o", "budgets": 32}, "a list with a number"),
        ({"method": "h2o", "allocate": "pyramid"}, "one budget"),
        ({"method": "h2o@32", "allocate": "top"}, "uniform, pyramid, floor"),
        ({"method": "h2o@32", "allocate": "floor"}, "calibration prompt go together"),
        ({"method": "h2o@32", "allocate": "floor", "calibration": [1, 2, 3]}, "give the model"),
        ({"method": "subgen_sketch@64", "pinned": [(0, 4)]}, "keeps whole tokens"),
        ({"method": "h2o@32", "pinned": [(4, 4)]}, "0 <= from < to"),
        ({"method": "quant(bits=4)", "on_evict": print}, "evicts none"),
    ]
    for arguments, message in refusals:
        with pytest.raises(ValueError, match=message):
            CompressedCache(config, **arguments)
    late: list[tuple[dict[str, Any], str]] = [
        ({"method": "h2o", "budgets": [32, [32, 32, 32], 32]}, "3 numbers for 2 kv heads"),
        ({"method": "sinks(4)@16", "pinned": [(0, 40)]}, "too small for sinks.*40 pinned"),
        ({"method": "exact", "budgets": [32, 32, 32]}, "no budget bounds it"),
        ({"method": "subgen_sketch", "budgets": [[64, 128], 64, 64]}, "one budget for all rows"),
    ]
    for arguments, message in late:
        with pytest.raises(ValueError, match=message):
            prepared(**prompt, past_key_values=CompressedCache(config, **arguments))
    with pytest.raises(ValueError, match="at least two token ids"):
        floor_shares(prepared, [5])
