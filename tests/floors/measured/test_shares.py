"""Bounds on weights and leaks: on the safe side in every precision, and close."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvfloor.floors.measured import shares
from kvfloor.floors.measured.products import Factors, Rounding, short_products
from tests.floors.measured import read_oracle

PRECISIONS = ["float64", "float32", *(["bfloat16"] if short_products(torch.device("cpu")) else [])]


def force(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    """Make `ordered_shares` compute in this precision whatever the size."""
    monkeypatch.setattr(shares, "_WIDE_UP_TO", 0 if precision != "float64" else 2**60)
    monkeypatch.setattr(shares, "_SHORT_ERROR", 100.0 if precision == "bfloat16" else -1.0)


def instance(draw, n: int, groups: int, d: int, length: float):
    """Keys, a random group for every token, and queries that lean towards their group."""
    k, generator = draw(n, d), torch.Generator().manual_seed(n)
    group = torch.randint(-1, groups, (n,), generator=generator)
    group[:groups] = torch.randperm(groups, generator=generator)
    q = length * (k[torch.argsort(group[:groups])] + 0.3 * draw(groups, d))
    return q, k, group


def truth(q, k, group, **law):
    seen = read_oracle.weights(q, k, **law)
    number = torch.arange(len(q)).unsqueeze(1)
    return (seen * (group == number)).sum(1), (seen * (group > number)).sum(1)


def safe(low, high, own, leak) -> bool:
    """The weight is not above the truth, nor is any quotient that levels are computed from."""
    errors = torch.tensor([1e-6, 1e-3, 0.05, 0.5], dtype=torch.float64).unsqueeze(1)
    quotients = low / (errors + high) <= own / (errors + leak) * (1 + 1e-11)
    return bool((low <= own * (1 + 1e-12)).all()) and bool(quotients.all())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize(("n", "groups", "d", "length"), [(1, 1, 3, 1.0), (40, 13, 8, 1.0), (1500, 350, 32, 0.6)])
def test_bounds_are_safe_and_close_in_every_precision(monkeypatch, draw, precision, softcap, n, groups, d, length):
    force(monkeypatch, precision)
    q, k, group = instance(draw, n, groups, d, length)
    later, scale = draw(groups), d**-0.5
    own, leak = truth(q, k, group, scale=scale, softcap=softcap, later_mass=later)
    low, high = shares.ordered_shares(q, k, group, scale=scale, softcap=softcap, later_mass=later)
    assert safe(low, high, own, leak)
    near = {"float64": 1e-10, "float32": 1e-3, "bfloat16": 0.35}[precision]
    assert bool((low >= own * (1 - near)).all()) and bool((high <= leak * (1 + near) + 1e-9).all())


@pytest.mark.parametrize("precision", PRECISIONS[1:])
def test_without_the_slack_for_rounding_bounds_are_broken(monkeypatch, draw, precision):
    force(monkeypatch, precision)
    monkeypatch.setattr(Rounding, "of_sums", lambda self, unit, terms: torch.zeros_like(self.error))
    q, k, group = instance(draw, 2000, 500, 32, 1.0)
    own, leak = truth(q, k, group, scale=0.3)
    low, high = shares.ordered_shares(q, k, group, scale=0.3)
    assert not safe(low, high, own, leak)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_no_logit_is_off_by_more_than_the_stated_error(draw, dtype, softcap):
    q, k = draw(200, 64, scale=3.0), draw(300, 64)
    factors = Factors.of(q, k, 0.7, softcap, dtype)
    rounding = Rounding.of(factors, q, k, 0.7)
    exact = 0.7 * q @ k.T
    exact = exact if softcap is None else softcap * torch.tanh(exact / softcap)
    off = (factors.logits(slice(None), slice(None)).double() - exact).abs().amax(1)
    assert bool((off <= rounding.error).all()) and bool((exact.abs().amax(1) <= rounding.reach).all())
    assert dtype == torch.float64 or float(off.max()) > 0.01 * float(rounding.error.max())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("length", [1e2, 1e4])
def test_huge_logits_stay_finite_and_safe(monkeypatch, draw, precision, length):
    force(monkeypatch, precision)
    q, k, group = instance(draw, 60, 20, 8, length)
    own, leak = truth(q, k, group)
    low, high = shares.ordered_shares(q, k, group, scale=1.0)
    assert bool(torch.isfinite(low).all()) and bool(torch.isfinite(high).all())
    assert safe(low * (1 - 1e-9), high, own, leak)


def test_a_group_without_tokens_has_no_weight(draw):
    low, high = shares.ordered_shares(draw(3, 4), draw(5, 4), torch.tensor([0, 0, 2, 2, -1]), scale=1.0)
    assert float(low[1]) == 0.0 and float(high[1]) > 0.0
    none, _ = shares.ordered_shares(draw(0, 4), draw(5, 4), torch.full((5,), -1), scale=1.0)
    assert none.shape == (0,)


@given(st.integers(1, 12), st.integers(1, 6), st.floats(0.01, 3.0), st.integers(0, 2**20))
def test_weights_and_leaks_of_random_instances(n, groups, length, seed):
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(count, 4, generator=generator, dtype=torch.float64) for count in (groups, n))
    group = torch.randint(-1, groups, (n,), generator=generator)
    own, leak = truth(q * length, k, group)
    low, high = shares.ordered_shares(q * length, k, group, scale=1.0)
    torch.testing.assert_close(low, own, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(high, leak, rtol=1e-10, atol=1e-13)
