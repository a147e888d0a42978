"""BalanceKV: the walk sign for sign, an unbiased sum, budgets that hold, errors below those of uniform samples."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kvfloor import Spec, parse
from kvfloor.core.randomness import row_keys, uniform
from kvfloor.core.slots import Slots
from kvfloor.methods.sketches import balance as balance_module
from kvfloor.methods.sketches import self_balancing
from kvfloor.methods.sketches.balance import BalanceState
from kvfloor.methods.sketches.self_balancing import gram, halve, safe_threshold, sub_gaussian, walk
from kvfloor.statistics import clopper_pearson_limit
from tests.support import Draw, filled, many, opened

ALONE = "sinks=0,recent=0"


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
    state = filled(text, k, v)
    part, logits = state.read(q), q @ k.transpose(1, 2)
    torch.testing.assert_close(part.mean, torch.softmax(logits, -1) @ v)
    torch.testing.assert_close(part.log_mass, torch.logsumexp(logits, -1))


@pytest.mark.parametrize("budget", [28, 64, 100])
def test_a_budget_holds_after_every_token_and_weights_add_up_to_n(draw: Draw, budget: int) -> None:
    state = opened(f"balance@{budget}", rows=2)
    before = state.nbytes
    for n in range(1, 200):
        state.append(draw(2, 1, 4), draw(2, 1, 4))
        assert int(state.held.max()) <= budget
        coins = budget == 28  # levels of one token each: there the weights are right on average only
        assert coins or all(sum(2**level for level in levels(state, row).values()) == n for row in range(2))
    assert state.nbytes == before
    held = levels(state, 1)
    assert all(held[position] == 0 for position in (*range(4), *range(183, 199)))


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


def test_the_signs_of_a_stream_are_those_of_the_literal_walk_with_its_draws(draw: Draw) -> None:
    """One level of one row from the state itself: draws keyed by (seed, row id, position, level)."""
    k, v = draw(1, 16, 3), draw(1, 16, 2)
    state = filled(f"balance(batch=16,centre=False,constant=1.0,sharpness=1.0,{ALONE})", k, v, seed=5, row_ids=[9])
    draws = uniform(row_keys(5, torch.tensor([9]), "balance"), torch.arange(0, 16, 2) * 64)
    signs = literal_walk(k[0], v[0], draws.tolist(), 1.0, 0.125, pairs=True)
    assert levels(state, 0) == {2 * i + (sign < 0): 1 for i, sign in enumerate(signs)}


# ---- what it promises --------------------------------------------------------------------------------------------


def z_scores(text: str, draw: Draw, seeds: int = 400, n: int = 48) -> Tensor:
    """(numerator estimates - numerator) in standard errors, over row ids: (m, dv), for one stream and 4 queries."""
    d = 3
    k, v, q = draw(n, d) * 0.7, draw(n, 2), draw(4, d) * 0.7
    state = many(text, k, v, seeds)
    part = state.read(q.expand(seeds, -1, -1))
    estimate = part.mean * part.log_mass.exp().unsqueeze(-1)
    error = estimate - torch.exp(q @ k.T) @ v
    return error.mean(0) / (error.std(0) / math.sqrt(seeds))


@pytest.mark.parametrize("text", [f"balance(batch=16,{ALONE})", f"balance(c=1.0,{ALONE})@24", f"balance({ALONE})@9"])
def test_the_numerator_is_unbiased(draw: Draw, text: str) -> None:
    """8 means of 400 seeds each within 4 standard errors: a fair run fails once in 2,000."""
    assert float(z_scores(text, draw).abs().max()) < 4.0


@pytest.mark.slow
@pytest.mark.parametrize("text", [f"balance(batch=16,{ALONE})", f"balance(c=1.0,{ALONE})@24", f"balance({ALONE})@9"])
def test_the_numerator_is_unbiased_over_ten_thousand_seeds(draw: Draw, text: str) -> None:
    assert float(z_scores(text, draw, 10_000, 96).abs().max()) < 4.0


def test_the_paper_s_smaller_class_loses_mass(draw: Draw) -> None:
    """What the test above would say of it: the smaller class has less than half of the weight on average."""
    v = torch.ones(16, 2, dtype=torch.float64)
    state = many(f"balance(batch=16,keep=smaller,c=9.0,{ALONE})", draw(16, 3), v, 400)
    mass = state.read(torch.zeros(400, 1, 3, dtype=torch.float64)).log_mass.exp()
    assert float(mass.max()) <= 16.0 + 1e-9 and float(mass.mean()) < 15.5


def relative_errors(text: str, k: Tensor, v: Tensor, q: Tensor, seeds: int) -> Tensor:
    """Root mean square error over the queries (m, d), relative to the answers': (seeds,)."""
    scale = k.shape[1] ** -0.5
    state = many(text, k, v, seeds, scale=scale)
    truth = torch.softmax(scale * q @ k.T, -1) @ v
    return ((state.read(q.expand(seeds, -1, -1)).mean - truth).norm(dim=(1, 2))) / truth.norm()


@pytest.mark.parametrize("text", [f"balance(batch=128,{ALONE})", f"balance({ALONE})@64"])
def test_errors_are_below_those_of_uniform_samples_of_equal_size(draw: Draw, text: str) -> None:
    """256 Gaussian keys with |k|^2 scale near 1: in most of 64 seeds closer than 64 tokens drawn at random."""
    d, seeds = 16, 64
    k, v, q = draw(256, d) * 0.5, draw(256, d), draw(8, d)
    mine, theirs = (relative_errors(x, k, v, q, seeds) for x in (text, "random@64"))
    closer = int((mine < theirs).sum())
    assert closer >= 44  # a fair coin gives so many once in 500 times
    assert float(mine.median()) < (0.6 if "128" in text else 0.95) * float(theirs.median())


def test_huge_keys_and_values_stay_finite(draw: Draw) -> None:
    state = filled("balance@32", (1e18 * draw(1, 200, 4)).float(), (1e36 * draw(1, 200, 4)).float())
    assert bool(torch.isfinite(state.read(1e-18 * torch.ones(1, 2, 4)).mean).all())


STATED = "c=None,centre=False,sharpness=1.0,constant=1.0,radius=0.5,spread=4.0,horizon=2000,failure=0.3"


def short_stream(draw: Draw, n: int, rows: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and queries on a sphere of radius 0.45, values with entries of +-1."""
    k, q, v = draw(rows, n, 4), draw(rows, 1, 4), draw(rows, n, 4)
    return 0.45 * q / q.norm(dim=-1, keepdim=True), 0.45 * k / k.norm(dim=-1, keepdim=True), v.sign()


def misses(draw: Draw, seeds: int) -> tuple[int, float]:
    """Of so many seeds on one stream: how many err by more than they state; and the largest error as a share of it."""
    n = 400
    q, k, v = short_stream(draw, n)
    state = many(f"balance(batch=128,{STATED})", k, v, seeds)
    assert int(state.held.max()) < n
    stated = state.guarantee()
    assert stated is not None and stated.holds, stated
    weights = torch.softmax(q[0] @ k[0].T, -1)
    error = (state.read(q.expand(seeds, -1, -1)).mean - weights @ v[0]).norm(dim=-1).flatten()
    allowed = stated.epsilon * float(weights.norm()) * float(v[0].norm())
    return int((error > allowed).sum()), float(error.max()) / allowed


def test_the_guarantee_holds_and_is_kept_by_100_seeds(draw: Draw) -> None:
    failed, share = misses(draw, 100)
    assert clopper_pearson_limit(failed, 100, 1e-4) <= 0.3
    assert share > 0.01  # the bound is not so wide that any answer would pass


@pytest.mark.slow
def test_the_guarantee_is_kept_by_ten_thousand_seeds(draw: Draw) -> None:
    assert clopper_pearson_limit(sum(misses(draw, 500)[0] for _ in range(20)), 10_000, 1e-4) <= 0.3


@pytest.mark.parametrize("sharpness", [0.25, 1.0])
@pytest.mark.parametrize("centre", [True, False])
def test_the_stated_epsilon_falls_with_the_batch_and_is_inverted(sharpness: float, centre: bool) -> None:
    spec = Spec(1, 8, 8)
    text = f"balance(c=None,centre={centre},sharpness={sharpness},radius=0.3,spread=2.0,horizon=1000000)"
    method = parse(text).budget_for(0.5, 0.05, spec)
    stated, smaller = method.guarantee(spec), parse(text).guarantee(spec)
    assert stated is not None and stated.holds and 0.49 < stated.epsilon <= 0.5 and stated.delta == 0.05
    assert smaller is not None and smaller.epsilon > 0.5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("key", "beyond the radius"),
        ("pending key", "beyond the radius"),
        ("query", "beyond the radius"),
        ("value", "times the mean"),
        ("length", "horizon"),
        ("clamp", "clamped"),
    ],
)
def test_the_guarantee_is_withdrawn_where_an_assumption_fails(draw: Draw, change: str, said: str) -> None:
    q, k, v = short_stream(draw, 2100)
    state = opened(f"balance(batch=128,{STATED})")
    n = 2100 if change == "length" else 700
    if change == "key":
        k[0, 3] *= 2.0
    if change == "pending key":
        k[0, 699] *= 2.0
    if change == "value":
        v[0, 3] *= 9.0
    state.append(k[:, :n], v[:, :n])
    if change == "query":
        state.attend(2.0 * q.unsqueeze(1))
    if change == "clamp":
        state.clamped += 1
    stated, again = state.guarantee(), state.method.from_bytes(state.to_bytes()).guarantee()
    assert stated is not None and not stated.holds and said in stated.why
    assert again == stated


def test_clamped_steps_are_counted(draw: Draw) -> None:
    """Equal tokens but for alternating values: every difference is the same, and a greedy walk must clamp."""
    k, v = torch.zeros(1, 64, 4, dtype=torch.float64), torch.ones(1, 64, 4, dtype=torch.float64)
    v[:, ::2] = -1.0
    greedy, fair = (opened(f"balance(batch=64,c={c},{ALONE})") for c in (0.125, 1000.0))
    greedy.append(k, v)
    fair.append(k, v)
    assert int(greedy.clamped) > 10 and int(fair.clamped) == 0


@pytest.mark.parametrize("change", ["c=5.0", "keep=smaller", "budget", "softcap", "no radius"])
def test_there_is_no_guarantee_where_none_is_derived(change: str) -> None:
    text = f"balance(batch=512,{STATED.replace('c=None', 'c=5.0') if change == 'c=5.0' else STATED})"
    text = text.replace("radius=0.5,", "") if change == "no radius" else text
    text = text.replace(",c=None", ",keep=smaller,c=None") if change == "keep=smaller" else text
    text += "@64" if change == "budget" else ""
    stated = parse(text).guarantee(Spec(1, 4, 4, softcap=5.0 if change == "softcap" else None))
    assert (stated is not None and not stated.holds and "safe" in stated.why) if change == "c=5.0" else stated is None


# ---- mutants: one wrong line each, which the tests above must reject -----------------------------------------------


def _coin(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(self_balancing, "walk", lambda x, draws, c, even: walk(0.0 * x, draws, c, even))


def _always_the_first(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(self_balancing, "walk", lambda x, draws, c, even: walk(0.0 * x, 0.0 * draws, c, even))


def _the_paper_s_pull(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(self_balancing, "walk", lambda x, draws, c, even: walk(x, draws, c, False))


def _clamping_unseen(patch: pytest.MonkeyPatch) -> None:
    def unseen(*given: Any, even: bool) -> tuple[Tensor, Tensor]:
        signs, clamped = walk(*given, even=even)
        return signs, 0 * clamped

    patch.setattr(self_balancing, "walk", unseen)


def _blind_to_keys(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(balance_module, "gram", lambda k, *rest: gram(0.0 * k, *rest))


def _survivors_weigh_one(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Slots, "put_column", lambda *given: None)


def _halved_too_late(patch: pytest.MonkeyPatch) -> None:
    due = BalanceState._due

    def late(state: BalanceState, rows: Tensor) -> Any:
        level, size, members = due(state, rows)
        return level, size.masked_fill(state.slots.held[rows] < 64, 0), members

    patch.setattr(BalanceState, "_due", late)


def _nothing_measured(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BalanceState, "_measure", lambda *given: None)


MUTANTS: tuple[tuple[Callable[[pytest.MonkeyPatch], None], Callable[[Draw], None]], ...] = (
    (_coin, lambda draw: test_signs_are_those_of_the_literal_walk(draw, "smaller", 0.125)),
    (_the_paper_s_pull, lambda draw: test_signs_are_those_of_the_literal_walk(draw, "pairs", 1.0)),
    (_blind_to_keys, test_the_signs_of_a_stream_are_those_of_the_literal_walk_with_its_draws),
    (_survivors_weigh_one, lambda draw: test_a_budget_holds_after_every_token_and_weights_add_up_to_n(draw, 64)),
    (_halved_too_late, lambda draw: test_a_budget_holds_after_every_token_and_weights_add_up_to_n(draw, 64)),
    (_always_the_first, lambda draw: test_the_numerator_is_unbiased(draw, f"balance(c=1.0,{ALONE})@24")),
    (_coin, lambda draw: test_errors_are_below_those_of_uniform_samples_of_equal_size(draw, f"balance({ALONE})@64")),
    (_clamping_unseen, test_clamped_steps_are_counted),
    (_nothing_measured, lambda draw: test_the_guarantee_is_withdrawn_where_an_assumption_fails(draw, "key", "radius")),
)


@pytest.mark.parametrize(("mutant", "check"), MUTANTS)
def test_every_check_rejects_its_mutant(
    draw: Draw, monkeypatch: pytest.MonkeyPatch, mutant: Callable[[pytest.MonkeyPatch], None], check: Any
) -> None:
    with monkeypatch.context() as patch:
        mutant(patch)
        with pytest.raises(AssertionError):
            check(draw)
