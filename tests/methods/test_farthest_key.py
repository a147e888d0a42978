"""k_center: the farthest-first rule against a literal loop, its factor of two against all choices, and wrong rules."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from kvfloor.core.policy import Held
from kvfloor.methods.policies.farthest_key import FarthestKey, picked
from tests.literal import Rule, Token, keeps_alike
from tests.support import Draw, filled, positions, stream, wrong


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
    q, k, v = stream(draw, 2, 2, 61, 8)

    def rule(row: int, b: int) -> Rule:
        return Gonzalez(0.5, policy.sinks, policy.protected_last(b))

    return keeps_alike(policy, rule, (q, k + 0.5, v), budget, block, prefill=prefill)


@pytest.mark.parametrize("options", [{"sinks": 0, "recent": 0}, {}, {"sinks": 2, "recent": 5}], ids=str)
@pytest.mark.parametrize(("block", "budget"), [(1, 12), (6, (9, 17))])
def test_what_is_kept_equals_farthest_first(draw: Draw, options: dict[str, int], block: int, budget: Any) -> None:
    assert agrees(FarthestKey(**options), draw, budget, block, "stream")


def unaware(self: FarthestKey, held: Held) -> Tensor:
    """Tokens that stay anyway are no centres."""
    return -picked(held.k, held.live, torch.zeros_like(held.live), held.position, int(held.budget.max()))


@pytest.mark.parametrize(
    ("priority", "given"),
    [(lambda self, held: -FarthestKey.priority(self, held), {}), (unaware, {"sinks": 3, "recent": 4})],
    ids=["the picks leave", "what stays is no centre"],
)
def test_wrong_rules_keep_other_tokens(draw: Draw, priority: Any, given: dict[str, int]) -> None:
    assert not agrees(wrong(FarthestKey, priority=priority)(**given), draw, 12, 6, "stream")


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
        state = filled(text, k[None])
        state.seal()
        held = k[torch.tensor(positions(state)[0])]
        represented = len(torch.cdist(held, centre).argmin(1).unique())
        assert represented == clusters if clusters == 24 else represented <= clusters


def test_the_answer_is_kept_where_it_is_to_be(draw: Draw) -> None:
    k = draw(1, 90, 4)
    for decode, held in (("keep", 16 + 40), ("evict", 16)):
        state = filled(f"k_center(decode={decode},block=4)@16", k[:, :50])
        state.seal()
        state.append(k[:, 50:], k[:, 50:])
        assert int(state.held[0]) <= held + 3 and (decode == "evict" or positions(state)[0][16:] == list(range(50, 90)))


def test_a_wrong_word_is_refused() -> None:
    with pytest.raises(ValueError, match="decode must be keep or evict, got 'drop'"):
        FarthestKey(decode="drop")  # type: ignore[arg-type]
