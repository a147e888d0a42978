"""The short way of one token per row: open only to states whose answer is attention over all slots in step."""

from __future__ import annotations

import pytest
import torch

from kvfloor import Spec, State, parse
from kvfloor.methods.grammar import default_method
from kvfloor.methods.registry import TABLE
from tests.support import Stream, between, close, seeded, stream

OTHERS = ["window(block=2)+value_sum@4", "sinks(1,block=2)+value_sum@4", "exact|top_k(k=2)"]
SHORT = [
    "exact",
    "window(block=2)@4",
    "h2o(recent=2,sinks=1,block=2)@4",
    "exact:k4v4",
    "quant(group=4)",
    "h2o(recent=2,sinks=1,block=2):k4v3(first=1)@4",
]


def drawn(t: int) -> Stream:
    return stream(seeded(t), 2, 2, t)


def goes_on_alike(one: State, other: State, n: int) -> None:
    """Step `one` token by token, `other` too but by the general way, which `present` asks for."""
    tokens, present = drawn(n), torch.ones(2, 1, dtype=torch.bool)
    for i in range(n):
        token = between(tokens, i, i + 1)
        close(one.step(*token), other.step(*token, present))
    assert one.seen.tolist() == other.seen.tolist()
    if one.held.any():
        assert one.held.tolist() == other.held.tolist()


@pytest.mark.parametrize("text", [*SHORT, *OTHERS, "h2o|pages(pages=1,page=2)@12", *TABLE])
def test_a_token_alone_is_answered_as_by_the_general_way(text: str) -> None:
    method = default_method(text, budget=64) if text in TABLE else parse(text)
    if method.traits.reference == "tensor":
        pytest.skip("takes tensors of another shape")
    spec = Spec(2, 4, 4, dtype=torch.float64)
    one, other = method.open(spec), method.open(spec)
    q, k, v = drawn(90)
    one.step(q, k, v)
    other.step(q, k, v)
    goes_on_alike(one, other, 7)


@pytest.mark.parametrize("text", [text for text in SHORT if "@" in text])
def test_rows_of_different_clocks_that_hold_as_many_tokens_keep_their_own_positions(text: str) -> None:
    spec = Spec(2, 4, 4, dtype=torch.float64)
    one, other = parse(text).open(spec), parse(text).open(spec)
    q, k, v = drawn(8)
    present = torch.arange(8) >= torch.tensor([[0], [2]])
    for state in (one, other):
        state.step(q, k, v, present)
    assert one.seen.tolist() == [8, 6] and one.held.tolist() == [4, 4]
    goes_on_alike(one, other, 6)
    assert one.to_bytes() == other.to_bytes()
    assert one.slots.view().position.amax(1).tolist() == [13, 11]


def test_the_short_way_is_taken_by_plain_states_and_by_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = Spec(2, 4, 4, dtype=torch.float64)
    q, k, v = drawn(1)
    taken = {}
    for text in (*SHORT, *OTHERS, "subgen_sketch(s=8)"):
        state, calls = parse(text).open(spec), []
        monkeypatch.setattr(type(state), "_step_one", lambda self, *tokens, calls=calls: calls.append(1) or tokens[2])
        state.step(q, k, v)
        taken[text] = bool(calls)
        monkeypatch.undo()
    assert taken == {text: text in SHORT for text in taken}
