"""The early-token freeze of accumulated attention, on a stream without content.

With random keys and queries no token deserves to stay, so whatever share of the final cache stems from its first
fill is bias of the score alone. Published for T = 2000 and a budget of 200 (logit spread not told): 0.995 for the
plain sum, 0.50 with half of the budget recent, 0.92 with 16 recent tokens, 0.14 for the mean with half recent, 0.04
for decay 0.98 with half recent. Here, with logits of unit spread over 8 rows: 0.998, 0.500, 0.919, 0.194, 0.016; with
a spread of 2 the mean gives 0.132. So order and size reproduce; the mean's figure depends on the spread.
"""

import pytest
import torch

from kvfloor import Spec, parse


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
