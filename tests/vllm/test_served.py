"""The state of one request of one layer: its bytes, and random draws that are those of the cache for transformers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvfloor import parse
from kvfloor.core.pool import Pool, block_bytes
from kvfloor.hf.opener import Opening
from kvfloor.vllm.meter import LogTimer, line
from kvfloor.vllm.served import Served, ServedTable, size


class Configuration(SimpleNamespace):
    """A configuration that a weak reference can point to, as vLLM's."""


def config(kv_heads: int = 4, shards: int = 1, layers: int = 6, tokens: int = 400) -> Any:
    model = SimpleNamespace(
        max_model_len=tokens,
        dtype=torch.float32,
        get_total_num_kv_heads=lambda: kv_heads,
        get_total_num_hidden_layers=lambda: layers,
    )
    return Configuration(model_config=model, parallel_config=SimpleNamespace(tensor_parallel_size=shards))


def served(monkeypatch: pytest.MonkeyPatch, method: str, rank: int = 0, shards: int = 1, **how: Any) -> Served:
    monkeypatch.setenv("KVFLOOR_METHOD", method)
    here = max(how.get("kv_heads", 4) // shards, 1)
    return size(config(shards=shards, **how), rank, 2 * here, here, 16, 0.25, None)


def test_random_draws_are_those_of_the_first_sequence_in_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    state = Opening(parse("random@32"), layers=6).open(3, 3, torch.zeros(2, 4, 1, 16), 16, 2, 0.25, None)
    spec = served(monkeypatch, "random@32").at(3, torch.device("cpu"))
    assert state.spec.row_ids is not None and state.spec.places is not None
    assert spec.row_ids == tuple(state.spec.row_ids)[:4] and spec.places == tuple(state.spec.places)[:4]
    assert (spec.seed, spec.scale, spec.softcap) == (state.spec.seed, state.spec.scale, state.spec.softcap)


@pytest.mark.parametrize(("kv_heads", "shards"), [(4, 2), (4, 4), (2, 4), (1, 4)])
def test_ranks_have_the_draws_of_their_heads_in_the_whole_model(
    monkeypatch: pytest.MonkeyPatch, kv_heads: int, shards: int
) -> None:
    """With more ranks than kv heads, neighbouring ranks have copies of one head."""
    whole = served(monkeypatch, "random@32", kv_heads=kv_heads).at(5, torch.device("cpu"))
    assert whole.row_ids is not None
    copies = max(shards // kv_heads, 1)
    expected = [i for i in whole.row_ids for _ in range(copies)]
    ranks = [
        served(monkeypatch, "random@32", rank, shards, kv_heads=kv_heads).at(5, torch.device("cpu"))
        for rank in range(shards)
    ]
    assert [i for spec in ranks for i in spec.row_ids or ()] == expected


def test_budgets_are_of_the_longest_request_and_of_the_whole_model(monkeypatch: pytest.MonkeyPatch) -> None:
    assert served(monkeypatch, "sinks(4)@25%").method.budget == 100
    alone, half = (served(monkeypatch, "sinks(4)@200KiB", shards=shards) for shards in (1, 2))
    assert alone.method.budget == half.method.budget and isinstance(alone.method.budget, int)
    one_more = alone.method.with_budget(alone.method.budget + 1)
    assert one_more is not None
    assert 6 * alone.nbytes < 1.02 * 200 * 1024 < 6 * 1.02 * block_bytes(one_more, alone.spec, 2)


def test_exact_takes_room_for_the_longest_request(monkeypatch: pytest.MonkeyPatch) -> None:
    long, short = (served(monkeypatch, "exact", tokens=tokens).nbytes for tokens in (4000, 400))
    assert 9 < long / short < 10 and long > 4000 * 4 * 2 * 16 * 4


@pytest.mark.parametrize("method", ["raas@64", "exact|hip(k=16)", "h2o(prefill=dense)@64", "h2o"])
def test_what_no_block_can_hold_is_refused(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    with pytest.raises(ValueError, match="KVFLOOR_METHOD="):
        served(monkeypatch, method)


def test_the_table_is_of_one_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    table, one, other = ServedTable(), config(), config()
    first, second = served(monkeypatch, "h2o@64"), served(monkeypatch, "h2o@128")
    assert table.add(one, first) and not table.add(one, first)
    with pytest.raises(ValueError, match="different numbers of query heads"):
        table.add(one, second)
    assert table.of(4, 16) is first
    assert table.add(other, second) and table.of(4, 16) is second


def test_the_log_line_counts_what_left(monkeypatch: pytest.MonkeyPatch) -> None:
    one = served(monkeypatch, "sinks(4)@64")
    pool = Pool(one.method, one.spec, one.g, torch.zeros(4, one.nbytes, dtype=torch.uint8))
    ids = torch.tensor([1, 3])
    pool.clear(ids)
    for block, t in ((1, 200), (3, 10)):
        pool.step(torch.tensor([block]), torch.ones(1, 4, 2, t, 16), torch.ones(1, 4, t, 16), torch.ones(1, 4, t, 16))
    held = int(pool.held(ids)[:, 0].sum())
    assert 64 + 10 <= held < 64 + 32 + 10
    assert line(pool, ids).startswith(f"kvfloor: 2 requests in this step, 210 tokens seen, {held} held per kv head")
    assert line(pool, ids).endswith(f"{210 - held} evicted")


def test_the_clock_strikes_after_its_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    clock, never = LogTimer(5), LogTimer(float("inf"))
    heard = []
    for moment in (101.0, 104.9, 105.0, 106.0, 109.9, 110.1):
        now[0] = moment
        heard.append(clock.due())
        assert not never.due()
    assert heard == [False, False, True, False, False, True]
