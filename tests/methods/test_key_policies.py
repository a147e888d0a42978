"""Knorm and KeyDiff: what leaves follows from the keys alone, against one-line loops and wrong lines of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvfloor.core.policy import Guarded, Held
from kvfloor.methods.policies.key_difference import KeyDifference
from kvfloor.methods.policies.key_norm import KeyNorm
from tests.literal import Rule, Token, keeps_alike, run
from tests.support import Draw, positions, stream, wrong


class Shortest(Rule):
    def worth(self, held: list[Token], seen: int, budget: int) -> list[float]:
        return [-(sum(float(x) ** 2 for x in token.k) ** 0.5) for token in held]


class MostDifferent(Rule):
    def worth(self, held: list[Token], seen: int, budget: int) -> list[float]:
        mean = sum((token.k / token.k.norm() for token in held), torch.zeros_like(held[0].k)) / len(held)
        return [-float(token.k @ mean / (token.k.norm() * mean.norm())) for token in held]


RULES = {KeyNorm: Shortest, KeyDifference: MostDifferent}


def agrees(policy: Guarded, rule: type[Rule], draw: Draw, budget: Any = 12, block: int = 1) -> bool:
    q, k, v = stream(draw, 2, 2, 61, 8)
    return keeps_alike(
        policy, lambda row, b: rule(0.5, policy.sinks, policy.protected_last(b)), (q, k + 0.5, v), budget, block
    )


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("options", [{"sinks": 0, "recent": 0}, {}, {"sinks": 2, "recent": 5}], ids=str)
@pytest.mark.parametrize(("block", "budget"), [(1, 12), (6, (9, 17))])
def test_what_is_kept_equals_the_papers_rule(
    draw: Draw, kind: type[Guarded], options: dict[str, int], block: int, budget: Any
) -> None:
    assert agrees(kind(**options), RULES[kind], draw, budget, block)


def plain_mean(self: KeyDifference, held: Held) -> Tensor:
    mean = held.k.masked_fill(~held.live.unsqueeze(-1), 0.0).sum(1, keepdim=True)
    return -torch.cosine_similarity(held.k, mean, dim=-1)


def dead_keys_count(self: KeyDifference, held: Held) -> Tensor:
    whole = [held.position.shape[1]] * len(held.filled)
    return KeyDifference.priority(self, replace(held, filled=whole))


WRONG = {
    "long keys stay": (KeyNorm, lambda self, held: -KeyNorm.priority(self, held)),
    "values are measured": (KeyNorm, lambda self, held: KeyNorm.priority(self, replace(held, fetch=lambda _: held.v))),
    "the keys most like the mean stay": (KeyDifference, lambda self, held: -KeyDifference.priority(self, held)),
    "long keys count for more in the mean": (KeyDifference, plain_mean),
    "slots that hold no token any more are part of the mean": (KeyDifference, dead_keys_count),
}


@pytest.mark.parametrize("mutant", WRONG)
def test_a_wrong_line_is_rejected(draw: Draw, mutant: str) -> None:
    kind, priority = WRONG[mutant]
    assert not agrees(wrong(kind, priority=priority)(sinks=0, recent=0), RULES[kind], draw, (9, 17), block=6)


@pytest.mark.parametrize("kind", RULES)
def test_keys_of_slots_in_step_are_not_copied(draw: Draw, kind: type[Guarded]) -> None:
    k, v = draw(3, 40, 8), draw(3, 40, 8)
    state = run(kind(), 12, None, k, v, block=4)
    held = state._held(None, int(state.slots.capacity.max()))
    assert held.k.untyped_storage().data_ptr() == state.slots.k.untyped_storage().data_ptr()
    assert held.v.untyped_storage().data_ptr() == state.slots.v.untyped_storage().data_ptr()


@pytest.mark.parametrize("kind", RULES)
def test_half_precision_keys_are_measured_in_float32(draw: Draw, kind: type[Guarded]) -> None:
    k, v = draw(1, 61, 8, dtype=torch.bfloat16), draw(1, 61, 8, dtype=torch.bfloat16)
    found = positions(run(kind(sinks=0, recent=0), 12, None, k, v, block=6))
    exact = positions(run(kind(sinks=0, recent=0), 12, None, k.double(), v.double(), block=6))
    assert found == exact


def test_a_key_of_length_zero_is_unlike_every_other(draw: Draw) -> None:
    k = draw(1, 16, 4).abs()
    k[0, 3] = 0.0
    assert 3 in positions(run(KeyDifference(sinks=0, recent=0), 4, None, k, k, block=16))[0]


@pytest.mark.parametrize("options", [{"sinks": -1}, {"recent": 2.5}, {"sinks": True}], ids=str)
@pytest.mark.parametrize("kind", RULES)
def test_impossible_options_are_refused_by_name(kind: type[Guarded], options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{kind.name}: (sinks|recent) must be a whole number >= 0"):
        kind(**options)


def test_a_small_budget_protects_a_quarter_of_itself() -> None:
    assert [KeyNorm().protected_last(budget) for budget in (4, 12, 63, 64, 1000)] == [1, 3, 15, 16, 16]
