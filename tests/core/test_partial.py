"""Partial: a commutative monoid, and attention over a union is the merge of attention over the parts."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfloor import Partial, Spec
from tests.support import attention

WIDTH = 3
log_masses = st.one_of(
    st.floats(-1e4, 1e4), st.just(-math.inf), st.sampled_from([-1e4, 0.0, 1e4]), st.floats(-1.0, 1.0)
)


@st.composite
def partials(draw: st.DrawFn) -> Partial:
    log_mass = torch.tensor(draw(log_masses), dtype=torch.float64)
    mean = torch.tensor(draw(st.lists(st.floats(-10, 10), min_size=WIDTH, max_size=WIDTH)), dtype=torch.float64)
    return Partial(torch.where(log_mass == -torch.inf, 0.0, mean), log_mass)


def assert_equal(a: Partial, b: Partial, tolerance: float = 1e-12) -> None:
    assert not a.mean.isnan().any() and not a.log_mass.isnan().any()
    torch.testing.assert_close(a.mean, b.mean, rtol=tolerance, atol=10 * tolerance)
    torch.testing.assert_close(a.log_mass, b.log_mass, rtol=tolerance, atol=tolerance)


@given(partials(), partials(), partials())
def test_merge_is_associative(a: Partial, b: Partial, c: Partial) -> None:
    assert_equal(a.merge(b).merge(c), a.merge(b.merge(c)))


@given(partials(), partials())
def test_merge_is_commutative_to_the_bit(a: Partial, b: Partial) -> None:
    assert_equal(a.merge(b), b.merge(a), tolerance=0.0)


@given(partials())
def test_empty_is_the_identity_to_the_bit(a: Partial) -> None:
    empty = Partial.empty(dv=WIDTH, dtype=torch.float64)
    assert_equal(a.merge(empty), a, tolerance=0.0)
    assert_equal(empty.merge(a), a, tolerance=0.0)


def test_empty_with_empty_is_empty() -> None:
    both = Partial.empty(2, 5, dv=WIDTH, dtype=torch.float32).merge(Partial.empty(2, 5, dv=WIDTH, dtype=torch.float32))
    assert torch.equal(both.mean, torch.zeros(2, 5, WIDTH))
    assert torch.equal(both.log_mass, torch.full((2, 5), -torch.inf))


@given(partials(), partials())
def test_a_merged_mean_stays_between_its_parts(a: Partial, b: Partial) -> None:
    if a.log_mass == -torch.inf or b.log_mass == -torch.inf:
        return
    merged = a.merge(b).mean
    assert bool((merged <= torch.maximum(a.mean, b.mean) + 1e-13).all())
    assert bool((merged >= torch.minimum(a.mean, b.mean) - 1e-13).all())


def test_equal_masses_average_and_add_up() -> None:
    a = Partial(torch.tensor([2.0]), torch.tensor(700.0))
    b = Partial(torch.tensor([4.0]), torch.tensor(700.0))
    merged = a.merge(b)
    assert merged.mean.item() == 3.0
    assert merged.log_mass.item() == pytest.approx(700.0 + math.log(2.0))


@given(st.integers(1, 12), st.lists(st.integers(0, 4), min_size=12, max_size=12), st.floats(-4, 4), st.integers(0, 99))
@settings(max_examples=60)
def test_merging_any_split_gives_attention_over_the_union(n: int, parts: list[int], log10: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, size, 4, generator=generator, dtype=torch.float64) for size in (3, n, n))
    spec = Spec(2, 4, 4, scale=10.0**log10, dtype=torch.float64)
    belongs = torch.tensor(parts[:n])
    merged = Partial.empty(2, 3, dv=4, dtype=torch.float64)
    for part in range(5):
        merged = merged.merge(Partial.over(q, k[:, belongs == part], v[:, belongs == part], spec))
    mean, log_mass = attention(q, k, v, spec.scale)
    torch.testing.assert_close(merged.mean, mean, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(merged.log_mass, log_mass, rtol=1e-12, atol=1e-12)


def test_a_log_weight_stands_for_that_many_equal_tokens(draw) -> None:
    q, k, v = draw(1, 2, 4), draw(1, 3, 4), draw(1, 3, 4)
    spec = Spec(1, 4, 4, dtype=torch.float64)
    times = torch.tensor([3, 1, 2])
    weighted = Partial.over(q, k, v, spec, log_weight=times.to(torch.float64).log().unsqueeze(0))
    repeated = Partial.over(q, k.repeat_interleave(times, 1), v.repeat_interleave(times, 1), spec)
    assert_equal(weighted, repeated)
