"""A token that all rows get in step takes a quick way into coded slots and out of them: it must change nothing."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvfloor.methods.stores import fused
from kvfloor.methods.stores.coded import CodedSlots
from kvfloor.methods.stores.uncoded import Uncoded
from tests.support import Stream, between, opened, seeded, stream

ROWS, G, D, DV, EVENTS = 3, 2, 12, 10, 24
METHODS = (
    *("exact:k4v4", "exact:k3v2(first=0)", "exact:k8v5(recent=16)", "exact:k2v3(first=3,recent=41)", "exact:kivi4"),
    *("h2o(block=8):k4v3@40", "window(block=24):k8v6(first=2)@40", "random(block=1):k2v5@12:20:16"),
    "snapkv(window=4,block=8):k4v4@24",
)
ATOL = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def require_decoded(state: Any) -> None:
    """Require that the decoded tokens of all rows at once are those that are decoded one by one, bit for bit."""
    slots = state.slots
    width = int(slots.held.max())
    for name, by_place in (("k", slots.keys), ("v", slots.values)):
        together = slots.numbers(name, None, width)
        for row, (offset, held) in enumerate(zip(slots.offset.tolist(), slots.held.tolist(), strict=True)):
            alone = by_place(torch.arange(offset, offset + held)).to(state.spec.dtype)
            assert torch.equal(together[row, :held], alone), (name, row)


def require_read(state: Any, q: Tensor) -> None:
    """Require that a read, which a kernel may answer, is what reading all codes in torch gives."""
    view, atol = state.slots.view(), ATOL[state.spec.dtype]
    hide = None if view.live is None else ~view.live.unsqueeze(1)
    mine, wanted = view.over(q, state.spec, hide), view.unpacked(q, state.spec, hide)
    torch.testing.assert_close(mine.mean, wanted.mean, rtol=0, atol=atol)
    torch.testing.assert_close(mine.log_mass, wanted.log_mass, rtol=0, atol=atol)


def one_by_one(states: tuple[Any, Any], tokens: Stream) -> None:
    """Give all rows tokens one by one: to the first state by the quick way, to the other by the general one."""
    quick, general = states
    present = torch.ones(ROWS, 1, dtype=torch.bool)
    for i in range(tokens[1].shape[1]):
        token = between(tokens, i, i + 1)
        mine, wanted = quick.step(*token), general.step(*token, present)
        torch.testing.assert_close(mine, wanted, rtol=0, atol=ATOL[quick.spec.dtype])
        if i % 4 == 0:
            require_decoded(quick)
    require_decoded(quick)
    require_read(quick, tokens[0][:, :, 0])


def happens(event: str, states: tuple[Any, Any], draw: random.Random, seed: int) -> tuple[Any, Any]:
    """Let both states live through one event; return them, or what has come of them."""
    dtype, quick = states[0].spec.dtype, states[0]
    tokens = stream(seeded(seed), ROWS, G, draw.randrange(1, 12), D, DV, dtype=dtype)
    if event == "tokens":
        one_by_one(states, tokens)
    elif event == "a piece":
        for state in states:
            state.append(*tokens[1:])
    elif event == "a ragged piece":
        take = torch.tensor([draw.randrange(tokens[1].shape[1] + 1) for _ in range(ROWS)])
        for state in states:
            state.append(*tokens[1:], torch.arange(tokens[1].shape[1]) < take.unsqueeze(1))
    elif event == "saved":
        states = tuple(state.method.from_bytes(state.to_bytes()) for state in states)  # type: ignore[assignment]
    elif event == "forked":
        others = tuple(state.clone() for state in states)
        one_by_one(others, tokens)  # type: ignore[arg-type]
    elif event == "rows chosen":
        row = draw.randrange(ROWS)
        index = draw.choice([[row] * ROWS, [row] * ROWS, [2, 0, 1]])
        for state in states:
            state.select_rows(torch.tensor(index))
    elif event == "forgotten":
        held = int(quick.slots.held[0])
        if held > 2:
            place = quick.slots.offset + draw.randrange(int(quick.slots.held.min()) or 1)
            gone = quick.slots.held > 0
            position = quick.slots.arrived(place)
            for state in states:
                state.forget(torch.arange(ROWS)[gone], position[gone])
    assert states[0].to_bytes() == states[1].to_bytes(), event
    return states


def lives(text: str, dtype: torch.dtype, seed: int, events: int = EVENTS) -> int:
    """Let two states of the method live through random events; return how many tokens took the quick way."""
    states: tuple[Any, Any] = tuple(opened(text, ROWS, D, DV, scale=0.4, dtype=dtype) for _ in range(2))  # type: ignore[assignment]
    draw, quick = random.Random(seed), 0
    rare = ["a piece", "saved", "forked", "rows chosen", "rows chosen", "a ragged piece", "forgotten"]
    for i in range(events):
        before = states[0]._steps_alone
        event = "tokens" if i % 2 else draw.choice(rare)
        states = happens(event, states, draw, 100 * seed + i)
        quick += before and event == "tokens"
    return quick


@pytest.mark.parametrize("dtype", ATOL)
@pytest.mark.parametrize("text", METHODS)
def test_the_quick_way_changes_no_bit_of_a_state(text: str, dtype: torch.dtype) -> None:
    assert sum(lives(text, dtype, seed) for seed in range(2)) > 4


def test_a_first_token_takes_the_quick_way_to_its_own_place() -> None:
    """Up to the end of the second group, token by token."""
    for text in ("exact:k4v4(recent=5)", "window(block=8):k4v4(first=6)@80"):
        states: Any = tuple(opened(text, ROWS, D, DV) for _ in range(2))
        one_by_one(states, stream(seeded(2), ROWS, G, 70, D, DV))
        assert states[0].to_bytes() == states[1].to_bytes()


# ---- mutants ---------------------------------------------------------------------------------------------------------


def caught(text: str, dtype: torch.dtype = torch.float64) -> None:
    with pytest.raises(AssertionError):
        for seed in range(3):
            lives(text, dtype, seed)


def test_uncoded_tokens_sought_in_wrong_slots_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = CodedSlots._uncoded_alike

    def moved(self: CodedSlots, width: int) -> Uncoded | None:
        found = real(self, width)
        if found is None or found.among is None:
            return found
        return replace(found, among=(found.among[0].roll(1, 1), found.among[1]))

    monkeypatch.setattr(CodedSlots, "_uncoded_alike", moved)
    caught("h2o(block=8):k4v3@40")


def test_a_wrong_place_of_uncoded_tokens_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = CodedSlots._stretches

    def later(self: CodedSlots, start: int, stop: int) -> list[tuple[int, int, int]]:
        return [(slot, self.first + (index + 1) % self.ring, 1) for slot, index, _ in real(self, start, stop)]

    monkeypatch.setattr(CodedSlots, "_stretches", later)
    caught("exact:k4v4")


def test_tokens_left_decoded_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Uncoded, "written", lambda self, x, given: x)
    caught("exact:k4v4")


def test_positions_that_are_not_written_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CodedSlots, "number_from", lambda self, at, position: None)
    with pytest.raises((AssertionError, IndexError)):
        lives("window(block=24):k4v3@40", torch.float64, 0)


def test_arrays_of_replaced_tensors_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba", reason="without the kernel there are no such arrays")
    made: dict[int, Any] = {}
    real = fused._known
    monkeypatch.setattr(fused, "_known", lambda slots: made.setdefault(id(slots), real(slots)))
    with pytest.raises((AssertionError, IndexError)):
        for seed in range(3):
            lives("exact:k4v4", torch.float32, seed)
