"""Best-first: the k largest logits exactly, and far fewer looks where keys have structure."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kvfloor.methods.selectors.pages import PagesState
from tests.support import Draw, filled


def largest(state: Any, q: Tensor, k: int) -> Tensor:
    """Mask (rows, m, s) of the k held tokens of largest logit, among equals the newer, with plain loops."""
    view = state.slots.view()
    read = torch.zeros(*q.shape[:2], view.k.shape[1], dtype=torch.bool)
    for row in range(q.shape[0]):
        logits = (view.k[row] @ q[row].T).T
        for i in range(q.shape[1]):
            by_logit = sorted(range(int(state.held[row])), key=lambda s, x=logits[i]: (float(x[s]), s), reverse=True)
            read[row, i, by_logit[:k]] = True
    return read


@pytest.mark.parametrize("text", ["exact|{0}", "random(block=4)|{0}@60", "window|{0}@9:60"])
@pytest.mark.parametrize("selector", ["best_first(k=7,page=5)", "best_first(k=1,page=1)", "best_first(k=200)"])
def test_the_tokens_of_largest_logit_are_read_and_no_others(draw: Draw, text: str, selector: str) -> None:
    k = int(selector.partition("k=")[2].partition(",")[0].rstrip(")"))
    state, q = filled(text.format(selector), draw(2, 150, 6), scale=0.5), draw(2, 9, 6)
    unread = state.unread(q)
    assert torch.equal(~unread, largest(state, q, k))


def test_ties_let_the_newer_be_read() -> None:
    state = filled("exact|best_first(k=3,page=2)", torch.ones(1, 9, 2), scale=0.5)
    assert (~state.unread(torch.ones(1, 1, 2)))[0, 0].nonzero().squeeze(1).tolist() == [6, 7, 8]


def test_the_comparison_notices_a_bound_that_errs(draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    true_bounds = PagesState.bounds
    monkeypatch.setattr(PagesState, "bounds", lambda self, *a: true_bounds(self, *a) - 2.0)
    state, q = filled("exact|best_first(k=7,page=5)", draw(2, 150, 6), scale=0.5), draw(2, 9, 6)
    assert not torch.equal(~state.unread(q), largest(state, q, 7))


def looked_into(state: Any, q: Tensor) -> float:
    """Mean share of the pages that a search looks into."""
    visible = state.slots.held.unsqueeze(1).expand(-1, q.shape[1])
    _, looked = state.selection.search(q, state.slots, visible)
    return float(looked.double().mean()) / -(-int(state.held[0]) // 16)


def test_few_pages_are_looked_into_where_keys_have_structure(draw: Draw) -> None:
    """On keys that turn slowly a tenth, on random ones nearly all: bounds of boxes are loose there."""
    angle = torch.arange(2048, dtype=torch.float64) * (math.pi / 2048)
    turn = torch.stack([angle.cos(), angle.sin()], 1).unsqueeze(0)
    assert looked_into(filled("exact|best_first(k=16)", turn, scale=0.5), turn[:, ::97]) <= 0.15
    assert looked_into(filled("exact|best_first(k=16)", draw(1, 2048, 32), scale=0.5), draw(1, 20, 32)) >= 0.9


def test_an_isolated_needle_is_found_at_the_second_look(draw: Draw) -> None:
    """What halving loses: after the newest page come the two of largest bound, the needle's first."""
    keys, q = draw(1, 1024, 16, scale=0.02), torch.ones(1, 1, 16, dtype=torch.float64)
    for place in range(5, 1000, 83):
        planted = keys.clone()
        planted[0, place] = 1.0
        state = filled("exact|best_first(k=1)", planted, scale=0.5)
        assert (~state.unread(q))[0, 0].nonzero().squeeze(1).tolist() == [place]
        _, looked = state.selection.search(q, state.slots, torch.tensor([[1024]]))
        assert int(looked) == 3
