"""BalanceKV: the walk sign for sign, an unbiased sum, budgets that hold, errors below those of uniform samples."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kvfloor import Spec, parse
from kvfloor.randomness import row_keys, uniform
from kvfloor.sketches import self_balancing
from kvfloor.sketches.balance import BalanceState
from kvfloor.sketches.self_balancing import gram, halve, safe_threshold, sub_gaussian, walk

Draw = Callable[..., Tensor]
ALONE = "sinks=0,recent=0"


def opened(text: str, rows: int = 1, d: int = 4, dv: int = 4, **spec: Any) -> BalanceState:
    state = parse(text).open(Spec(rows, d, dv, **({"dtype": torch.float64} | spec)))
    assert isinstance(state, BalanceState)
    return state


def levels(state: BalanceState, row: int) -> dict[int, int]:
    """Position -> level of what the row holds."""
    here = slice(int(state.slots.offset[row]), int(state.slots.offset[row] + state.slots.held[row]))
    level = state.slots.columns.tensors()["level"][here].tolist()
    return dict(zip(state.slots.position[here].tolist(), level, strict=True))


# ---- the walk, literally -----------------------------------------------------------------------------------------


def literal_walk(k: Tensor, v: Tensor, draws: list[float], scale: float, c: float, pairs: bool) -> list[int]:
    """Signs of one row's tokens k (m, d), v (m, dv) with constant 1 and no centring, number by number."""
    m, most = len(k), max(float(x.norm()) for x in v)

    def kernel(i: int, j: int) -> float:
        return math.exp(scale * float(k[i] @ k[j])) * (float(v[i] @ v[j]) + most**2)

    def between(i: int, j: int) -> float:
        if not pairs:
            return kernel(i, j)
        a, b = 2 * i, 2 * j
        return kernel(a, b) - kernel(a + 1, b) - kernel(a, b + 1) + kernel(a + 1, b + 1)

    steps = m // 2 if pairs else m
    longest = max(math.sqrt(between(i, i)) for i in range(steps))
    signs: list[int] = []
    for j in range(steps):
        y = sum(sign * between(i, j) for i, sign in enumerate(signs))
        a = c * longest * (math.sqrt(between(j, j)) if pairs else longest)
        signs.append(1 if draws[j] < min(1.0, max(0.0, 0.5 - y / (2 * a))) else -1)
    return signs


@pytest.mark.parametrize("c", [0.125, 1.0, 9.0])
@pytest.mark.parametrize("keep", ["pairs", "smaller"])
def test_signs_are_those_of_the_literal_walk(draw: Draw, keep: self_balancing.Keep, c: float) -> None:
    rows, m, scale = 3, 14, 0.5
    k, v, draws = draw(rows, m, 3), draw(rows, m, 2), draw(rows, m).abs() % 1.0
    count = torch.tensor([14, 9, 2])
    products = gram(k, v, torch.arange(m) < count.unsqueeze(1), scale, 1.0, centre=False)
    stays, goes, _ = halve(products, count, draws, c, keep)
    for row, n in enumerate(count.tolist()):
        pairs = keep == "pairs"
        lots = draws[row, 0:n:2].tolist() if pairs else draws[row, :n].tolist()
        signs = literal_walk(k[row, :n], v[row, :n], lots, scale, c, pairs)
        if pairs:
            kept = {2 * i + (sign < 0) for i, sign in enumerate(signs)}
            gone = set(range(n - n % 2)) - kept
        else:
            plus = {i for i, sign in enumerate(signs) if sign > 0}
            kept = min((plus, set(range(n)) - plus), key=lambda one: (len(one), one != plus))
            gone = set(range(n)) - kept
        assert set(stays[row].nonzero().flatten().tolist()) == kept
        assert set(goes[row].nonzero().flatten().tolist()) == gone


def test_the_kernel_is_that_of_centred_keys_up_to_one_factor(draw: Draw) -> None:
    k, v = draw(1, 6, 3) + 5.0, draw(1, 6, 2)
    products = gram(k, v, torch.ones(1, 6, dtype=torch.bool), -0.7, 0.3, centre=True)[0]
    near = k[0] - k[0].mean(0)
    literal = torch.exp(0.7 * near @ near.T) * (v[0] @ v[0].T + 0.3 * v.norm(dim=2).max() ** 2)
    torch.testing.assert_close(products / products[0, 0], literal / literal[0, 0], rtol=1e-12, atol=0)


def test_a_common_factor_changes_no_sign_and_nothing_overflows(draw: Draw) -> None:
    products = gram(draw(4, 32, 3), draw(4, 32, 3), torch.ones(4, 32, dtype=torch.bool), 1.0, 1.0, centre=False)
    draws = draw(4, 32).abs() % 1.0
    for even in (True, False):
        here, scaled = walk(products, draws, 0.5, even), walk(products * 2.0**-300, draws, 0.5, even)
        assert torch.equal(here[0], scaled[0]) and torch.equal(here[1], scaled[1])
    huge = gram(1e160 * draw(2, 8, 3), 1e300 * draw(2, 8, 3), torch.ones(2, 8, dtype=torch.bool), 1.0, 1.0, centre=True)
    assert bool(torch.isfinite(huge).all())


def test_the_sum_of_signed_vectors_is_as_sub_gaussian_as_stated(draw: Draw) -> None:
    """4,000 walks over 64 unit vectors: variance in three fixed directions, and no clamped step at the safe c."""
    rows, m, d = 4000, 64, 5
    x = draw(m, d)
    x = x / x.norm(dim=1, keepdim=True)
    c = safe_threshold(m, 1e-6)
    for even in (True, False):
        draws = uniform(row_keys(1, torch.arange(rows), "test").unsqueeze(1), torch.arange(m))
        signs, clamped = walk((x @ x.T).expand(rows, -1, -1), draws, c, even)
        assert int(clamped.sum()) == 0
        sums = signs @ x
        directions = torch.eye(d, dtype=torch.float64)[:3]
        variance = (sums @ directions.T).square().mean(0)
        assert bool((variance <= sub_gaussian(c) ** 2).all())
        fair = (x @ directions.T).square().sum(0)
        assert bool((variance < 0.9 * fair).all())  # less than of fair coins


# ---- the stream --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [f"balance({ALONE})@64", "balance@64", "balance(batch=128)"])
def test_everything_is_exact_while_the_budget_lasts(draw: Draw, text: str) -> None:
    n = 56 if "@" in text else 127
    k, v, q = draw(2, n, 4), draw(2, n, 4), draw(2, 3, 4)
    state = opened(text, rows=2)
    state.append(k, v)
    part, logits = state.read(q), q @ k.transpose(1, 2)
    torch.testing.assert_close(part.mean, torch.softmax(logits, -1) @ v)
    torch.testing.assert_close(part.log_mass, torch.logsumexp(logits, -1))


@pytest.mark.parametrize("budget", [28, 64, 100])
def test_a_budget_holds_after_every_token_and_weights_add_up_to_n(draw: Draw, budget: int) -> None:
    state = opened(f"balance@{budget}", rows=2)
    before = state.nbytes
    for n in range(1, 400):
        state.append(draw(2, 1, 4), draw(2, 1, 4))
        assert int(state.held.max()) <= budget
        coins = budget == 28  # levels of one token each: there the weights are right on average only
        assert coins or all(sum(2**level for level in levels(state, row).values()) == n for row in range(2))
    assert state.nbytes == before
    held = levels(state, 1)
    assert all(held[position] == 0 for position in (*range(4), *range(383, 399)))


def test_levels_of_the_tree_are_those_of_merge_and_reduce(draw: Draw) -> None:
    """Without a budget: as in binary counting, level l holds b/2 tokens where bit l - 1 of the closed blocks is set."""
    state, b = opened(f"balance(batch=8,{ALONE})"), 8
    for n in range(1, 200):
        state.append(draw(1, 1, 4), draw(1, 1, 4))
        held = list(levels(state, 0).values())
        expected = {0: n % b}
        for level in range(1, 8):
            weight = n // b >> (level - 1)
            expected[level] = b // 2 * (weight & 1)
        assert {level: held.count(level) for level in range(8)} == expected
        limit = state.method.capacity(n)
        assert limit is not None and len(held) <= limit


@pytest.mark.parametrize("text", ["balance@64", "balance(batch=16)", "balance(keep=smaller,c=1.0)@40"])
def test_the_message_does_not_depend_on_the_cuts(draw: Draw, text: str) -> None:
    k, v = draw(2, 300, 4), draw(2, 300, 4)
    whole, cut = opened(text, rows=2), opened(text, rows=2)
    whole.append(k, v)
    for start, stop in ((0, 1), (1, 30), (30, 31), (31, 255), (255, 300)):
        cut.append(k[:, start:stop], v[:, start:stop])
    assert [levels(whole, row) for row in range(2)] == [levels(cut, row) for row in range(2)]
    if "@" in text:  # elsewhere the arena grew in other steps
        assert whole.to_bytes() == cut.to_bytes()


def test_rows_of_different_length_equal_each_row_alone_selected_and_restored(draw: Draw) -> None:
    k, v = draw(3, 200, 4), draw(3, 200, 4)
    length = [200, 17, 140]
    state = opened("balance@40", rows=3)
    state.append(k, v, torch.arange(200) < torch.tensor(length).unsqueeze(1))
    again = state.method.from_bytes(state.to_bytes())
    assert isinstance(again, BalanceState) and again.to_bytes() == state.to_bytes()
    again.select_rows(torch.tensor([2, 0, 1]))
    for row, n in enumerate(length):
        alone = opened("balance@40", row_ids=[row])
        alone.append(k[row : row + 1, :n], v[row : row + 1, :n])
        assert levels(state, row) == levels(alone, 0) == levels(again, (row + 1) % 3)


def test_the_signs_of_a_stream_are_those_of_the_literal_walk_with_its_draws(draw: Draw) -> None:
    """One level of one row from the state itself: draws keyed by (seed, row id, position, level)."""
    k, v = draw(1, 16, 3), draw(1, 16, 2)
    state = opened(f"balance(batch=16,centre=False,{ALONE})", d=3, dv=2, seed=5, row_ids=[9])
    state.append(k, v)
    draws = uniform(row_keys(5, torch.tensor([9]), "balance"), torch.arange(0, 16, 2) * 64)
    signs = literal_walk(k[0], v[0], draws.tolist(), 1.0, 0.125, pairs=True)
    assert levels(state, 0) == {2 * i + (sign < 0): 1 for i, sign in enumerate(signs)}


# ---- what it promises --------------------------------------------------------------------------------------------


def z_scores(text: str, draw: Draw, seeds: int = 400) -> Tensor:
    """(numerator estimates - numerator) in standard errors, over row ids: (m, dv), for one stream and 4 queries."""
    n, d = 96, 3
    k, v, q = draw(n, d) * 0.7, draw(n, 2), draw(4, d) * 0.7
    state = opened(text, rows=seeds, d=d, dv=2)
    state.append(k.expand(seeds, -1, -1), v.expand(seeds, -1, -1))
    part = state.read(q.expand(seeds, -1, -1))
    estimate = part.mean * part.log_mass.exp().unsqueeze(-1)
    error = estimate - torch.exp(q @ k.T) @ v
    return error.mean(0) / (error.std(0) / math.sqrt(seeds))


@pytest.mark.parametrize("text", [f"balance(batch=16,{ALONE})", f"balance(c=1.0,{ALONE})@24", f"balance({ALONE})@9"])
def test_the_numerator_is_unbiased(draw: Draw, text: str) -> None:
    """8 means of 400 seeds each within 4 standard errors: a fair run fails once in 2,000."""
    assert float(z_scores(text, draw).abs().max()) < 4.0


def test_the_paper_s_smaller_class_loses_mass(draw: Draw) -> None:
    """What the test above would say of it: the smaller class has less than half of the weight on average."""
    v = torch.ones(1, 16, 2, dtype=torch.float64)
    state = opened(f"balance(batch=16,keep=smaller,{ALONE})", rows=400, d=3, dv=2)
    state.append(draw(1, 16, 3).expand(400, -1, -1), v.expand(400, -1, -1))
    mass = state.read(torch.zeros(400, 1, 3, dtype=torch.float64)).log_mass.exp()
    assert float(mass.max()) <= 16.0 + 1e-9 and float(mass.mean()) < 15.5


def relative_errors(text: str, k: Tensor, v: Tensor, q: Tensor, seeds: int) -> Tensor:
    """Root mean square error over the queries (m, d), relative to the answers': (seeds,)."""
    spec = Spec(seeds, k.shape[1], v.shape[1], scale=k.shape[1] ** -0.5, dtype=torch.float64)
    state = parse(text).open(spec)
    state.append(k.expand(seeds, -1, -1), v.expand(seeds, -1, -1))
    truth = torch.softmax(spec.scale * q @ k.T, -1) @ v
    return ((state.read(q.expand(seeds, -1, -1)).mean - truth).norm(dim=(1, 2))) / truth.norm()
