"""On a device, a token that is not finite is reported late but surely; here the CPU takes the device's part."""

from __future__ import annotations

import pytest
import torch

from kvfloor import BrokenState
from kvfloor.core.device import SENT_EVERY, FiniteWatch, first_marked, sent_index
from kvfloor.core.state import State
from tests.gpu_ready.streams import filled, tokens


@pytest.fixture(autouse=True)
def deferred(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(State, "_defers", property(lambda self: True))


@pytest.mark.parametrize("text", ["sinks(4)@48", "window+value_sum@48", "h2o@48"])
def test_answers_and_state_are_the_same(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    late = filled(text)
    with monkeypatch.context() as patch:
        patch.setattr(State, "_defers", property(lambda self: False))
        at_once = filled(text)
    for i in range(40):
        given = tokens(2, seed=50 + i)
        assert torch.equal(late.step(*given), at_once.step(*given))
    assert late.to_bytes() == at_once.to_bytes()


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("text", ["sinks(4)@48", "window+value_sum@48"])
def test_a_bad_entry_is_reported_within_a_block_and_breaks_the_state(text: str, name: str, number: float) -> None:
    state = filled(text)
    bad = dict(zip("qkv", tokens(2), strict=True))
    bad[name].view(-1)[5] = number
    state.step(bad["q"], bad["k"], bad["v"])
    with pytest.raises(ValueError, match="NaN or infinite"):
        for i in range(SENT_EVERY):
            state.step(*tokens(2, seed=i))
    with pytest.raises(BrokenState):
        state.step(*tokens(2))


@pytest.mark.parametrize("call", ["clone", "to_bytes", "seal"])
def test_any_other_call_reports_it_at_once(call: str) -> None:
    state = filled("sinks(4)@48")
    q, k, v = tokens(2)
    state.step(q, k * torch.nan, v)
    with pytest.raises(ValueError, match="NaN or infinite"):
        getattr(state, call)()
    assert state.broken


def test_finite_tokens_are_never_reported_however_large() -> None:
    state = filled("sinks(4)@48")
    q, k, v = tokens(2)
    for _ in range(2 * SENT_EVERY):
        state.step(q, torch.full_like(k, 3e38), torch.full_like(v, -3e38))
    state.clone()


def test_the_watch_never_resets() -> None:
    watch = FiniteWatch(torch.device("cpu"))
    watch.add(torch.tensor([torch.inf]))
    for _ in range(SENT_EVERY - 2):
        watch.add(torch.ones(3))
        assert watch.told_finite() and not watch.finite()
    watch.add(torch.ones(3))
    assert not watch.told_finite()


@pytest.mark.parametrize("most", [1, 3, 9])
def test_the_first_marked_entries_are_those_that_nonzero_finds(most: int) -> None:
    mask = torch.rand(20, 13, generator=torch.Generator().manual_seed(most)) < 0.4
    for row, found in zip(mask, first_marked(mask, most), strict=True):
        expected = row.nonzero().squeeze(1)[:most].tolist()
        assert found.tolist() == expected + [13] * (most - len(expected))
    assert torch.equal(mask.flatten()[sent_index(mask, "cpu")], torch.ones(int(mask.sum()), dtype=torch.bool))
