"""The early-token freeze of accumulated attention, on a stream without content.

With random keys and queries no token deserves to stay, so whatever share of the final cache stems from its first
fill is bias of the score alone. Published for T = 2000 and a budget of 200 (logit spread not told): 0.995 for the
plain sum, 0.50 with half of the budget recent, 0.92 with 16 recent tokens, 0.14 for the mean with half recent, 0.04
for decay 0.98 with half recent. Here, with logits of unit spread over 8 rows: 0.998, 0.500, 0.919, 0.194, 0.016; with
a spread of 2 the mean gives 0.132. So order and size reproduce; the mean's figure depends on the spread.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from kvfloor import Spec, parse
from kvfloor.methods.policies.heavy_hitters import HeavyHitters
from tests.literal import Rule, Token, keeps_alike
from tests.support import Draw, stream


def share_of_first(text: str, rows: int, length: int, budget: int, spread: float = 1.0) -> float:
    """Mean share of the final cache that came among the first `budget` tokens."""
    generator = torch.Generator().manual_seed(5)
    d = 16
    q, k, v = (torch.randn(rows, *shape, d, generator=generator) for shape in ((1, length), (length,), (length,)))
    state = parse(f"{text}@{budget}").open(Spec(rows, d, d, scale=spread * d**-0.5))
    state.step(q, k, v)
    return float((state.slots.view().position < budget).float().mean())  # type: ignore[attr-defined]


SHARES = [
    ("h2o(sinks=0,recent=0,block=1)", 0.97, 1.0),
    ("h2o(sinks=0,recent={half},block=1)", 0.49, 0.501),
    ("h2o(score=mean,sinks=0,recent={half},block=1)", 0.05, 0.30),
    ("h2o(score=decay,decay={decay},sinks=0,recent={half},block=1)", 0.0, 0.06),
]


@pytest.mark.parametrize(("text", "low", "high"), SHARES, ids=["sum", "half recent", "mean", "decay"])
def test_the_early_token_freeze_shows_on_a_short_stream(text: str, low: float, high: float) -> None:
    """A budget of 60 in 600 tokens; decay 0.93 remembers as large a part of the budget as 0.98 does of 200."""
    assert low <= share_of_first(text.format(half=30, decay=0.93), rows=4, length=600, budget=60) <= high


@pytest.mark.slow
@pytest.mark.parametrize(("text", "low", "high"), SHARES, ids=["sum", "half recent", "mean", "decay"])
def test_the_early_token_freeze_reproduces_the_published_shares(text: str, low: float, high: float) -> None:
    assert low <= share_of_first(text.format(half=100, decay=0.98), rows=8, length=2000, budget=200) <= high


@pytest.mark.slow
def test_the_mean_freezes_less_the_sharper_the_attention() -> None:
    text = "h2o(score=mean,sinks=0,recent=100,block=1)"
    assert share_of_first(text, 8, 2000, 200, spread=2.0) == pytest.approx(0.14, abs=0.04)


@pytest.mark.slow
def test_sixteen_recent_tokens_do_not_thaw_the_sum() -> None:
    share = share_of_first("h2o(sinks=0,recent=16,block=1)", 8, 2000, 200)
    assert share == pytest.approx(0.92, abs=0.02)


class Accumulated(Rule):
    """The literal rule: each query adds its weights, averaged over the group, to what every held token has received."""

    def __init__(self, policy: HeavyHitters, budget: int, scale: float = 0.5) -> None:
        super().__init__(scale, policy.sinks, budget // 2)
        self.received: dict[int, float] = {}

    def ask(self, held: list[Token], position: int, q: Tensor) -> None:
        for token, weight in zip(held, self.weights(held, q).mean(0).tolist(), strict=True):
            self.received[token.position] = self.received.get(token.position, 0.0) + weight

    def worth(self, held: list[Token], seen: int, budget: int) -> list[float]:
        return [self.received.get(token.position, 0.0) for token in held]


def agrees(policy: HeavyHitters, draw: Draw, spares: str, prefill: str) -> bool:
    tokens = draw(2, 3, 60, 8, scale=2.0), draw(2, 60, 8), draw(2, 60, 8)
    return keeps_alike(
        policy, lambda _, budget: Accumulated(policy, budget), tokens, 16, 4, 43, spares=spares, prefill=prefill
    )


@pytest.mark.parametrize(("decode", "spares"), [("keep", "answer"), ("evict", "nothing")])
def test_an_answer_is_kept_whole_or_evicted_as_the_prompt_is(draw: Draw, decode: Any, spares: str) -> None:
    assert agrees(HeavyHitters(sinks=2, decode=decode), draw, spares, "dense")
    other = {"answer": "nothing", "nothing": "answer"}[spares]
    assert not agrees(HeavyHitters(sinks=2, decode=decode), draw, other, "dense")


def test_a_kept_answer_needs_no_queries_any_more(draw: Draw) -> None:
    """After the prompt the buffer of queries is gone, and asking changes no score."""
    state: Any = parse("h2o(decode=keep,prefill=dense,block=8)@16").open(Spec(1, 8, 8, dtype=torch.float64))
    q, k, v = stream(draw, 1, 2, 60, 8)
    state.step(q[:, :, :40], k[:, :40], v[:, :40])
    assert state.queries is not None
    state.seal()
    assert state.queries is None
    scores = state.slots.columns.score[:16].clone()
    state.step(q[:, :, 40:], k[:, 40:], v[:, 40:])
    state.attend(q[:, :, 40:])
    assert state.queries is None and int(state.held[0]) == 16 + 20
    assert torch.equal(scores, state.slots.columns.score[:16]) and not bool(state.slots.columns.score[16:].any())
