"""k_center: the farthest-first rule against a literal loop, its factor of two against all choices, and wrong rules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from kvfloor import Spec, parse
from kvfloor.core.policy import Held
from kvfloor.methods.policies.farthest_key import FarthestKey, picked
from tests.literal import Rule, Token, kept_by, positions, run

Draw = Callable[..., Tensor]


class Gonzalez(Rule):
    def worth(self, held: list[Token], seen: int, budget: int) -> list[float]:
        worth = [float(10**6) if self.safe(token, seen) else 0.0 for token in held]
        for turn in range(budget):
            kept = [token for token, w in zip(held, worth, strict=True) if w > 0]
            near = [min((float((token.k - c.k).norm()) for c in kept), default=-token.position) for token in held]
            best = max((i for i, w in enumerate(worth) if w == 0), key=lambda i: near[i], default=None)
            if best is None:
                break
            worth[best] = float(10**5 - turn)
        return worth


def agrees(policy: FarthestKey, draw: Draw, budget: Any, block: int, prefill: str) -> bool:
    rows = 2
    q, k, v = draw(rows, 2, 61, 8), draw(rows, 61, 8) + 0.5, draw(rows, 61, 8)
    found = positions(run(policy, budget, q, k, v, block=block, prefill=prefill))
    budgets = budget if isinstance(budget, tuple) else (budget,) * rows
    wanted = [
        kept_by(Gonzalez(0.5, policy.sinks, policy.protected_last(b)), b, q[row], k[row], v[row], block)
        for row, b in enumerate(budgets)
    ]
    return found == wanted


@pytest.mark.parametrize("options", [{"sinks": 0, "recent": 0}, {}, {"sinks": 2, "recent": 5}], ids=str)
@pytest.mark.parametrize("block", [1, 6])
@pytest.mark.parametrize("budget", [12, (9, 17)])
def test_what_is_kept_equals_farthest_first(draw: Draw, options: dict[str, int], block: int, budget: Any) -> None:
    assert agrees(FarthestKey(**options), draw, budget, block, "stream")


@dataclass(frozen=True)
class Nearest(FarthestKey):
    """The picks leave and the others stay."""

    def priority(self, held: Held) -> Tensor:
        return -super().priority(held)


@dataclass(frozen=True)
class Unaware(FarthestKey):
    """Tokens that stay anyway are no centres."""

    def priority(self, held: Held) -> Tensor:
        nothing = torch.zeros_like(held.live)
        return -picked(held.k, held.live, nothing, held.position, int(held.budget.max()))


@pytest.mark.parametrize("wrong", [Nearest(), Unaware(sinks=3, recent=4)])
def test_wrong_rules_keep_other_tokens(draw: Draw, wrong: FarthestKey) -> None:
    assert not agrees(wrong, draw, 12, 6, "stream")


def radius(k: Tensor, centres: list[int]) -> float:
    return float(torch.cdist(k, k[centres]).amin(1).max())


@pytest.mark.parametrize("fixed", [[], [0, 8]], ids=["no centre given", "two given"])
def test_the_radius_is_within_twice_the_least(draw: Draw, fixed: list[int]) -> None:
    """All choices of 3 further centres among 9 tokens, over 40 streams; keeping the newest 3 instead is not."""
    worst = ratio = 0.0
    for k in draw(40, 9, 2):
        kept = torch.zeros(1, 9, dtype=torch.bool)
        kept[0, fixed] = True
        turn = picked(k[None], torch.ones_like(kept), kept, torch.arange(9)[None], 3)[0]
        found = (turn <= 3).nonzero()[:, 0].tolist()
        assert len(found) == 3 + len(fixed) and set(fixed) <= set(found)
        free = [i for i in range(9) if i not in fixed]
        best = min(radius(k, [*fixed, *more]) for more in combinations(free, 3))
        ratio = max(ratio, radius(k, found) / best)
        worst = max(worst, radius(k, [*fixed, 5, 6, 7]) / best)
    assert ratio <= 2.0 < worst


def test_one_token_of_every_cluster_stays(draw: Draw) -> None:
    """24 far clusters of 20 near keys, 24 places: every cluster is represented, where a window keeps few of them."""
    centre = 50.0 * draw(24, 6)
    k = (centre.repeat(20, 1) + 0.1 * draw(480, 6))[torch.randperm(480, generator=torch.Generator().manual_seed(1))]
    for text, clusters in (("k_center(sinks=0,recent=0,block=1)@24", 24), ("window(block=1)@24", 16)):
        state = parse(text).open(Spec(1, 6, 6, dtype=k.dtype))
        state.append(k[None], k[None])
        state.seal()
        held = k[torch.tensor(positions(state)[0])]
        represented = len(torch.cdist(held, centre).argmin(1).unique())
        assert represented == clusters if clusters == 24 else represented <= clusters


def test_the_answer_is_kept_where_it_is_to_be(draw: Draw) -> None:
    k = draw(1, 90, 4)
    for decode, held in (("keep", 16 + 40), ("evict", 16)):
        state = parse(f"k_center(decode={decode},block=4)@16").open(Spec(1, 4, 4, dtype=k.dtype))
        state.append(k[:, :50], k[:, :50])
        state.seal()
        state.append(k[:, 50:], k[:, 50:])
        assert int(state.held[0]) <= held + 3 and (decode == "evict" or positions(state)[0][16:] == list(range(50, 90)))


def test_a_wrong_word_is_refused() -> None:
    with pytest.raises(ValueError, match="decode must be keep or evict, got 'drop'"):
        FarthestKey(decode="drop")  # type: ignore[arg-type]
