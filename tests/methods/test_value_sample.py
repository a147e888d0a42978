"""Sampled values of the unmasked window: the reservoir's law, unbiased answers, their variance, the guarantee."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from kvfloor import parse
from kvfloor.core.randomness import row_keys, uniform
from kvfloor.methods.sketches.window_sample import WindowSampleState
from kvfloor.methods.summaries import value_sample
from kvfloor.methods.summaries.value_sample import ValueSample, ValueSampleState, middle, sizes_for
from kvfloor.statistics import clopper_pearson_limit
from tests import support
from tests.support import Draw, filled, many, require_drawn, require_mean

ROWS = 3000


opened = partial(support.opened, d=3, dv=2)


def sample_of(state) -> ValueSampleState:
    return state.outside if isinstance(state, WindowSampleState) else state.summary


def unmasked(q: Tensor, k: Tensor, v: Tensor, inside: Tensor) -> Tensor:
    weight = torch.where(inside, torch.exp(k @ q), 1.0)
    return (weight.unsqueeze(1) * v).sum(0) / weight.sum()


# ---- the reservoir ----------------------------------------------------------------------------------------------


def assert_smallest_keys_win(state, v: Tensor, gone: list[list[int]], samples: int) -> None:
    """Slot i of a row keeps the value of smallest uniform(seed, row id, position, i), found here one by one."""
    spec, kept = state.spec, sample_of(state)
    keys = row_keys(spec.seed, spec.ids(), "value sample")
    for row, positions in enumerate(gone):
        assert int(kept.count[row]) == len(positions)
        for i in range(samples):
            draws = [float(uniform(keys[row], torch.tensor(p * samples + i))) for p in positions]
            assert torch.equal(kept.value[row, i], v[row, positions[draws.index(min(draws))]])


@pytest.mark.parametrize("head", ["window(block=1)", "window(block=8)", "random(block=4)"])
def test_every_slot_keeps_the_value_of_smallest_key(draw: Draw, head: str) -> None:
    k, v = draw(2, 40, 3), draw(2, 40, 2)
    state = filled(f"{head}+value_sample(copies=3,groups=3)@8", k, v, row_ids=[5, 9], seed=3)
    held = [set(state.slots.view().position[row].tolist()) for row in range(2)]
    gone = [[i for i in range(40) if i not in held[row]] for row in range(2)]
    assert_smallest_keys_win(state, v, gone, 9)


def test_the_samples_do_not_depend_on_block_or_cuts(draw: Draw) -> None:
    k, v = draw(2, 72, 3), draw(2, 72, 2)
    states = []
    for block, cuts in ((1, [0, 72]), (8, [0, 1, 30, 31, 72]), (24, [0, 71, 72])):
        state = opened(f"window(block={block})+value_sample(copies=5)@24", rows=2)
        for start, stop in pairwise(cuts):
            state.append(k[:, start:stop], v[:, start:stop])
        states.append(sample_of(state))
    for other in states[1:]:
        assert torch.equal(states[0].value, other.value) and torch.equal(states[0].key, other.key)


def assert_uniform_and_independent(state, n: int) -> None:
    """Samples whose values are token numbers: each slot uniform over n tokens, two slots independent."""
    picked = sample_of(state).value[:, :, 0].round().long()
    require_drawn(picked, n)
    require_drawn(picked[:, 0] * n + picked[:, 1], n * n)


def numbered(text: str):
    v = torch.arange(20, dtype=torch.float64).unsqueeze(1)
    return many(text, torch.zeros(20, 1, dtype=torch.float64), v, ROWS)


def test_samples_are_uniform_over_what_left_and_independent() -> None:
    assert_uniform_and_independent(numbered("window(block=4)+value_sample(copies=2)@8"), 12)


@pytest.mark.parametrize("wrong", ["one key for all slots", "late tokens favoured"])
def test_a_wrong_reservoir_is_told(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    def same(keys: Tensor, counters: Tensor) -> Tensor:
        return uniform(keys, counters - counters % 2)

    def late(keys: Tensor, counters: Tensor) -> Tensor:
        return uniform(keys, counters) * 0.9 ** (counters / 2)

    monkeypatch.setattr(value_sample, "uniform", same if wrong.startswith("one") else late)
    with pytest.raises(AssertionError):
        assert_uniform_and_independent(numbered("window(block=4)+value_sample(copies=2)@8"), 12)


# ---- answers ----------------------------------------------------------------------------------------------------


def answered(draw: Draw, text: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Answers (rows, dv) of many rows to one query after 32 tokens, 8 of them held; q, k, v >= 0."""
    k, v, q = draw(32, 3), draw(32, 2).abs(), draw(1, 1, 3)
    return many(text, k, v, ROWS).read(q.expand(ROWS, -1, -1)).mean[:, 0], q[0, 0], k, v


SAMPLED = ("window(block=1)+value_sample@8", "window(block=8)+value_sample(copies=4)@8")
LITERAL = ("window_sample@8", "window_sample(copies=4)@8")


@pytest.mark.parametrize("text", SAMPLED + LITERAL)
def test_answers_are_unbiased_with_the_bounded_variance_of_theorem_23(draw: Draw, text: str) -> None:
    answers, q, k, v = answered(draw, text)
    wanted = unmasked(q, k, v, torch.arange(32) >= 24)
    require_mean(answers, wanted)
    copies = 4 if "copies" in text else 1
    assert bool((answers.var(0) <= v.max() * wanted / copies).all())


@pytest.mark.parametrize("text", SAMPLED)
def test_the_variance_comes_from_the_outside_alone(draw: Draw, text: str) -> None:
    """Var = (c/S)^2 Var_U(V) / T per coordinate, the Rao-Blackwell form."""
    answers, q, k, v = answered(draw, text)
    inside = torch.exp(k[24:] @ q).sum()
    share = 24 / (24 + inside)
    wanted = share**2 * v[:24].var(0, correction=0) / (4 if "copies" in text else 1)
    require_mean((answers - unmasked(q, k, v, torch.arange(32) >= 24)).square(), wanted)


@pytest.mark.parametrize("text", LITERAL)
def test_the_literal_form_draws_tokens_by_their_weight(draw: Draw, text: str) -> None:
    """One draw's second moment is sum of weight v^2: more variance than the Rao-Blackwell form has."""
    answers, q, k, v = answered(draw, text)
    weight = torch.where(torch.arange(32) >= 24, torch.exp(k @ q), 1.0)
    weight = weight / weight.sum()
    variance = weight @ v.square() - (weight @ v).square()
    require_mean((answers - weight @ v).square(), variance / (4 if "copies" in text else 1))


def test_the_literal_form_answers_with_a_value_that_was_given(draw: Draw) -> None:
    k, v, q = draw(1, 40, 3), draw(1, 40, 2), draw(1, 5, 3)
    state = filled("window_sample@8", k, v)
    for answer in state.read(q).mean[0]:
        assert float((v[0] - answer).abs().sum(1).min()) == 0.0


def test_the_literal_form_is_exact_until_a_token_leaves(draw: Draw) -> None:
    k, v, q = draw(1, 8, 3), draw(1, 8, 2), draw(1, 1, 8, 3)
    out = opened("window_sample@8").step(q, k, v)
    for i in range(8):
        wanted = torch.softmax(k[0, : i + 1] @ q[0, 0, i], 0) @ v[0, : i + 1]
        assert float((out[0, 0, i] - wanted).abs().max()) <= 1e-12


def test_a_query_draws_the_same_alone_and_in_company_and_afresh_once_a_token_came(draw: Draw) -> None:
    k, v, q = draw(1, 60, 3), draw(1, 60, 2), draw(1, 50, 3)
    state = filled("window_sample@8", k[:, :59], v[:, :59])
    together = state.read(q).mean
    alone = torch.cat([state.read(q[:, i : i + 1]).mean for i in range(50)], 1)
    assert torch.equal(together, alone)
    state.append(k[:, 59:], v[:, 59:])
    assert int((state.read(q).mean != together).any(-1).sum()) > 5


def test_a_uniform_draw_from_the_window_is_told(monkeypatch: pytest.MonkeyPatch, draw: Draw) -> None:
    from kvfloor.methods.sketches import window_sample

    right = window_sample.weigh

    def flat(*args, **kwargs):
        mean, log_mass, weights = right(*args, **kwargs)
        return mean, log_mass, torch.ones_like(weights) / weights.shape[-1]

    monkeypatch.setattr(window_sample, "weigh", flat)
    answers, q, k, v = answered(draw, "window_sample@8")
    with pytest.raises(AssertionError):
        require_mean(answers, unmasked(q, k, v, torch.arange(32) >= 24))


def test_the_middle_is_the_median_of_the_groups_means(draw: Draw) -> None:
    draws = draw(3, 15, 2)
    wanted = torch.stack([draws[:, 3 * j : 3 * j + 3].mean(1) for j in range(5)], 1).sort(1).values[:, 2]
    torch.testing.assert_close(middle(draws, 3, 5), wanted, rtol=1e-15, atol=0)


# ---- the guarantee ----------------------------------------------------------------------------------------------

STREAM = {"n": 40, "window": 8, "low": 1.0, "high": 3.0}
RAO_BLACKWELL = "window(block=1)+value_sample(epsilon=0.6,delta=0.2,spread=3.0,horizon=32)@8"
PAPER = "window_sample(copies=67,groups=15,spread=3.0,horizon=40)@8"


def failures(text: str, rows: int, draw: Draw) -> tuple[int, float, float]:
    """Rows of which any coordinate of any answer misses by more than epsilon times itself; and epsilon, delta.

    One fixed stream of two-point values, the worst there are for their range, and a query with every token.
    """
    n, window = STREAM["n"], STREAM["window"]
    k, q = draw(n, 3), draw(n, 3)
    v = torch.where(draw(n, 1) > 1.0, STREAM["high"], STREAM["low"]).double()
    state = opened(text, rows, dv=1)
    out = state.step(q.expand(rows, 1, -1, -1), k.expand(rows, -1, -1), v.expand(rows, -1, -1))
    stated = state.guarantee()
    assert stated is not None and stated.holds, stated
    missed = torch.zeros(rows, dtype=torch.bool)
    for i in range(n):
        truth = unmasked(q[i], k[: i + 1], v[: i + 1], torch.arange(i + 1) >= i - window)
        missed |= ((out[:, 0, i] - truth).abs() > stated.epsilon * truth).any(1)
    return int(missed.sum()), stated.epsilon, stated.delta


@pytest.mark.parametrize("text", [RAO_BLACKWELL, PAPER])
def test_misses_are_rarer_than_stated(draw: Draw, text: str) -> None:
    failed, _, delta = failures(text, 200, draw)
    assert clopper_pearson_limit(failed, 200, 5e-5) <= delta


@pytest.mark.slow
@pytest.mark.parametrize("text", [RAO_BLACKWELL, PAPER])
def test_misses_are_rarer_than_stated_over_ten_thousand_seeds(draw: Draw, text: str) -> None:
    failed = sum(failures(text, 1000, draw)[0] for _ in range(10))
    assert clopper_pearson_limit(failed, 10_000, 5e-5) <= 0.2


def test_the_test_tells_a_method_that_misses_too_often(draw: Draw) -> None:
    """With one draw in place of the 1005 that its epsilon needs, the misses are many."""
    text = RAO_BLACKWELL.replace("epsilon=0.6,delta=0.2,", "copies=1,groups=1,")
    state = opened(text, 200, dv=1)
    assert state.guarantee() is None  # one group: no probability below 1
    v = torch.where(draw(40, 1) > 1.0, 3.0, 1.0).double()
    state.append(torch.zeros(200, 40, 3, dtype=torch.float64), v.expand(200, -1, -1))
    truth = v.mean()
    missed = ((state.read(torch.zeros(200, 1, 3, dtype=torch.float64)).mean - truth).abs() > 0.6 * truth).any(2)
    assert clopper_pearson_limit(int(missed.sum()), 200, 5e-5) > 0.2


def test_sizes_follow_from_epsilon_and_delta() -> None:
    t, q = sizes_for(0.5, 0.1, spread=2.0, answers=1000)
    assert t == 64 and q == 25 and math.exp(-q / 2.5) * 1000 <= 0.1  # 2.5 ln(10^4) = 23.03
    assert ValueSample(epsilon=0.5, delta=0.1, spread=2.0, horizon=500).sizes(dv=2) == (t, q)


def test_a_mean_of_t_and_a_median_of_q_fail_no_more_than_their_exponents_say() -> None:
    """P(Bin(Q, 1/8) >= (Q+1)/2) <= exp(-Q/2.5), where published constants give a mean that fails with 1/3."""
    for q in range(1, 102, 2):
        tail = math.fsum(math.comb(q, j) * 0.125**j * 0.875 ** (q - j) for j in range((q + 1) // 2, q + 1))
        assert tail <= math.exp(-q / 2.5)
    q = 313  # 12 ln(2nd/delta) for nd/delta of 10^11: failures of 1/3 make the median fail 61 times too often
    tail = math.fsum(math.comb(q, j) * (1 / 3) ** j * (2 / 3) ** (q - j) for j in range((q + 1) // 2, q + 1))
    assert tail > 20 * 2 * math.exp(-q / 12)


@pytest.mark.parametrize(
    ("values", "said"),
    [([1.0, -0.5], "-0.5 was seen"), ([1.0, 0.0], "a value of 0 was seen"), ([1.0, 3.5], "values from 1 to 3.5")],
)
@pytest.mark.parametrize("text", ["window(block=1)+{}@1", "window_sample({})@1"])
def test_the_guarantee_is_withdrawn_with_its_assumption(text: str, values: list[float], said: str) -> None:
    arguments = "copies=40,groups=15,spread=3.0,horizon=8"
    whole = text.format(arguments if "window_sample" in text else f"value_sample({arguments})")
    state = opened(whole, d=1, dv=1)
    fine = torch.tensor([[[2.0], [1.0], [3.0]]], dtype=torch.float64)
    state.append(torch.zeros_like(fine), fine)
    kept = state.guarantee()
    assert kept is not None and kept.holds and kept.epsilon == pytest.approx(math.sqrt(8 * 3 / 40))
    worse = torch.tensor(values + [1.0], dtype=torch.float64).view(1, 3, 1)
    state.append(torch.zeros_like(worse), worse)
    withdrawn = state.guarantee()
    assert withdrawn is not None and not withdrawn.holds and said in withdrawn.why


def test_the_guarantee_is_withdrawn_past_the_horizon() -> None:
    for text, said in (
        ("window(block=1)+value_sample(copies=9,groups=15,spread=3.0,horizon=4)@1", "5 tokens left"),
        ("window_sample(copies=9,groups=15,spread=3.0,horizon=5)@1", "6 answers were given"),
    ):
        state, ones = opened(text, d=1, dv=1), torch.ones(1, 6, 1, dtype=torch.float64)
        state.step(ones.unsqueeze(1)[:, :, :5], ones[:, :5], ones[:, :5])
        assert state.guarantee().holds
        state.step(ones.unsqueeze(1)[:, :, 5:], ones[:, 5:], ones[:, 5:])
        assert not state.guarantee().holds and said in state.guarantee().why


def test_traits_say_what_a_median_gives_up() -> None:
    for text, mean in (
        ("window+value_sample(copies=4)@8", True),
        ("window+value_sample(copies=4,groups=3)@8", False),
        ("window+value_sample(epsilon=0.5,spread=2.0,horizon=9)@8", False),
        ("window_sample(copies=4)@8", True),
        ("window_sample(groups=3)@8", False),
    ):
        traits = parse(text).traits
        assert traits.reference == "unmasked" and (traits.normalised, traits.value_linear) == (mean, mean)


def test_only_the_value_is_replicated_not_the_window() -> None:
    one, many_copies = (opened(f"window+value_sample(copies={c})@64", dv=16, d=16) for c in (1, 101))
    assert many_copies.nbytes - one.nbytes == 100 * (16 * 8 + 8)  # a value and its key
