"""`tiered` with a delta above 0 certifies by chance what it says it does, and is a state like any other."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kvfloor import Spec, parse
from kvfloor.methods.tiered import kernel
from kvfloor.methods.tiered.cold import ExactSlots
from kvfloor.methods.tiered.fetch import CertifiedReader
from kvfloor.methods.tiered.tiered import OBLIVIOUS, Tiered, TieredState
from tests.certify.test_trials import truth
from tests.support import seeded

ROWS, N, D, DV, M = 3, 150, 16, 12, 10


def given(method: str, dtype: torch.dtype = torch.float64, **spec: Any) -> tuple[TieredState, Tensor, Tensor, Tensor]:
    """Return a state that has read a stream, queries, and its keys and values."""
    draw = seeded(20)
    k, v, q = (draw(ROWS, n, w).to(dtype) for n, w in ((N, D), (N, DV), (M, D)))
    state: Any = parse(method).open(Spec(ROWS, D, DV, D**-0.5, dtype=dtype, **spec))
    state.append(k, v)
    return state, q, k, v


SMALL = "tiered(page=16,recent=0,delta=0.001)"


def test_the_text_names_bits_and_delta_and_impossible_ones_are_refused() -> None:
    method = parse("tiered(keys=6,values=5,delta=0.001)")
    assert parse(str(method)) == method == Tiered(keys=6, values=5, delta=0.001)
    assert str(parse("tiered")) == "tiered"
    for wrong, name in (("keys=3", "keys"), ("values=9", "values"), ("delta=-0.1", "delta"), ("delta=0.6", "delta")):
        with pytest.raises(ValueError, match=name):
            parse(f"tiered({wrong})")


def test_the_guarantee_says_when_it_is_statistical_and_for_which_queries() -> None:
    spec = Spec(1, D, DV)
    stated = parse("tiered(epsilon=0.01,delta=0.001)").guarantee(spec)
    assert stated is not None and (stated.epsilon, stated.delta, stated.quantifier) == (0.01, 0.001, OBLIVIOUS)
    assert any("seed" in assumed for assumed in stated.assumptions)
    for text, own in (("tiered", spec), ("tiered(epsilon=0,delta=0.001)", spec)):
        always = parse(text).guarantee(own)
        assert always is not None and always.delta == 0 and always.quantifier == "every query"
    capped = parse(SMALL).guarantee(Spec(1, D, DV, softcap=3.0))
    assert capped is not None and capped.delta == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_both_bounds_hold_and_the_less_is_the_bound(dtype: torch.dtype) -> None:
    state, q, k, v = given(SMALL, dtype)
    found = state.read_certified(q, 1e6)
    error = (found.partial.mean.double() - truth(q, k, v, state.spec)).norm(dim=-1)
    assert found.delta == 0.001 and found.chance is not None
    assert bool((error <= found.chance).all()) and bool((error <= found.certain).all())
    assert torch.equal(found.bound, torch.minimum(found.chance, found.certain))
    assert torch.equal(found.statistical, found.chance < found.certain) and bool(found.statistical.all())
    assert float((found.certain / found.chance).median()) > 2
    assert state.tally.chance == found.bound.numel()


def test_without_a_delta_there_is_no_chance_and_fewer_bits_are_bounded_for_certain() -> None:
    for text in ("tiered(page=16,recent=0)", "tiered(page=16,recent=0,keys=5,values=4)"):
        state, q, k, v = given(text)
        for epsilon in (1e6, 0.01):
            found = state.read_certified(q, epsilon)
            error = (found.partial.mean - truth(q, k, v, state.spec)).norm(dim=-1)
            assert found.chance is None and found.delta == 0 and not bool(found.statistical.any())
            assert bool((error <= found.bound).all())
        assert state.tally.chance == 0
    few, many = (given(f"tiered(page=16,recent=0,keys={b},values={b})")[0].hot for b in (4, 8))
    assert few is not None and many is not None and few.codes.token_bytes < many.codes.token_bytes


def test_fetches_go_on_until_the_less_bound_holds() -> None:
    state, q, k, v = given("tiered(page=16,recent=0,keys=4,values=4,delta=0.001)", torch.float32)
    for epsilon in (0.1, 0.03, 0.001):
        found = state.read_certified(q, epsilon)
        error = (found.partial.mean.double() - truth(q, k, v, state.spec)).norm(dim=-1)
        assert bool((error <= found.bound).all()) and bool(found.within(epsilon).all())
    assert state.tally.tokens > 0
    grouped = state.read_certified(q.unsqueeze(1), 0.03)
    assert grouped.chance is not None and grouped.chance.shape == (ROWS, 1, M)
    assert torch.equal(grouped.bound[:, 0], state.read_certified(q, 0.03).bound)


def test_a_fetch_lessens_the_statistical_bound_although_the_tokens_were_chosen() -> None:
    """One token has nearly all of the error: once it is known, little is left, at the price of choosing it."""
    draw = seeded(3)
    k, v, q = draw(1, 300, 4) * 0.02, draw(1, 300, 4), draw(1, 1, 4)
    k[:, 5] = 40 * q[0, 0] / q.norm()
    state = Tiered(page=300, first=0, recent=0, keys=4, delta=0.001).open(Spec(1, 4, 4, 0.2, dtype=torch.float64))
    state.append(k, v)
    before = state.read_certified(q, 1e6)
    after = state.read_certified(q, float(before.relative.max()) * 0.9)
    assert before.chance is not None and after.chance is not None and state.tally.tokens == 8
    assert float(after.chance) < float(before.chance)


def test_the_answers_do_not_depend_on_batch_chunks_saving_or_copies() -> None:
    state, q, k, v = given("tiered(page=16,recent=0,keys=4,values=4,delta=0.001)", row_ids=(7, 8, 9), seed=3)
    wanted = state.read_certified(q, 0.01)
    assert state.tally.tokens > 0
    cut = state.method.open(state.spec)
    for start in range(0, N, 11):
        cut.append(k[:, start : start + 11], v[:, start : start + 11])
    for other in (cut, state.clone(), state.method.from_bytes(state.to_bytes())):
        found = other.read_certified(q, 0.01)  # type: ignore[attr-defined]
        assert torch.equal(found.partial.mean, wanted.partial.mean) and torch.equal(found.bound, wanted.bound)
    index = torch.tensor([2, 0])
    some = state.clone()
    some.select_rows(index)
    alone = state.method.open(state.spec.select(index))
    alone.append(k[index], v[index])
    for other in (some, alone):
        found = other.read_certified(q[index], 0.01)
        assert torch.equal(found.partial.mean, wanted.partial.mean[index])
        assert found.chance is not None and wanted.chance is not None
        assert torch.equal(found.chance, wanted.chance[index])
    again = state.method.open(Spec(ROWS, D, DV, D**-0.5, dtype=torch.float64, row_ids=(7, 8, 9), seed=4))
    again.append(k, v)
    assert not torch.equal(again.read_certified(q, 1e6).partial.mean, state.read_certified(q, 1e6).partial.mean)


def test_what_is_fetched_does_not_depend_on_tokens_that_a_query_does_not_see() -> None:
    """The price of choosing fetched tokens is counted by those that the query sees, not by those at hand."""
    draw = seeded(23)
    k, v, q = draw(1, 400, 8), draw(1, 400, 4), draw(1, 1, 1, 8)
    found = []
    for n in (96, 400):
        state = Tiered(page=16, recent=0, keys=6, values=6, delta=0.001).open(Spec(1, 8, 4, dtype=torch.float64))
        state.append(k[:, :n], v[:, :n])
        hide = (torch.arange(n) >= 96).view(1, 1, n)
        assert state.hot is not None and isinstance(state.slots, ExactSlots)
        first, _ = CertifiedReader(state.spec, state.hot, state.slots, 1e6, 0.001).read(q, hide, None)
        below = float(first.relative) * 0.95
        answer, fetched = CertifiedReader(state.spec, state.hot, state.slots, below, 0.001).read(q, hide, None)
        assert answer.chance is not None and first.chance is not None
        found.append((float(first.chance), float(answer.chance), int(fetched)))
    assert found[0] == pytest.approx(found[1], rel=1e-6) and found[0][2] >= 8


def test_forgotten_tokens_tied_values_and_cold_tiers_are_served() -> None:
    state, q, k, v = given(SMALL)
    state.forget(torch.arange(ROWS).repeat_interleave(30), torch.arange(30, 60).repeat(ROWS))
    kept = torch.cat((torch.arange(30), torch.arange(60, N)))
    draw = seeded(21)
    tied = Tiered(page=16, recent=0, delta=0.001).open(Spec(ROWS, D, D, dtype=torch.float64, tied=True))
    same = draw(ROWS, N, D)
    tied.append(same, same)
    cold = parse("tiered(page=16,recent=0,delta=0.001,cold=ram)").open(state.spec)
    cold.append(k, v)
    for one, keys, values in ((state, k[:, kept], v[:, kept]), (tied, same, same), (cold, k, v)):
        for epsilon in (1e6, 1e-3):
            found = one.read_certified(q, epsilon)  # type: ignore[attr-defined]
            error = (found.partial.mean - truth(q, keys, values, one.spec)).norm(dim=-1)
            assert found.chance is not None and bool((error <= found.bound).all())


def test_a_softcap_leaves_the_bound_that_always_holds() -> None:
    state, q, k, v = given(SMALL, softcap=2.0)
    found = state.read_certified(q, 1e6)
    assert found.chance is None and found.delta == 0
    assert bool(((found.partial.mean - truth(q, k, v, state.spec)).norm(dim=-1) <= found.bound).all())


def test_merged_results_keep_the_bounds_that_always_hold() -> None:
    state, q, _, _ = given(SMALL)
    found = state.read_certified(q, 1e6)
    both = found.merge(found)
    assert both.chance is None and both.delta == 0 and math.isfinite(float(both.bound.max()))


def test_no_kernel_serves_dithered_codes() -> None:
    state, _, _, _ = given(SMALL, torch.float32)
    assert state.hot is not None and not kernel.serves(state.hot)


def test_padding_is_no_statistical_answer() -> None:
    draw = seeded(22)
    state = parse(SMALL).open(Spec(2, D, DV, dtype=torch.float32))
    present = torch.ones(2, 100, dtype=torch.bool)
    present[1, 40:] = False
    q, k, v = (draw(2, *shape).float() for shape in ((1, 100, D), (100, D), (100, DV)))
    state.step(q, k, v, present)
    assert isinstance(state, TieredState) and 0 < state.tally.chance <= int(present.sum())
