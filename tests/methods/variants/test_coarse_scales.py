"""A budget over the scales of a pyramid: coarse ones stay whole, the rest is shared out in proportion."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from kvfloor import Spec, parse
from kvfloor.core.state import State
from kvfloor.game.engine.instance import agreed, keys_for
from kvfloor.game.engine.secret import Hidden
from kvfloor.game.instances.visual import Visual
from kvfloor.methods.variants import NextScale, keep_coarse, scale_budgets, tokens_in
from kvfloor.methods.variants.visual import scale_by_scale

SIDES = (1, 2, 4, 8, 16)  # 1 + 4 + 16 + 64 + 256 = 341 tokens
D = 8


def drive(state: State, sides=SIDES, seed: int = 0) -> list[list[list[int]]]:
    """Drive a random pyramid; the positions that every row holds after each scale."""
    rows, n = state.spec.rows, tokens_in(sides)
    noise = torch.Generator().manual_seed(seed)
    q = torch.randn(rows, 2, n, D, generator=noise)
    k, v = (torch.randn(rows, n, D, generator=noise) for _ in range(2))
    driver, held = NextScale(state), []
    for part in zip(*(scale_by_scale(sides, x) for x in (q, k, v)), strict=True):
        assert torch.isfinite(driver.step(*part)).all()
        view = state.slots.view()  # type: ignore[attr-defined]
        live = torch.ones_like(view.position, dtype=torch.bool) if view.live is None else view.live
        held.append([sorted(row[here].tolist()) for row, here in zip(view.position, live, strict=True)])
    return held


def opened(text: str, rows: int = 2) -> State:
    return parse(text).open(Spec(rows, D, D))


@pytest.mark.parametrize(
    ("total", "share", "budgets"),
    [
        (341, 0.5, [1, 4, 16, 64, 256]),
        (1000, 0.0, [1, 4, 16, 64, 256]),
        (64, 0.5, [1, 4, 16, 8, 35]),  # 43 left for 320 tokens: 8.6 and 34.4
        (42, 0.5, [1, 4, 16, 4, 17]),
        (41, 0.5, [1, 4, 1, 7, 28]),  # 21 is more than half of it
        (64, 0.0, [0, 0, 3, 12, 49]),
        (64, 1.0, [1, 4, 16, 8, 35]),
        (1, 0.5, [0, 0, 0, 0, 1]),
    ],
)
def test_budgets_of_scales_add_up_to_the_total(total: int, share: float, budgets: list[int]) -> None:
    assert scale_budgets(SIDES, total, share) == budgets
    assert sum(budgets) == min(total, tokens_in(SIDES))
    assert scale_budgets((1, 1, 1), 2, 0.0) == [0, 1, 1]  # none is promised more than it has


def test_impossible_arguments_are_named() -> None:
    for arguments, said in (
        ((SIDES, 0), "total must be a whole number >= 1"),
        (((1, 0), 5), "side must be a whole number >= 1"),
        ((SIDES, 9, 1.5), "share must"),
    ):
        with pytest.raises(ValueError, match=said):
            scale_budgets(*arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="exact has no budget to share out"):
        keep_coarse(opened("exact"), SIDES)
    with pytest.raises(ValueError, match="share must"):
        keep_coarse(opened("window@64"), SIDES, 2.0)
    with pytest.raises(ValueError, match="too small for h2o: it protects"):
        keep_coarse(opened("h2o(recent=60)@64"), SIDES)
    late = opened("window@64")
    late.append(torch.zeros(2, 1, D), torch.zeros(2, 1, D))
    with pytest.raises(ValueError, match="before the first token"):
        keep_coarse(late, SIDES)


@pytest.mark.parametrize("text", ["window@64", "random@64", "h2o(recent=8)@64", "knorm@64", "tova@96", "window@70:64"])
def test_tokens_of_coarse_scales_never_leave_and_the_budget_is_held(text: str) -> None:
    state = opened(text)
    assert keep_coarse(state, SIDES) == 3
    most = state.method.capacity(tokens_in(SIDES))
    for scale, rows in enumerate(drive(state)):
        coarse = set(range(tokens_in(SIDES[: min(scale + 1, 3)])))
        for held in rows:
            assert coarse <= set(held) and len(held) <= most
    twin = state.method.from_bytes(state.to_bytes())
    for each in (state.clone(), twin):
        NextScale(each).step(*(torch.ones(2, *group, 256, D) for group in ((1,), (), ())))
        position = each.slots.view().position  # type: ignore[attr-defined]
        assert all(set(range(21)) <= set(row.tolist()) for row in position)


def test_without_pins_the_coarse_scales_are_lost() -> None:
    """The mutant of the test above: the same streams, nothing pinned."""
    held = drive(opened("window@64"))[-1]
    assert all(min(row) >= tokens_in(SIDES[:3]) for row in held)


def test_pins_choose_as_protected_first_tokens_do() -> None:
    """As a method's text the same budget is `sinks=` of the coarse tokens."""
    pinned = opened("random(block=1)@64")
    keep_coarse(pinned, SIDES)
    assert drive(pinned) == drive(opened("random(sinks=21,block=1)@64"))


def test_a_random_policy_keeps_every_finer_scale_in_proportion() -> None:
    rows, total = 400, 64
    state = opened(f"random(block=1)@{total}", rows)
    keep_coarse(state, SIDES)
    held = torch.tensor(drive(state)[-1])
    assert held.shape == (rows, total)
    edges = [tokens_in(SIDES[:i]) for i in range(len(SIDES) + 1)]
    kept = [((held >= a) & (held < b)).sum(1) for a, b in pairwise(edges)]
    assert all(bool((kept[i] == SIDES[i] ** 2).all()) for i in range(3))
    # Of 43 free slots over 64 + 256 tokens, hypergeometric.
    mean, variance = 43 * 64 / 320, 43 * (64 / 320) * (256 / 320) * (320 - 43) / 319
    assert abs(float(kept[3].double().mean()) - mean) < 4 * math.sqrt(variance / rows)
    assert scale_budgets(SIDES, total)[3] == math.floor(mean)


def read_by_scale(text: str, pin: bool) -> list[float]:
    """On the visual barrier: the share of each scale's hidden rows that the state answers."""
    shared = agreed(d=64, dv=None, bits=1, eta=0.5, seed=0)
    n = tokens_in(SIDES)
    instance = Visual(**shared, sides=SIDES, public=keys_for(shared, n))
    hidden = Hidden(3)
    levels = hidden.levels(n, 64, 1)
    state = parse(text).open(instance.spec())
    if pin:
        keep_coarse(state, SIDES)
    instance.feed(state, levels, hidden)
    right = ((instance.ask(state, None) > 0.5) == (levels > 0)).all(1)
    return [float(part.double().mean()) for part in scale_by_row(right)]


def scale_by_row(right: Tensor) -> list[Tensor]:
    return list(torch.split(right, [side**2 for side in SIDES]))


def test_on_the_visual_barrier_other_rows_are_lost() -> None:
    """A window forgets every scale but the last; with pins it answers for all coarse ones, with fewer of the last."""
    plain, pinned = (read_by_scale("window(block=1)@64", pin) for pin in (False, True))
    assert plain == [0.0, 0.0, 0.0, 0.0, 64 / 256]
    assert pinned == [1.0, 1.0, 1.0, 0.0, 43 / 256]
