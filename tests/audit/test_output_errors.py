"""Errors by head on a text, against softmax attention in float64 with the evicted tokens hidden."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kvfloor.audit import output_errors, traces
from kvfloor.audit.nats import TextCell
from kvfloor.audit.output_errors import ASKED, ErrorMap, map_errors, read_error_maps, write_error_maps
from kvfloor.audit.plan import settings
from kvfloor.audit.texts import Excerpt
from kvfloor.hf import prepare
from kvfloor.models import load
from tests.audit.made_up import text_row

CONTEXT, KEPT = 120, 30
SMALL = f"window(block=1)@{KEPT}"


def silent(text: str) -> None:
    del text


@pytest.fixture(scope="module")
def model() -> Any:
    return prepare(load()[0])


@pytest.fixture(scope="module")
def excerpt() -> Excerpt:
    ids = torch.randint(8, 400, (CONTEXT + 80,), generator=torch.Generator().manual_seed(1)).tolist()
    return Excerpt(TextCell("sea", CONTEXT, 80), ids[:CONTEXT], ids[CONTEXT:])


@pytest.fixture(scope="module")
def rows() -> list[Any]:
    sizes = {"exact": 9000, "window@25%": 2000, SMALL: 3000}
    return [text_row(one, "sea", context=CONTEXT, scored=80, state_bytes=size, peak_state_bytes=size)
            for one, size in sizes.items()]  # fmt: skip


def attention_error(trace: traces.Trace, head: int, kept: int) -> float:
    """Return the relative error of attention that sees only the newest `kept` tokens behind each query, in float64."""
    q, k, v = trace.q[head, :, -trace.asked :].double(), trace.k[head].double(), trace.v[head].double()
    place = torch.arange(k.shape[0])
    behind = place[-trace.asked :].unsqueeze(1) - place
    logits = q @ k.T * trace.scale
    exact, near = (
        torch.softmax(logits.masked_fill((behind < 0) | (behind > reach), -torch.inf), -1) @ v
        for reach in (len(k), kept)
    )
    return float((near - exact).norm() / exact.norm())


def test_errors_are_those_of_attention_without_the_evicted_tokens(model: Any, excerpt: Excerpt, rows: list) -> None:
    maps, floors = map_errors(model, settings([SMALL], ["25%"]), excerpt, rows, silent)
    found = {one.method: one for one in maps}
    assert list(found) == ["window@25%", SMALL]
    recorded = traces.record(model, [excerpt.context], [excerpt.continuation[:ASKED]])
    wanted = [[attention_error(trace, head, KEPT) for head in range(trace.kv_heads)] for trace in recorded]
    assert torch.tensor(wanted).min() > 0.01
    torch.testing.assert_close(torch.tensor(found[SMALL].output_error_by_head), torch.tensor(wanted), rtol=1e-4, atol=0)
    one = found["window@25%"]
    assert (one.cell, one.state_bytes) == (TextCell("sea", CONTEXT, ASKED), 2000)
    assert one.layers == tuple(range(model.config.num_hidden_layers))
    assert one.output_error == pytest.approx(sum(map(sum, one.output_error_by_head)) / 8)
    assert len(floors) == 8 and {floor.cell for floor in floors} == {one.cell}


def test_a_quarter_is_a_quarter_of_the_context(model: Any, excerpt: Excerpt, rows: list) -> None:
    quarter = f"window@{CONTEXT // 4}"
    rows = [*rows, text_row(quarter, "sea", context=CONTEXT, scored=80)]
    maps, _ = map_errors(model, settings([quarter], ["25%"]), excerpt, rows, silent)
    by_method = {one.method: one.output_error_by_head for one in maps}
    assert by_method[quarter] == by_method["window@25%"]


def test_of_a_context_too_long_the_beginning_is_recorded(
    model: Any, excerpt: Excerpt, rows: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = model.config
    per_token = config.num_hidden_layers * 4 * config.head_dim * (
        config.num_attention_heads + 2 * config.num_key_value_heads
    )  # fmt: skip
    monkeypatch.setattr(output_errors, "MOST_RECORDED_BYTES", per_token * (100 + ASKED))
    maps, floors = map_errors(model, settings([SMALL], ["25%"]), excerpt, rows, silent)
    assert {(one.context, one.continuation) for one in maps} == {(100, ASKED)} and floors == []


def test_maps_are_read_as_they_were_written(tmp_path: Path) -> None:
    made = [ErrorMap("h2o@8", "sea", 120, 64, 1000, (1, 5), ((0.1, 0.2), (0.3, 0.4)))]
    path = tmp_path / "output_errors.jsonl"
    write_error_maps(path, made)
    assert read_error_maps(path) == made
    path.write_text(path.read_text().replace("[1, 5]", "[1]"))
    with pytest.raises(ValueError, match=r"line 1 is not a map of output errors: errors of 'h2o@8': give one list"):
        read_error_maps(path)
