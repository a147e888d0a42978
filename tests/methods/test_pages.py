"""Pages: what is read equals the rule written out, and the bound is above every logit that it speaks of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvfloor import Exact, Spec, parse
from kvfloor.core.slots import Slots
from kvfloor.methods.selectors.pages import Pages, PagesState
from tests.support import Draw, fed, filled, opened, stream, wrong


def pages_read(q: Tensor, keys: Tensor, pages: int, page: int) -> list[int]:
    """Slots that q (d,) reads of keys (s, d), with plain loops: the best full pages and the newest one."""
    newest = (len(keys) - 1) // page
    bounds = []
    for i in range(newest):
        box = keys[i * page : (i + 1) * page]
        bound = sum(max(a * low, a * high) for a, low, high in zip(q, box.amin(0), box.amax(0), strict=True))
        bounds.append((float(bound), i))
    chosen = [i for _, i in sorted(bounds, reverse=True)[:pages]] + [newest]
    return sorted(slot for i in chosen for slot in range(i * page, min((i + 1) * page, len(keys))))


def answer(q: Tensor, k: Tensor, v: Tensor, read: list[int], scale: float) -> Tensor:
    return torch.softmax(k[read] @ q * scale, 0) @ v[read]


def furthest(method: Exact, q: Tensor, k: Tensor, v: Tensor, pages: int, page: int, chunk: int) -> float:
    """The largest difference of `step`, in calls of `chunk` tokens, from the rule written out."""
    rows, g, n, d = q.shape
    state = method.open(Spec(rows, d, d, scale=0.7, dtype=torch.float64))
    out = fed(state, (q, k, v), *range(0, n, chunk))
    worst = 0.0
    for row in range(rows):
        for head in range(g):
            for i in range(n):
                read = pages_read(q[row, head, i], k[row, : i + 1], pages, page)
                wanted = answer(q[row, head, i], k[row, : i + 1], v[row, : i + 1], read, 0.7)
                worst = max(worst, float((out[row, head, i] - wanted).abs().max()))
    return worst


def centred(self: PagesState, q: Tensor, newest: Tensor, rows: Tensor | None) -> Tensor:
    """The logit of a box's centre."""
    twice = PagesState.bounds(self, q, newest, rows) - PagesState.bounds(self, -q, newest, rows)
    return twice.nan_to_num(nan=-torch.inf)


@pytest.mark.parametrize("chunk", [1, 7, 38])
def test_answers_equal_the_rule_written_out(draw: Draw, chunk: int) -> None:
    q, k, v = stream(draw, 2, 2, 38, 6)
    assert furthest(Exact(Pages(2, 4)), q, k, v, 2, 4, chunk) <= 1e-12


def test_the_comparison_notices_another_bound(draw: Draw) -> None:
    state = wrong(PagesState, bounds=centred)
    method = wrong(Pages, open=lambda self, spec, slots, shared, in_order: state(spec, slots, self))
    q, k, v = stream(draw, 1, 1, 30, 6)
    assert furthest(Exact(method(2, 4)), q, k, v, 2, 4, 30) > 1e-3


def bound_holds(state: Any, q: Tensor) -> bool:
    """Whether no unread token of any row exceeds what is said of the unread ones; the mass is bounded too."""
    slots, visible = state.slots, state.slots.held.unsqueeze(1).expand(-1, q.shape[1])
    logit, log_mass = state.selection.unread_logit(q, visible)
    view, unread = slots.view(), state.unread(q)
    dead = torch.zeros_like(view.position, dtype=torch.bool) if view.live is None else ~view.live
    truth = q @ view.k.transpose(1, 2) * state.spec.scale
    if state.spec.softcap is not None:
        truth = torch.tanh(truth / state.spec.softcap) * state.spec.softcap
    truth = truth.masked_fill(~unread | dead.unsqueeze(1), -torch.inf)
    return bool((truth.amax(-1) <= logit + 1e-12).all() and (truth.logsumexp(-1) <= log_mass + 1e-12).all())


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("scale", [0.4, -0.4])
@pytest.mark.parametrize("text", ["exact", "window@40", "h2o(sinks=2,recent=4,block=3)@33", "random@24:40:52"])
def test_the_bound_is_above_every_unread_logit(draw: Draw, text: str, scale: float, softcap: float | None) -> None:
    """Under eviction too: a page whose tokens were replaced has another bound."""
    head, at, budget = text.partition("@")
    state = opened(f"{head}|pages(pages=2,page=5){at}{budget}", 3, 8, scale=scale, softcap=softcap)
    for t in (31, 1, 1, 17, 60, 2):
        state.step(*stream(draw, 3, 2, t, 8))
        assert bound_holds(state, draw(3, 7, 8, scale=2.0))


def test_the_bound_test_notices_boxes_that_are_not_taken_anew(draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(self: PagesState, slots: Slots, leaving: Tensor) -> None:
        self.boxes.held = slots.held // self.method.page

    monkeypatch.setattr(PagesState, "evict", forgetful)
    state = opened("random(block=8)|pages(pages=1,page=4)@40")
    state.append(draw(1, 200, 4), draw(1, 200, 4))
    assert not bound_holds(state, draw(1, 50, 4))


def test_with_pages_for_all_nothing_is_left_unread(draw: Draw) -> None:
    state: Any = opened("exact|pages(pages=9,page=4)")
    state.append(draw(1, 40, 4), draw(1, 40, 4))
    assert not bool(state.unread(draw(1, 3, 4)).any())
    logit, log_mass = state.selection.unread_logit(draw(1, 3, 4), torch.full((1, 3), 40))
    assert bool((logit == -torch.inf).all()) and bool((log_mass == -torch.inf).all())


def test_an_isolated_needle_is_always_read(draw: Draw) -> None:
    """One key far above the rest: its page's bound is at least its logit, and no other page comes near."""
    keys, q = draw(1, 512, 16, scale=0.05), torch.ones(1, 1, 16, dtype=torch.float64)
    for place in range(3, 500, 31):
        planted = keys.clone()
        planted[0, place] = 1.0
        state = filled("exact|pages(pages=1)", planted)
        assert not bool(state.unread(q)[0, 0, place])


def test_equal_bounds_let_the_newer_page_be_read() -> None:
    state = filled("exact|pages(pages=1,page=2)", torch.ones(1, 7, 1), torch.arange(7.0).view(1, 7, 1))
    assert state.unread(torch.ones(1, 1, 1))[0, 0].tolist() == [True] * 4 + [False] * 3


def test_an_evicted_key_does_not_travel_inside_a_box(draw: Draw) -> None:
    k = draw(1, 96, 4, dtype=torch.float32)
    state = filled("window|pages(pages=2,page=4)@32", k)
    message = state.to_bytes()
    for token in range(96):
        for number in k[0, token]:
            assert (number.numpy().tobytes() in message) == (token >= 64)


def test_boxes_of_short_rows_take_few_bytes() -> None:
    spec = Spec(2, 16, 16)
    ragged, level = (parse(f"window|pages@{budget}").open(spec) for budget in ("32:1024", "1024"))
    assert level.nbytes - ragged.nbytes == 992 * (32 * 4 + 8) + 992 // 16 * 2 * 16 * 4
