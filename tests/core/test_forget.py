"""State.forget drops named tokens for good, or refuses and changes nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support import Draw, attention, close, filled, positions, seeded


@given(st.data())
@pytest.mark.parametrize(
    "text", ["exact", "sinks(1)@8", "window(block=4)@9", "h2o(sinks=1,recent=2)@8", "exact|top_k(k=40)"]
)
def test_no_later_query_attends_to_a_dropped_token(text: str, data: st.DataObject) -> None:
    rows, n, draw = 2, 13, seeded(7)
    k, v = draw(rows, n, 4), draw(rows, n, 4)
    state = filled(text, k, v)
    before = positions(state)
    pairs = st.tuples(st.integers(0, rows - 1), st.integers(0, n - 1))
    named = data.draw(st.lists(pairs, max_size=12))
    row, position = (torch.tensor([pair[i] for pair in named], dtype=torch.int64) for i in (0, 1))
    state.forget(row, position)
    left = [[p for p in held if (r, p) not in named] for r, held in enumerate(before)]
    assert positions(state) == left and state.seen.tolist() == [n] * rows
    q = draw(rows, 3, 4)
    part = state.read(q)
    for r, kept in enumerate(left):
        mean, log_mass = attention(q[r], k[r, kept], v[r, kept], state.spec.scale)
        close(part.log_mass[r], log_mass)
        if kept:
            close(part.mean[r], mean)


@pytest.mark.parametrize("text", ["exact", "window(block=1)@4"])
def test_a_stream_goes_on_after_tokens_were_dropped(draw: Draw, text: str) -> None:
    k, v = draw(1, 9, 4), draw(1, 9, 4)
    state = filled(text, k[:, :6], v[:, :6])
    state.forget(torch.tensor([0]), torch.tensor([4]))
    state.append(k[:, 6:], v[:, 6:])
    assert positions(state) == ([[0, 1, 2, 3, 5, 6, 7, 8]] if text == "exact" else [[5, 6, 7, 8]])
    again = state.method.from_bytes(state.to_bytes())
    assert positions(again) == positions(state)


def test_whoever_listens_is_given_the_dropped_tokens(draw: Draw) -> None:
    state, gone = filled("sinks(1)@8", draw(2, 6, 4)), []
    state.on_evict = lambda row, position: gone.extend(zip(row.tolist(), position.tolist(), strict=True))
    state.forget(torch.tensor([1, 0]), torch.tensor([3, 5]))
    assert sorted(gone) == [(0, 5), (1, 3)]


@pytest.mark.parametrize(
    ("text", "row", "position", "said"),
    [
        ("exact", [0], [9], "only tokens that were seen can be dropped"),
        ("exact", [0], [-1], "only tokens that were seen"),
        ("exact", [2], [0], r"rows must lie in 0\.\.1"),
        ("exact", [-1], [0], r"rows must lie in 0\.\.1"),
        ("exact", [0, 1], [0], "a row and a position per token"),
        ("exact", [0.0], [0], "a row and a position per token"),
        ("exact|hip(k=4)", [0], [0], "indexes its tokens in their order"),
        ("window(block=1)+moments@4", [0, 0], [8, 1], "are in the summary"),
        ("subgen_sketch(centres=8,s=4)", [0], [0], "does not keep whole tokens"),
        ("balance@64", [0], [0], "does not keep whole tokens"),
    ],
)
def test_a_refusal_says_why_and_changes_nothing(
    draw: Draw, text: str, row: list[float], position: list[int], said: str
) -> None:
    state = filled(text, draw(2, 9, 4))
    before = state.to_bytes()
    for call in (state.require_forgettable, state.forget):
        with pytest.raises(ValueError, match=said):
            call(torch.tensor(row), torch.tensor(position))
        assert state.to_bytes() == before


def test_of_a_summary_only_whole_tokens_can_be_dropped_and_each_may_be_named_twice(draw: Draw) -> None:
    state = filled("window(block=1)+moments@4", draw(1, 9, 4))
    state.forget(torch.tensor([0, 0, 0]), torch.tensor([8, 6, 8]))
    assert positions(state) == [[5, 7]]


def test_dropping_nothing_changes_nothing(draw: Draw) -> None:
    state = filled("sinks(1)@8", draw(1, 9, 4))
    before = state.to_bytes()
    nothing = torch.empty(0, dtype=torch.int64)
    state.forget(nothing, nothing)
    assert state.to_bytes() == before
