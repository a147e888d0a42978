"""Floors per head: from recorded keys and queries, beside what settings took; nothing unmeasured is claimed."""

import math
from dataclasses import replace

import pytest
import torch

from kvfloor.audit import heads
from kvfloor.audit.heads import HeadFloor, head_floors
from kvfloor.audit.nats import TextCell
from kvfloor.audit.output_errors import ErrorMap
from kvfloor.audit.rows import Cell
from kvfloor.audit.traces import Trace
from kvfloor.report.ladder import _words

CELL = Cell("recall", 64, "after")
D = 16


def trace(keys: torch.Tensor, length: float, asked: int = 3) -> Trace:
    """Two kv heads: head 0 has the given keys, head 1 the same key everywhere; queries of one length."""
    n = len(keys) + asked
    k = torch.zeros(2, n, D)
    k[0, : len(keys)] = keys
    k[1] = keys[0]
    generator = torch.Generator().manual_seed(0)
    q = torch.nn.functional.normalize(torch.randn(2, 2, n, D, generator=generator), dim=-1) * length
    present = torch.ones(2, n, dtype=torch.bool)
    # Outputs of norm 1, of values up to 0.1 D / eta: good settings err by eta = 0.25 or less.
    exact = torch.full((2, 2, asked, D), D**-0.5)
    v = torch.full((2, n, D), heads.GOOD / (0.25 * (1 - heads.P) ** 0.5))
    return Trace(0, q, k, v, present, 1.0, None, 2, asked, exact)


@pytest.fixture
def orthogonal() -> Trace:
    return trace(torch.eye(D), length=40.0)


def test_orthogonal_keys_are_all_read_and_equal_ones_as_one_group(orthogonal: Trace) -> None:
    first, second = head_floors(CELL, [orthogonal])
    assert (first.readable_groups, second.readable_groups) == (D, 1)
    levels = 4  # 3 * 0.25 < 1 <= 4 * 0.25
    assert first.floor_bytes == pytest.approx(D * (heads.P * D * 2 - 0.469) / 8, abs=1) and levels == 2**2
    assert second.floor_bytes < first.floor_bytes / 8
    assert first.tokens == D and first.exact_bytes == D * 2 * D * 4
    assert first.asked_floor_bytes <= first.floor_bytes


def test_short_queries_read_nothing(orthogonal: Trace) -> None:
    floors = head_floors(CELL, [trace(torch.eye(D), length=0.1)])
    assert floors[0].readable_groups <= 1
    assert floors[0].floor_bytes < head_floors(CELL, [orthogonal])[0].floor_bytes / 8


def test_floors_allow_what_good_settings_err_by(orthogonal: Trace) -> None:
    """Outputs a tenth as large leave a tenth of the error: more levels can be told apart, and the floor is higher."""
    first, small = (head_floors(CELL, [replace(orthogonal, exact=scale * orthogonal.exact)])[0] for scale in (1.0, 0.1))
    assert (first.eta, small.eta) == (pytest.approx(0.25), pytest.approx(0.025))
    levels = 40  # 39 * 0.025 < 1 <= 40 * 0.025
    assert small.floor_bytes == pytest.approx(D * (heads.P * D * math.log2(levels) - 0.469) / 8, abs=1)
    assert heads.good_error(replace(orthogonal, exact=1e3 * orthogonal.exact), 0) == heads.MOST_ETA
    assert heads.good_error(replace(orthogonal, v=torch.zeros_like(orthogonal.v)), 0) == heads.MOST_ETA


def test_a_good_setting_keeps_the_error_that_the_floor_allows() -> None:
    """However its errors are spread over the queries: at least a share P of them is within eta in every number."""
    draw = torch.Generator().manual_seed(5)
    for power in (0.0, 1.0, 4.0):
        exact, v = torch.randn(1, 2, 50, D, generator=draw), torch.randn(1, 90, D, generator=draw)
        wrong = torch.randn(1, 2, 50, D, generator=draw) * torch.rand(1, 2, 50, 1, generator=draw) ** power
        wrong *= heads.GOOD * exact.norm() / wrong.norm()  # exactly good
        made = Trace(
            0,
            torch.zeros(1, 2, 90, D),
            torch.zeros(1, 90, D),
            v,
            torch.ones(1, 90, dtype=torch.bool),
            1.0,
            None,
            1,
            50,
            exact,
        )
        eta = heads.good_error(made, 0) * v[0, :40].abs().max()
        assert (wrong.abs().amax(-1) <= eta).double().mean() >= heads.P


def test_pads_are_no_tokens(orthogonal: Trace) -> None:
    present = orthogonal.present.clone()
    present[0, :5] = False
    assert head_floors(CELL, [replace(orthogonal, present=present)])[0].tokens == D - 5


def test_long_contexts_are_left_out(orthogonal: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "MOST_TOKENS", D - 1)
    assert head_floors(CELL, [orthogonal]) == []
    assert heads.heads([], []) == []
    assert heads.summary([]) == "No head's floor was measured."


def test_of_a_long_context_some_tokens_are_weighed_and_no_head_is_called_compressible(
    orthogonal: Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = head_floors(CELL, [orthogonal])[0]
    monkeypatch.setattr(heads, "WEIGHED", 3)
    first = head_floors(CELL, [orthogonal])[0]
    assert (whole.weighed, first.weighed, first.readable_groups) == (None, 3, 3)
    assert first.asked_floor_bytes <= first.floor_bytes < whole.floor_bytes
    (one,) = heads.heads([first], [])
    assert not one.compressible and one.readable_share <= heads.COMPRESSIBLE
    assert one.stopped == f"stopped after 3 of {D} tokens" and one.stopped in _words(one)
    assert "at least 19 % of the tokens" in _words(one)
    assert heads.summary([one]) == "No head was found compressible; 1 of 1 were not searched to the end."
    (ended,) = heads.heads([replace(first, weighed=None)], [])
    assert ended.compressible and "stopped" not in _words(ended)


def floor(cell: Cell, head: int, groups: int, size: int) -> HeadFloor:
    return HeadFloor(cell, 0, head, 0, 64, groups, size, size // 2, 8192)


def test_the_cheapest_setting_must_serve_the_head_on_every_cell(rows) -> None:
    cells = sorted({row.cell for row in rows})[:2]
    found = heads.heads([floor(cell, head, 8 + 40 * head, 100) for cell in cells for head in (0, 1)], rows)
    assert [(one.layer, one.head) for one in found] == [(0, 0), (0, 1)]
    assert [one.compressible for one in found] == [True, False]
    for one in found:
        serving = {}
        for row in rows:
            if row.cell in cells and row.method != "exact":
                error, size = serving.get(row.method, (0.0, 0))
                per_head = -(-row.state_bytes // (len(row.output_error_by_head) * len(row.output_error_by_head[0])))
                serving[row.method] = (max(error, row.output_error_by_head[0][one.head]), max(size, per_head))
        good = {method: size for method, (error, size) in serving.items() if error <= heads.GOOD}
        assert one.best_bytes == (min(good.values()) if good else None)
        assert one.best_method is None or good[one.best_method] == one.best_bytes
    assert heads.summary(found).startswith("1 of 2 heads are compressible") and "layer 0 head 0" in heads.summary(found)


def test_the_largest_floor_over_the_cells_counts(rows) -> None:
    cells = sorted({row.cell for row in rows})[:2]
    found = heads.heads([floor(cells[0], 0, 4, 100), floor(cells[1], 0, 60, 900)], rows)[0]
    assert (found.floor_bytes, found.asked_floor_bytes, found.compressible) == (900, 450, False)


def test_of_many_heads_some_are_measured_evenly_spread(orthogonal: Trace) -> None:
    layers = [replace(orthogonal, layer=number) for number in (1, 4, 9)]
    every = head_floors(CELL, layers)
    assert [(one.layer, one.head, one.position) for one in every] == [
        (layer, head, position) for position, layer in enumerate((1, 4, 9)) for head in (0, 1)
    ]
    some = head_floors(CELL, layers, most_work=3 * D**2)
    assert some == [every[0], every[2], every[5]]
    assert head_floors(CELL, layers, most_work=0) == [every[0], every[5]]


def test_a_head_finds_its_errors_at_its_layers_place() -> None:
    cell = TextCell("sea", 64, 8)
    errors = ((0.5, 0.5), (0.5, 0.01))
    found = heads.heads(
        [HeadFloor(cell, 7, 1, 1, 64, 8, 100, 50, 8192)], [ErrorMap("h2o@8", *cell, 1000, (3, 7), errors)]
    )
    assert [(one.layer, one.head, one.best_method, one.best_bytes) for one in found] == [(7, 1, "h2o@8", 250)]
