"""Certified reads: no answer errs more than its bound, whatever the keys, and every term of the bound is needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kvfloor import CorruptState, Spec, parse
from kvfloor.core import message
from kvfloor.methods.tiered.tally import Tally
from kvfloor.methods.tiered.tiered import Tiered, TieredState
from tests.support import Draw, opened, seeded

ROWS, N, D, DV, M = 2, 150, 16, 12, 24
Keys = Callable[[Draw], Tensor]


def one_hot(draw: Draw) -> Tensor:
    return torch.eye(D, dtype=torch.float64)[torch.arange(N) % D].expand(ROWS, -1, -1) * 6.0


def outlier_channel(draw: Draw) -> Tensor:
    k = draw(ROWS, N, D)
    k[..., 3] = 3e3 + 40 * k[..., 3]
    return k


def dead_channels(draw: Draw) -> Tensor:
    k = draw(ROWS, N, D) * 2
    k[..., ::2] = 0.7
    return k


def near_ties(draw: Draw) -> Tensor:
    return draw(ROWS, 1, D) * 3 + 1e-4 * draw(ROWS, N, D)


def wild(draw: Draw) -> Tensor:
    return draw(ROWS, N, D) * torch.linspace(-6, 3, N, dtype=torch.float64).exp().view(1, N, 1)


KEYS: dict[str, Keys] = {
    "normal": lambda draw: draw(ROWS, N, D),
    "peaked": lambda draw: draw(ROWS, N, D) * 5,
    "one-hot": one_hot,
    "an outlier channel": outlier_channel,
    "equal keys": lambda draw: draw(ROWS, 1, D).expand(-1, N, -1) * 4,
    "dead channels": dead_channels,
    "near ties": near_ties,
    "all sizes": wild,
    "zeros": lambda draw: torch.zeros(ROWS, N, D, dtype=torch.float64),
}


def truth(q: Tensor, k: Tensor, v: Tensor, spec: Spec) -> Tensor:
    """Return attention of q (rows, m, d) over k and v in float64, of the numbers as they were given."""
    logits = q.double() @ k.double().transpose(1, 2) * spec.scale
    if spec.softcap is not None:
        logits = spec.softcap * torch.tanh(logits / spec.softcap)
    return torch.softmax(logits, -1) @ v.double()


def given(keys: Keys, dtype: torch.dtype, seed: int = 0, **how: Any) -> tuple[Any, Tensor, Tensor, Tensor]:
    """Return (state, q, k, v): a state with these tokens appended, and queries."""
    draw = seeded(seed)
    k, v, q = keys(draw).to(dtype), draw(ROWS, N, DV, dtype=dtype), draw(ROWS, M, D, dtype=dtype) * 2
    state = opened("tiered(page=16,recent=0)", ROWS, D, DV, dtype=dtype, scale=D**-0.5, **how)
    state.append(k, v)
    return state, q, k, v


def violations(state: TieredState, q: Tensor, k: Tensor, v: Tensor, *epsilons: float) -> int:
    """Return how many answers err more than their bound; fail where a bound is large and not all was read."""
    exact, wrong = truth(q, k, v, state.spec), 0
    for epsilon in epsilons:
        state.tally = Tally()
        found = state.read_certified(q, epsilon)
        error = (found.partial.mean.double() - exact).norm(dim=-1)
        own = 1e-13 * float(v.double().norm(dim=-1).max())  # of the test's own arithmetic
        wrong += int((error > found.bound + (own if state.spec.dtype == torch.float64 else 0)).sum())
    return wrong


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", KEYS)
def test_no_answer_errs_more_than_its_bound(name: str, dtype: torch.dtype) -> None:
    for softcap in (None, 4.0):
        state, q, k, v = given(KEYS[name], dtype, softcap=softcap)
        assert violations(state, q, k, v, 1e6, 0.1, 0.01, 1e-4, 1e-9, 0.0) == 0
        for epsilon in (0.1, 0.01):
            found = state.read_certified(q, epsilon)
            assert bool((found.relative <= epsilon).all()) or name in ("an outlier channel", "all sizes")


def test_epsilon_zero_reads_what_exact_reads_to_the_bit() -> None:
    draw = seeded(5)
    for dtype in (torch.float32, torch.bfloat16):
        k, v = draw(ROWS, 600, D, dtype=dtype), draw(ROWS, 600, D, dtype=dtype)
        q = draw(ROWS, 3, 600, D, dtype=dtype)
        spec = Spec(ROWS, D, D, D**-0.5, dtype=dtype)
        exact = parse("exact").open(spec)
        zero, some = (Tiered(**how).open(spec) for how in ({"epsilon": 0}, {"page": 16, "recent": 0}))
        for cut in (slice(0, 500), slice(500, 501), slice(501, 600)):
            tokens = q[:, :, cut], k[:, cut], v[:, cut]
            assert torch.equal(exact.step(*tokens), zero.step(*tokens))
            some.append(*tokens[1:])
        asked = q[:, 0, :40]
        for state in (zero, some):
            found, wanted = state.read_certified(asked, 0), exact.read(asked)
            assert torch.equal(found.partial.mean, wanted.mean) and torch.equal(found.partial.log_mass, wanted.log_mass)
        assert zero.hot is None and zero.nbytes == exact.nbytes


def test_a_step_answers_within_epsilon() -> None:
    draw, g = seeded(6), 3
    k, v, q = draw(ROWS, 200, D) * 3, draw(ROWS, 200, DV), draw(ROWS, g, 200, D) * 3
    for epsilon in (0.3, 0.003):
        state = opened(f"tiered(epsilon={epsilon},page=16,recent=0)", ROWS, D, DV, scale=D**-0.5)
        out = torch.cat([state.step(q[:, :, a:b], k[:, a:b], v[:, a:b]) for a, b in ((0, 150), (150, 200))], 2)
        logits = q @ k.transpose(1, 2).unsqueeze(1) * D**-0.5
        later = torch.ones(200, 200, dtype=torch.bool).triu(1)
        exact = torch.softmax(logits.masked_fill(later, -torch.inf), -1) @ v.unsqueeze(1)
        largest = v.norm(dim=-1).cummax(1).values.unsqueeze(1)  # of the values that a query sees
        error = (out - exact).norm(dim=-1) / largest
        assert 0 < float(error.max()) <= epsilon
        assert state.tally.queries == ROWS * 200 and (state.tally.tokens > 0) == (epsilon < 0.1)


def test_a_group_shares_what_it_fetches_and_the_tally_counts_it() -> None:
    state, q, k, v = given(KEYS["peaked"], torch.float64)
    grouped = q.unflatten(1, (4, -1))
    state.tally = Tally()
    alone = state.read_certified(q, 0.002)
    single = state.tally
    state.tally = Tally()
    together = state.read_certified(grouped, 0.002)
    assert alone.bound.shape == (ROWS, M) and together.bound.shape == (ROWS, 4, M // 4)
    assert single.queries == ROWS * M and state.tally.queries == ROWS * M // 4
    assert single.tokens / 4 <= state.tally.tokens <= single.tokens
    assert state.tally.bytes == state.tally.tokens * (D + DV) * 8 and state.tally.tokens > 0
    state.tally = Tally()
    state.read_certified(q, 1e6)
    assert state.tally == Tally(ROWS * M, ROWS * M, 0, 0, largest=state.tally.largest)
    state.tally = Tally()
    state.read_certified(q, 0)
    assert state.tally.tokens == ROWS * M * N and state.tally.unfetched == 0
    error = (together.partial.mean - truth(q, k, v, state.spec).unflatten(1, (4, -1))).norm(dim=-1)
    assert bool((error <= together.bound).all()) and bool(together.within(0.002).all())


def test_a_state_that_forgot_tokens_still_bounds_its_error() -> None:
    state, q, k, v = given(KEYS["peaked"], torch.float64)
    gone = torch.arange(0, N, 3)
    state.forget(torch.zeros_like(gone), gone)
    stays = torch.ones(N, dtype=torch.bool)
    stays[gone] = False
    for epsilon in (1e6, 0.01, 1e-9):
        found = state.read_certified(q, epsilon)
        for row, kept in ((0, stays), (1, torch.ones_like(stays))):
            here = slice(row, row + 1)
            exact = truth(q[here], k[here, kept], v[here, kept], state.spec)
            assert bool(((found.partial.mean[here] - exact).norm(dim=-1) <= found.bound[here] + 1e-13).all())


def test_values_that_are_the_keys_are_bounded_too() -> None:
    draw = seeded(8)
    k, q = draw(ROWS, N, D) * 2, draw(ROWS, M, D)
    state = Tiered(page=16, recent=0).open(Spec(ROWS, D, D, dtype=torch.float64, tied=True))
    state.append(k, k)
    assert violations(state, q, k, k, 1e6, 0.01, 1e-6) == 0


def test_a_saved_state_holds_both_tiers_and_refuses_two_that_differ() -> None:
    state, q, _, _ = given(KEYS["peaked"], torch.float32)
    method = state.method
    again = method.from_bytes(state.to_bytes())
    for epsilon in (1e6, 0.01, 0):
        mine, theirs = state.read_certified(q, epsilon), again.read_certified(q, epsilon)
        assert torch.equal(mine.partial.mean, theirs.partial.mean) and torch.equal(mine.bound, theirs.bound)
    header, fields = message.unpack(state.to_bytes())
    fields["hot"]["codes"]["position"] = fields["hot"]["codes"]["position"].flip(0)
    with pytest.raises(CorruptState, match="positions"):
        method.from_bytes(message.pack(header, fields))
    header, fields = message.unpack(state.to_bytes())
    fields["hot"]["operator"] = -fields["hot"]["operator"] - 1
    with pytest.raises(CorruptState, match="operator"):
        method.from_bytes(message.pack(header, fields))


@pytest.mark.parametrize("epsilon", [-0.1, float("nan"), float("inf"), "much", None])
def test_an_epsilon_that_bounds_nothing_is_refused(epsilon: Any) -> None:
    state, q, _, _ = given(KEYS["normal"], torch.float32)
    before = state.to_bytes()
    if epsilon is not None:
        with pytest.raises(ValueError, match="epsilon"):
            state.read_certified(q, epsilon)
        assert state.to_bytes() == before
    with pytest.raises(ValueError, match="epsilon"):
        type(state.method)(epsilon=epsilon)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["k", "v"])
def test_numbers_whose_squares_have_no_finite_sum_are_refused(name: str, dtype: torch.dtype) -> None:
    state, q, k, v = given(KEYS["normal"], dtype)
    before = state.to_bytes()
    huge = {"k": k, "v": v} | {name: (k if name == "k" else v) * 1e30}
    with pytest.raises(ValueError, match=f"^{name} has a number of size .*at most 1.13e"):
        state.append(huge["k"], huge["v"])
    with pytest.raises(ValueError, match=f"^{name} has a number of size"):
        state.step(q.unsqueeze(1)[:, :, :1], huge["k"][:, :1], huge["v"][:, :1])
    assert state.to_bytes() == before
    zero = opened("tiered(epsilon=0)", ROWS, D, DV, dtype=dtype)
    zero.append(huge["k"], huge["v"])  # nothing is squared


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_largest_numbers_that_are_taken_are_coded_soundly(dtype: torch.dtype) -> None:
    draw = seeded(4)
    large = min(2.0**50, torch.finfo(dtype).max)
    k, v, q = (draw(ROWS, n, D).clamp(-1, 1) for n in (N, N, M))
    k, v, q = (k * large).to(dtype), (v * large).to(dtype), (q / large).to(dtype)
    state = opened("tiered(page=16,recent=0)", ROWS, D, D, dtype=dtype)
    state.append(k, v)
    assert violations(state, q, k, v, 1e6, 0.02, 1e-6) == 0
    again = state.method.from_bytes(state.to_bytes())
    assert torch.equal(again.read_certified(q, 0.02).bound, state.read_certified(q, 0.02).bound)


def test_queries_whose_logits_overflow_get_no_finite_bound() -> None:
    state, q, _, _ = given(KEYS["peaked"], torch.float32)
    for epsilon in (1e6, 0.01):
        found = state.read_certified(q * (1e38 / q.abs().max()), epsilon)
        assert not bool(found.bound.isnan().any())
        answered = found.partial.mean.isfinite().all(-1)
        assert bool((answered | found.bound.isinf()).all())


def test_the_newest_tokens_have_no_codes_until_as_many_newer_ones_came() -> None:
    draw = seeded(12)
    k, v, q = (draw(ROWS, n, D) for n in (N, N, M))
    state, cut = opened("tiered(page=16,recent=40)", ROWS, D, D), opened("tiered(page=16,recent=40)", ROWS, D, D)
    none = opened("tiered(page=16,recent=1000)", ROWS, D, D)
    for start in range(0, N, 7):
        cut.append(k[:, start : start + 7], v[:, start : start + 7])
    for one in (state, none):
        one.append(k, v)
    assert state.hot.codes.coded.tolist() == [N // 16 * 16 - 48] * ROWS  # 40 tokens are three pages
    position = torch.arange(N).expand(ROWS, -1)
    uncoded = ~state.hot.codes.has_code(position, None)
    assert torch.equal(uncoded, (position < 4) | (position >= N // 16 * 16 - 48))
    slots = state.hot.codes
    for name, given in (("k", k), ("v", v)):
        read = slots.numbers(name, None, N)
        assert torch.equal(read[uncoded], given[uncoded]) and not torch.equal(read, given)
    mine, theirs = state.read_certified(q, 1e6), cut.read_certified(q, 1e6)
    assert torch.equal(mine.partial.mean, theirs.partial.mean) and torch.equal(mine.bound, theirs.bound)
    exact = none.read_certified(q, 1e6)
    assert float(exact.bound.max()) < 1e-11 < float(mine.bound.max())
    again = state.method.from_bytes(state.to_bytes())
    again.append(k, v)
    state.append(k, v)
    assert torch.equal(again.read_certified(q, 1e6).bound, state.read_certified(q, 1e6).bound)
    assert none.bytes_read > state.bytes_read


@pytest.mark.parametrize("option", ["recent=-1", "extra=9", "extra=-1", "page=0"])
def test_impossible_options_are_named(option: str) -> None:
    with pytest.raises(ValueError, match=option.split("=")[0]):
        parse(f"tiered({option})")


def test_a_long_stream_stays_within_its_bounds() -> None:
    draw = seeded(9)
    k, v, q = (draw(1, n, 32, dtype=torch.float32) for n in (5000, 5000, 16))
    state = Tiered().open(Spec(1, 32, 32, 32**-0.5))
    state.append(k * 3, v)
    assert violations(state, q * 3, k * 3, v, 1e6, 0.02, 0.002) == 0
