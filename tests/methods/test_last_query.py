"""TOVA: the token that the last query attends to least leaves, against the paper's loop and wrong lines of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvfloor import Bounded, Spec, parse
from kvfloor.core.policy import Held, Queries
from kvfloor.methods.policies.last_query import LastQuery
from tests.literal import Rule, Token, keeps_alike, kept_by, run
from tests.support import Draw, filled, positions, stream, wrong

PLAIN = LastQuery(sinks=0, recent=0)


class Tova(Rule):
    def ask(self, held: list[Token], position: int, q: Tensor) -> None:
        for token, weight in zip(held, self.weights(held, q).mean(0).tolist(), strict=True):
            token.marks["weight"] = weight

    def worth(self, held: list[Token], seen: int, budget: int) -> list[float]:
        return [token.marks.get("weight", 2.0) for token in held]  # not judged yet: above every weight


def agrees(policy: LastQuery, draw: Draw, g: int = 3, block: int = 1) -> bool:
    rule = Tova(0.5, policy.sinks, policy.protected_last(12))
    return keeps_alike(policy, lambda row, b: rule, stream(draw, 2, g, 70, 8), 12, block)


@pytest.mark.parametrize("policy", [PLAIN, LastQuery(), LastQuery(sinks=1, recent=5)], ids=repr)
@pytest.mark.parametrize("block", [1, 5])
@pytest.mark.parametrize("g", [1, 3])
def test_what_is_kept_equals_the_papers_rule(draw: Draw, policy: LastQuery, g: int, block: int) -> None:
    assert agrees(policy, draw, g, block)


def looking_at(look: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], weights_of: str = "all") -> type[LastQuery]:
    """TOVA that takes look(weights, positions) of a block's queries for what they are."""

    def on_weights(self: LastQuery, held: Held, weights: Tensor, queries: Queries) -> dict[str, Tensor]:
        weights, position = look(weights, queries.position)
        return LastQuery.on_weights(self, held, weights, replace(queries, position=position))

    return wrong(LastQuery, weights_of=weights_of, on_weights=on_weights)


LAST_PLACE = looking_at(lambda weights, position: (weights[:, :, -1:], position[:, -1:]))
WRONG = {
    "the block's first query decides": looking_at(lambda weights, position: (weights[:, :, :1], position[:, :1])),
    "the largest weight of the group decides": looking_at(
        lambda weights, position: (weights.amax(1, keepdim=True), position), weights_of=LastQuery.weights_of
    ),
    "what all the block's queries gave decides": looking_at(lambda weights, position: (weights, position[:, -1:])),
    "the token with the most attention leaves": wrong(
        LastQuery, priority=lambda self, held: -held.columns["log_weight"]
    ),
}


@pytest.mark.parametrize("mutant", WRONG)
def test_a_wrong_line_is_rejected(draw: Draw, mutant: str) -> None:
    assert not agrees(WRONG[mutant](sinks=0, recent=0), draw, block=5)


@pytest.mark.parametrize(("policy", "right"), [(PLAIN, True), (LAST_PLACE(sinks=0, recent=0), False)])
def test_tokens_after_the_last_query_are_not_judged_and_stay(draw: Draw, policy: LastQuery, right: bool) -> None:
    """Half of each block is only appended: its tokens outlive all those that were judged.

    The wrong line takes the block's last place to decide, whether or not a query was asked there.
    """
    q, k, v = stream(draw, 1, 3, 24, 8)
    state: Any = Bounded(policy, budget=12, block=8).open(Spec(1, 8, 8, scale=0.5, dtype=torch.float64))
    for a in range(0, 24, 8):
        state.step(q[:, :, a : a + 4], k[:, a : a + 4], v[:, a : a + 4])
        state.append(k[:, a + 4 : a + 8], v[:, a + 4 : a + 8])
    asked = {i for i in range(24) if i % 8 < 4}
    assert (positions(state) == [kept_by(Tova(0.5), 12, q[0], k[0], v[0], 8, asked=asked)]) == right
    assert not right or {20, 21, 22, 23} <= set(positions(state)[0])


def test_without_a_query_it_is_a_window(draw: Draw) -> None:
    _, k, v = stream(draw, 2, 3, 40, 8)
    assert positions(run(PLAIN, 12, None, k, v, block=8)) == [list(range(28, 40))] * 2


def test_a_query_after_the_prompt_judges_every_token(draw: Draw) -> None:
    """`attend` counts: the last of its queries decides what leaves when the block ends."""
    q, k, v = stream(draw, 1, 3, 15, 8)
    state = filled("tova(sinks=0,recent=0,block=16)@12", k, v, scale=0.5)
    state.attend(q[:, :, :3])
    state.append(k[:, :1], v[:, :1])
    weights = torch.softmax(q[0, :, 2] @ k[0].T * 0.5, 1).mean(0)
    leaving = weights.argsort()[:4].tolist()
    assert positions(state) == [sorted(set(range(16)) - set(leaving))]


def test_half_precision_scores_are_float32(draw: Draw) -> None:
    """Two tokens whose weights differ by a thousandth: bfloat16 has no number between them."""
    state = parse("tova(sinks=0,recent=0,block=3)@2").open(Spec(1, 2, 2, dtype=torch.bfloat16))
    k = torch.tensor([[[1.0, 0.001], [1.0, 0.0], [3.0, 0.0]]], dtype=torch.bfloat16)
    state.step(torch.ones(1, 1, 3, 2, dtype=torch.bfloat16), k, torch.zeros_like(k))
    assert positions(state) == [[0, 2]]
