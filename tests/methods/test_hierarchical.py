"""Hierarchical: what is read equals the halving written out, who leads whom, and what the halving cannot find."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kvfloor import Exact, Method, Spec
from kvfloor.methods.selectors.hierarchical import Hierarchical, HierarchicalState
from tests.support import Draw, Stream, between, causal, close, fed, filled, opened, stream, wrong


def blocks_kept(q: Tensor, keys: Tensor, method: Hierarchical) -> tuple[list[int], int]:
    """Blocks that q (d,) keeps of keys (s, d), in order of age, and how many there were: plain loops."""
    size, most = method.key_block, method.k // method.key_block
    there = max(0, len(keys) - method.sinks - method.window) // size
    spans = [(i * there // most, (i + 1) * there // most) for i in range(most)]
    while any(high - low > 1 for low, high in spans):
        halves = []
        for low, high in spans:
            middle = (low + high + 1) // 2
            halves += [(low, middle), (middle, high)]
        worth = []
        for low, high in halves:
            if high > low:
                centre = method.sinks + (low + high - 1) // 2 * size
                worth.append((float((keys[centre : centre + size] @ q).max()), low, high))
        spans = [(low, high) for _, low, high in sorted(worth, reverse=True)[:most]]
    return sorted(low for low, high in spans if high > low), there


def slots_read(kept: list[int], there: int, visible: int, method: Hierarchical) -> list[int]:
    """Sinks, kept blocks and what is newer than all blocks."""
    inside = [method.sinks + block * method.key_block + i for block in kept for i in range(method.key_block)]
    rest = range(method.sinks + there * method.key_block, visible)
    return sorted({*range(min(method.sinks, visible)), *inside, *rest})


def written_out(q: Tensor, k: Tensor, v: Tensor, method: Hierarchical, seal: int) -> Tensor:
    """Answers (g, n, dv) for one row q (g, n, d), k (n, d), v (n, dv), sealed after `seal` tokens; scale 1."""
    g, n, _ = q.shape
    out = torch.zeros(g, n, v.shape[1], dtype=torch.float64)
    for head in range(g):
        span, kept, there = None, [], 0
        for i in range(n):
            share = method.refresh if i >= seal else method.query_block
            here = (i >= seal, i // share)
            if here != span:
                span = here
                kept, there = blocks_kept(q[head, i], k[: i + 1], method)
            read = slots_read(kept, there, i + 1, method)
            out[head, i] = torch.softmax(k[read] @ q[head, i], 0) @ v[read]
    return out


def answers(method: Method, tokens: Stream, seal: int, chunk: int) -> Tensor:
    (rows, _, n, d), v = tokens[0].shape, tokens[2]
    state = method.open(Spec(rows, d, v.shape[2], dtype=torch.float64))
    before = fed(state, between(tokens, 0, seal), *range(0, seal, chunk))
    state.seal()
    return torch.cat([before, fed(state, between(tokens, seal), *range(chunk - seal % chunk, n - seal, chunk))], 2)


CONFIGURATIONS = [
    Hierarchical(k=8, key_block=2, sinks=2, window=3, query_block=5, refresh=3),
    Hierarchical(k=6, key_block=1, sinks=0, window=1, query_block=1, refresh=4),
    Hierarchical(k=12, key_block=4, sinks=1, window=8, query_block=16, refresh=1),
]


@pytest.mark.parametrize("chunk", [1, 9, 66])
@pytest.mark.parametrize("method", CONFIGURATIONS, ids=["pairs", "single keys", "fours"])
def test_answers_equal_the_halving_written_out(draw: Draw, method: Hierarchical, chunk: int) -> None:
    n, seal = 66, 43
    q, k, v = stream(draw, 2, 2, n, 6)
    out = answers(Exact(method), (q, k, v), seal, chunk)
    for row in range(2):
        wanted = written_out(q[row], k[row], v[row], method, seal)
        torch.testing.assert_close(out[row], wanted, rtol=1e-11, atol=1e-12)


WRONG = {
    "the first block speaks for a half": {
        "_worth": lambda self, q, slots, low, high, rows: HierarchicalState._worth(
            self, q, slots, low, torch.minimum(high, low + 1), rows
        )
    },
    "a choice outlives the seal": {"seal": lambda self: setattr(self, "sealed", True)},
    "every query chooses for itself": {
        "follow": lambda self, q, slots, visible, position: self.choose(
            q.flatten(1, 2), slots, visible.repeat(1, q.shape[1])
        )
    },
}


@pytest.mark.parametrize("mutant", WRONG)
def test_the_comparison_notices_a_wrong_line(draw: Draw, mutant: str) -> None:
    n, seal = 66, 42
    q, k, v = stream(draw, 1, 2, n, 6)
    state = wrong(HierarchicalState, **WRONG[mutant])
    method = wrong(Hierarchical, open=lambda self, spec, slots, shared, in_order: state(spec, slots, self, in_order))
    right = {"k": 8, "key_block": 2, "sinks": 2, "window": 3, "query_block": 5, "refresh": 5}
    out = answers(Exact(method(**right)), (q, k, v), seal, 66)
    wanted = written_out(q[0], k[0], v[0], Hierarchical(**right), seal)
    assert float((out[0] - wanted).abs().max()) > 1e-3


def test_a_choice_under_eviction_goes_by_age_and_not_by_slot(draw: Draw) -> None:
    method = Hierarchical(k=6, key_block=2, sinks=1, window=2)
    state: Any = opened("random(block=4)|hip(k=6,key_block=2,sinks=1,window=2)@30", 2, 5)
    for t in (50, 1, 2, 37):
        state.append(draw(2, t, 5), draw(2, t, 5))
        q, view = draw(2, 3, 5), state.slots.view()
        unread = state.unread(q)
        assert not torch.equal(view.position, view.position.sort(1).values)
        for row in range(2):
            order = view.position[row].argsort()
            for i in range(3):
                kept, there = blocks_kept(q[row, i], view.k[row, order], method)
                wanted = order[slots_read(kept, there, len(order), method)]
                assert sorted((~unread[row, i]).nonzero().squeeze(1).tolist()) == sorted(wanted.tolist())


@pytest.mark.parametrize("refresh", [1, 5])
def test_reading_neither_uses_nor_moves_the_open_choice(draw: Draw, refresh: int) -> None:
    state: Any = opened(f"exact|hip(k=4,sinks=1,window=2,refresh={refresh})")
    state.step(*stream(draw, 1, 1, 60))
    state.seal()
    state.step(*stream(draw, 1, 1, 2))
    before, q = state.to_bytes(), draw(1, 1, 4)
    first = state.read(q).mean
    state.attend(draw(1, 2, 3, 4))
    assert state.to_bytes() == before
    assert torch.equal(state.read(q).mean, first)


def test_another_group_chooses_anew(draw: Draw) -> None:
    state = opened("exact|hip(k=4,sinks=1,window=2)")
    state.step(*stream(draw, 1, 2, 40))
    out = state.step(*stream(draw, 1, 3, 1))
    assert out.shape == (1, 3, 1, 4) and bool(torch.isfinite(out).all())


@pytest.mark.parametrize("n", [4 + 32 + 64, 4 + 32 + 65])
def test_nothing_is_lost_while_the_blocks_are_few_enough(draw: Draw, n: int) -> None:
    q, k, v = stream(draw, 1, 2, n)
    close(opened("exact|hip(k=64)").step(q, k, v), causal(q, k, v))


def share_found(keys: Tensor, q: Tensor, text: str, places: Tensor) -> float:
    """How often the token at `places[row]` is among those that q (rows, 1, d) reads."""
    unread = filled(text, keys).unread(q)
    return float((~unread[torch.arange(len(places)), 0, places]).double().mean())


def test_an_isolated_needle_is_lost_and_a_smooth_landscape_is_not(draw: Draw) -> None:
    """64 needles at places spread over 1,024 tokens, k = 64: halving finds few, bounds on pages all of them.

    On keys that turn slowly, near ones have near logits and halving finds the best.
    """
    rows, n, d = 64, 1024, 8
    places = torch.arange(rows) * 15 + 30
    q = torch.ones(rows, 1, d, dtype=torch.float64)
    needles = draw(rows, n, d, scale=0.05)
    needles[torch.arange(rows), places] = 1.0
    assert share_found(needles, q, "exact|hip(k=64,sinks=0)", places) <= 0.3
    assert share_found(needles, q, "exact|pages(pages=3)", places) == 1.0
    angle = torch.arange(n, dtype=torch.float64) * (math.pi / n)
    turn = torch.stack([angle.cos(), angle.sin()], 1).expand(rows, -1, -1)
    q = turn[torch.arange(rows), places].unsqueeze(1)
    assert share_found(turn, q, "exact|hip(k=64,sinks=0)", places) == 1.0


def test_a_decoded_token_that_follows_reads_only_what_was_chosen(draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    state: Any = opened("exact|hip(k=16,refresh=4)")
    state.append(draw(1, 400, 4), draw(1, 400, 4))
    state.seal()
    descents, true_descend = [], HierarchicalState._descend

    def counted(self: HierarchicalState, *arguments: Any) -> Tensor:
        descents.append(1)
        return true_descend(self, *arguments)

    monkeypatch.setattr(HierarchicalState, "_descend", counted)
    for _ in range(8):
        state.step(*stream(draw, 1, 2, 1))
    assert len(descents) == 2
