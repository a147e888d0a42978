"""Bounds from codes hold over all residuals that they allow, and are no looser than their proofs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvfloor.certify import glimpse as module
from kvfloor.certify.glimpse import Glimpse
from kvfloor.certify.operator_norm import operator_norm
from tests.support import seeded

ROWS, QUERIES = 2, 7


def seen(logits: Tensor, eta: Tensor, v: Tensor, residual: Tensor, coded: Tensor) -> Glimpse:
    """Return a glimpse whose bounds are attained by the residuals: eta (r, m, s) and residual (r, s, dv)."""
    eta, residual = eta * coded, residual * coded[:, 0].unsqueeze(-1)
    return Glimpse(
        logits=logits,
        doubt=eta.abs(),
        rounding=torch.zeros_like(eta),
        coded=coded,
        gram=eta.square().sum(-1).sqrt(),
        v=v,
        length=v.norm(dim=-1),
        radius=residual.norm(dim=-1),
        operator=torch.linalg.matrix_norm(residual, 2),
    )


def truth(logits: Tensor, eta: Tensor, v: Tensor, residual: Tensor, coded: Tensor) -> Tensor:
    weight = torch.softmax(logits + eta * coded, -1)
    return weight @ (v + residual * coded[:, 0].unsqueeze(-1))


Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def drawn(seed: int, s: int, dv: int, peak: float, off: float, moved: float) -> Inputs:
    draw = seeded(seed)
    coded = (draw(ROWS, 1, s) > -0.7).expand(-1, QUERIES, -1)
    return (
        draw(ROWS, QUERIES, s) * peak,
        draw(ROWS, QUERIES, s) * off,
        draw(ROWS, s, dv),
        draw(ROWS, s, dv) * moved,
        coded,
    )


def excess(inputs: Inputs) -> float:
    """Return the largest ratio of true error to bound."""
    found, _ = seen(*inputs).answer()
    error = (found.partial.mean - truth(*inputs)).norm(dim=-1)
    return float((error / found.bound).max())


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    s=st.sampled_from([1, 2, 5, 40, 300]),
    dv=st.integers(1, 4),
    peak=st.sampled_from([0.0, 1.0, 8.0, 200.0]),
    off=st.sampled_from([0.0, 1e-3, 0.05, 0.5, 3.0]),
    moved=st.sampled_from([0.0, 1e-3, 0.3]),
)
def test_the_error_never_exceeds_the_bound(seed: int, s: int, dv: int, peak: float, off: float, moved: float) -> None:
    assert excess(drawn(seed, s, dv, peak, off, moved)) <= 1


def aligned(off: float, moved: float) -> Inputs:
    """Return inputs for which a bound is nearly attained: one token of large mass, all residuals in one direction."""
    s = 40
    logits = torch.zeros(ROWS, QUERIES, s, dtype=torch.float64)
    logits[..., 0] = torch.linspace(-3, 3, QUERIES)
    eta, v = torch.zeros_like(logits), torch.zeros(ROWS, s, 3, dtype=torch.float64)
    eta[..., 0], v[:, 0, 0] = off, 1.0
    residual = torch.zeros_like(v)
    residual[..., 0] = moved
    return logits, eta, v, residual, torch.ones(ROWS, QUERIES, s, dtype=torch.bool)


def halved(*names: str) -> object:
    """Return an `answer` that takes half of these fields of the glimpse."""
    real = Glimpse.answer

    def answer(self: Glimpse) -> object:
        return real(replace(self, **{name: getattr(self, name) / 2 for name in names}))

    return answer


PLANTED = {
    "an unscaled radius": ("radius", "operator"),
    "half of the logits' errors": ("doubt", "gram"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_bound_of_half_the_size_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [aligned(0.0, 0.1), aligned(0.1, 0.0), aligned(-0.1, 0.0)]
    assert all(0.3 < excess(case) <= 1 for case in cases)
    monkeypatch.setattr(Glimpse, "answer", halved(*PLANTED[name]))
    assert max(map(excess, cases)) > 1


def test_errors_about_zero_instead_of_the_mean_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = aligned(0.2, 0.0)
    monkeypatch.setattr(Glimpse, "_distances", lambda self, mean, eps: self.length.unsqueeze(1) * self.coded)
    shifted = (*inputs[:2], inputs[2] * 0 + torch.tensor([0.0, 0.0, 1e-9]), *inputs[3:])
    shifted[2][:, 1:, 0] = 1.0  # the heavy token is the only one without a value, and alone in doubt
    assert excess(shifted) > 1


def test_the_deviation_is_the_least_of_its_three_forms_and_above_the_truth() -> None:
    draw = seeded(0)
    a, eta = draw(3, 4, 200).abs(), draw(3, 4, 200) * 0.01
    a[..., :3] *= 100
    none, coded = torch.zeros_like(a), torch.ones_like(a, dtype=torch.bool)
    gram, doubt = eta.square().sum(-1).sqrt(), torch.full_like(a, 0.05)
    slope = torch.expm1(doubt.amax(-1)) / doubt.amax(-1)
    found = module.deviation(a, torch.expm1(doubt), none, coded, gram, slope)
    each = (a * torch.expm1(doubt)).sum(-1)
    whole = slope * gram * a.norm(dim=-1)
    assert bool((found <= torch.minimum(each, whole)).all()) and bool((found < 0.9 * torch.minimum(each, whole)).any())
    assert bool((found >= (a * torch.expm1(eta).abs()).sum(-1)).all())


def test_fetched_tokens_leave_the_bound() -> None:
    inputs = drawn(3, 60, 3, 2.0, 0.1, 0.1)
    before = seen(*inputs)
    logits, eta, _, residual, coded = inputs
    _, share = before.answer()
    index = share.topk(60, -1).indices
    change = (residual.unsqueeze(1).expand(-1, QUERIES, -1, -1)).gather(2, index.unsqueeze(-1).expand(-1, -1, -1, 3))
    last = torch.inf
    for count in (0, 5, 20, 60):
        at = index[..., :count]
        real = coded.gather(-1, at)
        exact = (logits + eta).gather(-1, at)
        after = before.fetched(at, real, exact, eta.gather(-1, at), change[..., :count, :])
        found, _ = after.answer()
        error = (found.partial.mean - truth(*inputs)).norm(dim=-1)
        assert bool((error <= found.bound).all())
        assert float(found.bound.max()) < last
        last = float(found.bound.max())
    assert last < 1e-11


@pytest.mark.parametrize("rank", [0, 1, 3, 12])
def test_the_operator_norm_is_bounded_from_above_and_closely(rank: int) -> None:
    draw = seeded(rank)
    matrix = draw(4, 12, rank) @ draw(4, rank, 50) if rank else torch.zeros(4, 12, 50, dtype=torch.float64)
    found, true = operator_norm(matrix @ matrix.transpose(1, 2), 1e-15), torch.linalg.matrix_norm(matrix, 2)
    assert bool((found >= true).all()) and bool((found <= true * 12 ** (1 / 32) * 1.001).all())
