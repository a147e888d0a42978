"""Slots tell the right position of every token, however single tokens, pieces, evictions and copies mix."""

from __future__ import annotations

import random

import pytest
import torch

from kvfloor import Spec, parse
from kvfloor.core.slots import Slots

METHODS = [
    "exact",
    "window(block=4)@9",
    "sinks(2,block=3)@7",
    "random(block=5)@11",
    "h2o(recent=2,block=4)@8",
    "snapkv@6",
]


def told_wrongly(text: str, seed: int, steps: int = 60) -> int:
    """Run seeded calls on a state whose keys are their own positions; return how many tokens have another position.

    Rows come to differ in length under odd seeds alone.
    """
    draw = random.Random(seed)
    state = parse(text).open(Spec(rows := 2, 3, 3))
    seen, wrong = [0] * rows, 0
    for step in range(steps):
        t = draw.choice([1, 1, 1, 1, 2, 5])
        keys = torch.tensor([[[float(one + i)] * 3 for i in range(t)] for one in seen])
        kind = draw.random()
        if kind < 0.7:
            state.step(torch.randn(rows, 2, t, 3, generator=torch.Generator().manual_seed(step)), keys, keys)
            seen = [one + t for one in seen]
        elif kind < 0.8 and seed % 2:
            present = torch.tensor([[draw.random() < 0.7 for _ in range(t)] for _ in range(rows)])
            keys = keys[:, :1] + (present.cumsum(1) - 1).unsqueeze(-1)  # a pad takes no position
            state.append(keys, keys, present)
            seen = [one + int(row.sum()) for one, row in zip(seen, present, strict=True)]
        elif kind < 0.9:
            state = state.clone() if draw.random() < 0.5 else state.method.from_bytes(state.to_bytes())
        elif kind < 0.95:
            order = [draw.randrange(rows) for _ in range(rows)]
            state.select_rows(torch.tensor(order))
            seen = [seen[row] for row in order]
        elif text == "exact" and min(seen) > 3:
            state.forget(torch.arange(rows), torch.tensor([draw.randrange(one) for one in seen]))
        else:
            state.seal()
        assert state.slots is not None
        view = state.slots.view()
        live = torch.ones(view.k.shape[:2], dtype=torch.bool) if view.live is None else view.live
        wrong += int((view.k[..., 0][live] != view.position[live]).sum())
    return wrong


@pytest.mark.parametrize("text", METHODS)
def test_every_token_keeps_its_position(text: str) -> None:
    assert sum(told_wrongly(text, seed) for seed in range(6)) == 0


def test_numbers_that_are_never_written_anew_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: what was written for tokens to come is taken to hold after an eviction too."""
    original = Slots.number_from

    def careless(self: Slots, at: int, position: int) -> None:
        known = self._known_numbers
        if known is None or at >= known[1]:
            original(self, at, position)

    monkeypatch.setattr(Slots, "number_from", careless)
    state = parse("window(block=4)@9").open(Spec(1, 3, 3))
    for i in range(30):
        key = torch.full((1, 1, 3), float(i))
        state.step(torch.ones(1, 1, 1, 3), key, key)
    assert state.slots is not None
    view = state.slots.view()
    assert not torch.equal(view.k[..., 0], view.position.float())


def test_a_level_that_outlives_its_layout_is_found_out() -> None:
    """Rows of one length that become different ones, and back."""
    state = parse("exact").open(Spec(2, 3, 3))
    for _ in range(70):
        state.step(torch.ones(2, 1, 1, 3), torch.ones(2, 1, 3), torch.ones(2, 1, 3))
    slots = state.slots
    assert slots is not None and slots.level == 70
    state.forget(torch.tensor([0]), torch.tensor([4]))
    assert slots.level is None
    state.forget(torch.tensor([1]), torch.tensor([4]))
    assert slots.level == 69
    state.select_rows(torch.tensor([1, 1, 0]))
    assert slots.level == 69 and slots.newest(torch.ones(3, 1, 1, 3)).shape == (3, 1, 1, 3)
