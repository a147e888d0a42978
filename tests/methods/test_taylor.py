"""Taylor moments: the truncated exponential's answers without tokens, their certificate, and its limits."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvfloor import Spec, parse
from kvfloor.floors.taylor import taylor_degree, taylor_numbers
from kvfloor.methods.summaries import taylor
from kvfloor.methods.summaries.taylor import FEATURES_LIMIT, monomials, relative_error, series
from tests import support
from tests.support import Draw, filled

opened = partial(support.opened, d=3, dv=2)


def truncated(x: Tensor, degree: int) -> Tensor:
    return sum((x**j / math.factorial(j) for j in range(1, degree + 1)), torch.ones_like(x))


def oracle(q: Tensor, k: Tensor, v: Tensor, held: Tensor, degree: int, scale: float) -> tuple[Tensor, Tensor]:
    """Answer and log-mass where held tokens weigh e^x and the others its Taylor polynomial, token by token."""
    x = scale * (k @ q)
    weight = torch.where(held, torch.exp(x), truncated(x, degree))
    return (weight.unsqueeze(1) * v).sum(0) / weight.sum(), weight.sum().log()


def assert_follows(text: str, degree: int, q: Tensor, k: Tensor, v: Tensor, scale: float = 0.5) -> None:
    state = filled(text, k, v, scale=scale)
    part = state.read(q)
    for row in range(k.shape[0]):
        held = torch.zeros(k.shape[1], dtype=torch.bool)
        held[state.slots.view().position[row]] = True
        for i in range(q.shape[1]):
            mean, log_mass = oracle(q[row, i], k[row], v[row], held, degree, scale)
            assert float((part.mean[row, i] - mean).abs().max()) <= 1e-11
            assert float((part.log_mass[row, i] - log_mass).abs()) <= 1e-11


@pytest.mark.parametrize("degree", [0, 2, 4, 8])
@pytest.mark.parametrize("head", ["window(block=1)", "random(block=8)"])
def test_evicted_tokens_weigh_the_truncated_exponential(draw: Draw, head: str, degree: int) -> None:
    assert_follows(f"{head}+taylor(degree={degree})@16", degree, draw(2, 4, 3), draw(2, 56, 3), draw(2, 56, 2))


def test_an_odd_degree_where_all_weights_are_positive(draw: Draw) -> None:
    k, q = draw(1, 40, 3, scale=0.3), draw(1, 4, 3, scale=0.3)
    assert_follows("window(block=1)+taylor(degree=1)@8", 1, q, k, draw(1, 40, 2))


def test_the_whole_stream_as_moments(draw: Draw) -> None:
    """`window(block=1)@1` keeps the newest token only: a stream state of constant size for bounded logits."""
    k, q = (torch.nn.functional.normalize(draw(1, n, 3), dim=-1) for n in (200, 8))
    v = draw(1, 200, 2)
    state = opened("window(block=1)+taylor(degree=8)@1")
    before = state.nbytes
    state.append(k, v)
    assert state.nbytes == before and state.held.tolist() == [1]
    exact = torch.softmax(q[0] @ k[0].T, 1) @ v[0]
    assert float((state.read(q).mean[0] - exact).abs().max()) <= 8e-6 * float(v.abs().max())


@pytest.mark.parametrize("wrong", ["factor", "parent"])
def test_wrong_features_are_told(draw: Draw, monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    right = monomials

    def table(d: int, degree: int) -> taylor.Monomials:
        good = right(d, degree)
        if wrong == "factor":
            return taylor.Monomials(good.parent, good.variable, torch.ones_like(good.factor), good.degree)
        return taylor.Monomials(good.parent, good.variable.roll(1), good.factor, good.degree)

    monkeypatch.setattr(taylor, "monomials", table)
    with pytest.raises(AssertionError):
        assert_follows("window(block=1)+taylor@16", 2, draw(1, 4, 3), draw(1, 56, 3), draw(1, 56, 2))


@given(st.integers(1, 5), st.integers(0, 6))
@settings(max_examples=20)
def test_there_are_as_many_features_as_monomials_and_their_product_is_the_truncated_exponential(d: int, g: int) -> None:
    table = monomials(d, g)
    assert len(table.degree) == math.comb(d + g, g)
    u, w = torch.randn(2, d, generator=torch.Generator().manual_seed(d + 10 * g), dtype=torch.float64)
    product = float(table.features(u) @ table.features(w))
    assert product == pytest.approx(float(truncated(u @ w, g)), rel=1e-12, abs=1e-12)


def test_the_state_is_the_number_of_numbers_the_floors_page_counts() -> None:
    for d, dv, g in ((3, 2, 4), (8, 8, 2), (1, 5, 8)):
        state = opened(f"window+taylor(degree={g})@8", d=d, dv=dv)
        assert state.summary.moments.numel() == taylor_numbers(d, dv, g)


# ---- errors ------------------------------------------------------------------------------------------------------

TABLE = {  # (degree, largest logit): largest relative error of the truncated exponential, as published
    (4, 0.5): 4e-4,
    (4, 1.0): 1.9e-2,
    (4, 2.0): 1.5,
    (8, 1.0): 6.8e-6,
    (8, 2.0): 8.7e-3,
    (8, 4.0): 28.0,
    (24, 4.0): 3.4e-9,
    (24, 8.0): 5.5,
}


@pytest.mark.parametrize(("degree", "bound"), TABLE, ids=str)
def test_the_error_by_degree_and_logit_bound_is_the_published_one(degree: int, bound: float) -> None:
    """One key, queries all along [-bound, bound]; the state's log-mass against the logit itself."""
    state = opened(f"window(block=1)+taylor(degree={degree})@1", d=1, dv=1)
    one = torch.ones(1, 2, 1, dtype=torch.float64)
    state.append(one, one)
    logits = torch.linspace(-bound, bound, 2001, dtype=torch.float64).view(1, -1, 1)
    ratio = torch.exp(state.summary.read(logits).log_mass[0] - logits[0, :, 0])
    worst = float((ratio - 1).abs().max())
    assert worst == pytest.approx(TABLE[degree, bound], rel=0.06)
    # The answer's error, which the certificate states, counts the span of the ratios instead.
    assert relative_error(degree, bound) == pytest.approx(float(ratio.max() / ratio.min()) - 1, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize(("degree", "radius"), [(0, 0.3), (1, 0.6), (2, 0.7), (4, 1.5), (8, 3.0), (3, 1.0)])
def test_no_answer_misses_by_more_than_the_certificate_says(draw: Draw, degree: int, radius: float) -> None:
    """Queries and keys at the radius, aligned and opposed: values >= 0 against the error relative to the answer."""
    text = f"window(block=1)+taylor(degree={degree},radius={radius})@2"
    k = torch.nn.functional.normalize(draw(1, 60, 3), dim=-1)
    q = radius * torch.nn.functional.normalize(draw(1, 60, 3), dim=-1)
    q[0, :20] = radius * k[0, :20]
    q[0, 20:40] = -radius * k[0, 20:40]
    v = draw(1, 60, 2).abs()
    state = opened(text)
    answers = [state.step(q[:, None, i : i + 1], k[:, i : i + 1], v[:, i : i + 1])[0, 0, 0] for i in range(60)]
    stated = state.guarantee()
    assert stated is not None and stated.holds and stated.delta == 0
    ratios = []
    for i, answer in enumerate(answers):
        exact = torch.softmax(k[0, : i + 1] @ q[0, i], 0) @ v[0, : i + 1]
        ratios.append(float(((answer - exact).abs() / exact).max()))
    assert max(ratios) <= stated.epsilon


def test_the_certificates_bound_is_reached() -> None:
    """Two keys at -r and 0 where all weights but these are gone: the error is the whole span of the ratios."""
    r, degree = 1.2, 2
    k = torch.tensor([[[-1.0], [0.0], [0.0]]], dtype=torch.float64)
    v = torch.tensor([[[1.0], [0.0], [0.0]]], dtype=torch.float64)
    state = opened(f"window(block=1)+taylor(degree={degree},radius={r})@1", d=1, dv=1)
    many = 300
    state.append(k[:, :1], v[:, :1])
    state.append(k[:, 1:2].expand(1, many, 1), v[:, 1:2].expand(1, many, 1))
    q = torch.full((1, 1, 1), r, dtype=torch.float64)
    exact = math.exp(-r) / (math.exp(-r) + many)
    error = float(state.read(q).mean) / exact - 1
    low, high = 1.0, float(truncated(torch.tensor(-r), degree)) * math.exp(r)
    assert error == pytest.approx(high / low - 1, rel=5e-3)
    assert error <= relative_error(degree, r)


def test_the_stated_error_is_evaluated_at_the_logits_that_were_possible(draw: Draw) -> None:
    state = opened("window(block=1)+taylor(radius=2.0)@1", rows=2)
    assert parse("window+taylor(radius=2.0)@1").guarantee(Spec(2, 3, 2)).holds is False  # 9.92 there
    k, v, q = draw(2, 6, 3), draw(2, 6, 2), draw(2, 1, 6, 3)
    k = 0.5 * torch.nn.functional.normalize(k, dim=-1)
    q = torch.nn.functional.normalize(q, dim=-1)
    q[0, 0, 3] *= 1.2  # the longest query of row 0, whose keys are half as long as row 1's would have to be
    state.step(q, k, v)
    stated = state.guarantee()
    assert stated.holds and stated.epsilon == pytest.approx(relative_error(2, 0.6), rel=1e-9)


@pytest.mark.parametrize("late", ["query", "key", "asked"])
def test_the_guarantee_is_withdrawn_past_the_radius(draw: Draw, late: str) -> None:
    state = opened("window(block=1)+taylor(degree=8,radius=1.0)@1")
    k = torch.nn.functional.normalize(draw(1, 9, 3), dim=-1)
    q = 0.9 * torch.nn.functional.normalize(draw(1, 1, 9, 3), dim=-1)
    v = draw(1, 9, 2)
    state.step(q[:, :, :5], k[:, :5], v[:, :5])
    kept = state.guarantee()
    assert kept is not None and kept.holds
    if late == "query":
        q[0, 0, 6] *= 1.3
    elif late == "key":
        k[0, 6] *= 1.3
    state.step(q[:, :, 5:], k[:, 5:], v[:, 5:])
    if late == "asked":
        assert state.guarantee().holds
        state.attend(1.3 * q[:, :, :1])
    withdrawn = state.guarantee()
    assert not withdrawn.holds and "a logit of 1.17 was possible, radius is 1.0" in withdrawn.why
    again = state.method.from_bytes(state.to_bytes()).guarantee()
    assert again is not None and not again.holds


def test_a_padded_query_does_not_count() -> None:
    state = opened("window(block=1)+taylor(degree=8,radius=1.0)@1", rows=2)
    k = torch.full((2, 4, 3), 0.5, dtype=torch.float64)
    q = torch.full((2, 1, 4, 3), 0.5, dtype=torch.float64)
    q[1, 0, 2] = torch.nan
    q[1, 0, 0] = 100.0
    present = torch.tensor([[True] * 4, [False, True, False, True]])
    state.step(q, k, k[..., :2], present)
    assert state.guarantee().holds


def test_the_degree_that_the_floors_page_gives_meets_its_error() -> None:
    for r, error in ((0.5, 1e-3), (1.0, 0.01), (2.0, 0.1), (4.0, 1e-6)):
        assert relative_error(taylor_degree(r, error), r) <= error


def test_rounding_is_part_of_the_certificate(draw: Draw) -> None:
    """At radius 14 sums of e^14 must cancel to e^-14: float64 leaves 1e-4, and the certificate says so."""
    state = opened("window(block=1)+taylor(degree=80,radius=14.0)@1", d=1, dv=1)
    k = torch.ones(1, 40, 1, dtype=torch.float64)
    v = draw(1, 40, 1).abs()
    state.step(torch.full((1, 1, 40, 1), -14.0, dtype=torch.float64), k, v)
    stated = state.guarantee()
    assert relative_error(80, 14.0) < 1e-12 < 1e-4 < stated.epsilon
    error = abs(float(state.read(torch.full((1, 1, 1), -14.0, dtype=torch.float64)).mean) / float(v.mean()) - 1)
    assert error <= stated.epsilon


# ---- odd degrees, softcaps, sizes ----------------------------------------------------------------------------------


def test_a_query_whose_weights_are_not_positive_is_answered_without_the_evicted() -> None:
    """1 + x at x = -3 is -2: the summary is empty for that query, and full for the opposite one."""
    state = opened("window(block=1)+taylor(degree=1)@1", d=1, dv=1)
    k, v = torch.tensor([[[1.0], [2.0]]]).double(), torch.tensor([[[5.0], [7.0]]]).double()
    state.append(k, v)
    part = state.summary.read(torch.tensor([[[-3.0], [3.0]]], dtype=torch.float64))
    assert float(part.log_mass[0, 0]) == -math.inf and float(part.mean[0, 0]) == 0.0
    assert float(part.log_mass[0, 1]) == pytest.approx(math.log(4.0)) and float(part.mean[0, 1]) == 5.0
    assert float(state.read(torch.full((1, 1, 1), -3.0, dtype=torch.float64)).mean) == 7.0
    assert not parse("window+taylor(degree=1)@8").traits.normalised
    assert parse("window+taylor(degree=2)@8").traits.normalised


def test_the_series_of_a_capped_exponential_is_its_taylor_series() -> None:
    cap, h = 3.0, 1e-2
    found = series(6, cap)
    x = torch.tensor([-2 * h, -h, 0.0, h, 2 * h], dtype=torch.float64)
    polynomial = sum(a * x**j for j, a in enumerate(found))
    assert float((polynomial - torch.exp(cap * torch.tanh(x / cap))).abs().max()) <= 1e-13
    assert series(4, None) == [1.0, 1.0, 0.5, 1 / 6, 1 / 24]


def test_under_a_softcap_the_weights_are_those_of_capped_logits(draw: Draw) -> None:
    cap = 4.0
    state = opened("window(block=1)+taylor(degree=4)@1", softcap=cap, scale=0.5)
    k, v, q = draw(1, 40, 3, scale=0.3), draw(1, 40, 2), draw(1, 5, 3, scale=0.3)
    state.append(k, v)
    capped = cap * torch.tanh(0.5 * (q[0] @ k[0].T) / cap)
    exact = torch.softmax(capped, 1) @ v[0]
    assert float((state.read(q).mean[0] - exact).abs().max()) <= 1e-6
    assert state.guarantee() is None
    with pytest.raises(ValueError, match=r"softcap 1.0\) to degree 4 is not positive everywhere"):
        opened("window+taylor(degree=4)@8", softcap=1.0)


def test_an_absurd_number_of_features_is_refused_with_the_numbers() -> None:
    with pytest.raises(ValueError) as caught:
        opened("window+taylor(degree=4)@8", d=64, dv=64)
    assert "814,385 monomials, 423,480,200 bytes per row" in str(caught.value)
    assert "d = 64 takes degree 2 or less" in str(caught.value)
    assert math.comb(64 + 2, 2) <= FEATURES_LIMIT


def test_long_calls_go_in_pieces_with_the_same_answers(draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    k, v, q = draw(2, 40, 3), draw(2, 40, 2), draw(2, 30, 3)
    answers = []
    for limit in (1 << 18, 50):
        monkeypatch.setattr(taylor, "_FEATURES_PER_ROW", limit)
        state = filled("window(block=8)+taylor@8", k, v)
        answers.append(state.read(q).mean)
        assert state.read(q[:, :0]).mean.shape == (2, 0, 2)
    torch.testing.assert_close(answers[0], answers[1], rtol=1e-12, atol=1e-13)
