"""Results that carry bounds: merging them never loses what the bounds promise, and every term is needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvfloor.certify.certified import Certified
from kvfloor.core.partial import Partial

SMALL = st.floats(0, 0.4)
Merge = Callable[[Certified, Certified], Certified]
Bound = Callable[[Certified], Tensor]


@dataclass
class Case:
    """Hold sets of tokens, each as a certified estimate and as the truth: N (cases, dv) and Z (cases,)."""

    parts: list[Certified]
    numerator: list[Tensor]
    mass: list[Tensor]

    @property
    def truth(self) -> tuple[Tensor, Tensor]:
        return sum(self.numerator, torch.zeros(())), sum(self.mass, torch.zeros(()))


def drawn(seed: int, dv: int, count: int, error: float, spread: float, cases: int = 400) -> Case:
    """Draw estimates whose stated bounds are attained: the truth lies at the very edge of what they allow."""
    draw = torch.Generator().manual_seed(seed)
    case = Case([], [], [])
    for _ in range(count):
        mean, way = (torch.randn(cases, dv, generator=draw, dtype=torch.float64) for _ in range(2))
        log_mass, sign = torch.randn(2, cases, generator=draw, dtype=torch.float64)
        off, wide = (torch.rand(cases, generator=draw, dtype=torch.float64) * top for top in (error, spread))
        estimated = log_mass.exp()
        mass = estimated * (1 + wide * sign.sign())
        moved = (off * estimated).unsqueeze(1) * way / way.norm(dim=1, keepdim=True)
        case.parts.append(Certified(Partial(mean, log_mass), off, wide, torch.ones(cases, dtype=torch.float64)))
        case.numerator.append(mean * mass.unsqueeze(1) + moved)
        case.mass.append(mass)
    return case


def violations(case: Case, merge: Merge = Certified.merge, bound: Bound = lambda x: x.bound) -> int:
    """Return how many cases break a promise of the merged result: on the error, on the spread, or on the output."""
    found = reduce(merge, case.parts)
    numerator, mass = case.truth
    estimated, mean = found.partial.log_mass.exp(), found.partial.mean
    off = (numerator - mean * mass.unsqueeze(1)).norm(dim=1)
    slack = 1e-13 * estimated * (1 + mean.norm(dim=1))  # of this test's own arithmetic
    wrong = off > found.error * estimated + slack
    wrong |= (mass - estimated).abs() > found.spread * estimated + slack
    wrong |= (numerator / mass.unsqueeze(1) - mean).norm(dim=1) > bound(found) + slack / estimated
    return int(wrong.sum())


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), dv=st.integers(1, 5), count=st.integers(1, 5), error=SMALL, spread=SMALL)
def test_the_truth_never_leaves_the_merged_bounds(seed: int, dv: int, count: int, error: float, spread: float) -> None:
    assert violations(drawn(seed, dv, count, error, spread)) == 0


def without_spread(a: Certified, b: Certified) -> Certified:
    none = [replace(x, spread=torch.zeros_like(x.spread)) for x in (a, b)]
    return replace(none[0].merge(none[1]), spread=a.merge(b).spread)


def with_the_wrong_sign(a: Certified, b: Certified) -> Certified:
    found, less = a.merge(b), without_spread(a, b)
    return replace(found, error=2 * less.error - found.error)


def with_the_other_share(a: Certified, b: Certified) -> Certified:
    found = a.merge(b)
    return replace(found, error=replace(a, error=b.error).merge(replace(b, error=a.error)).error)


MUTANTS: dict[str, tuple[Merge, Bound]] = {
    "the spread's part of the error is dropped": (without_spread, lambda x: x.bound),
    "the spread's part is subtracted": (with_the_wrong_sign, lambda x: x.bound),
    "errors are weighed by the other side's share": (with_the_other_share, lambda x: x.bound),
    "the spread is not merged": (lambda a, b: replace(a.merge(b), spread=a.spread), lambda x: x.bound),
    "the upper end of the mass divides": (Certified.merge, lambda x: x.error / (1 + x.spread)),
    "the estimate of the mass divides": (Certified.merge, lambda x: x.error),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_every_term_is_needed(name: str) -> None:
    assert violations(drawn(0, 1, 3, 0.1, 0.3)) == 0
    assert violations(drawn(0, 1, 3, 0.1, 0.3), *MUTANTS[name]) > 0


def test_merging_is_associative_up_to_rounding() -> None:
    a, b, c = drawn(1, 3, 3, 0.2, 0.2).parts
    left, right = a.merge(b).merge(c), a.merge(b.merge(c))
    for one, other in ((left.partial.mean, right.partial.mean), (left.spread, right.spread)):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    # A set's error is counted about its own mean, so the order may move the sum by the triangle inequality only.
    flat = sum((x.partial.log_mass.exp() * (x.error + x.spread * 9) for x in (a, b, c)), torch.zeros(()))
    assert bool((torch.maximum(left.error, right.error) <= flat / left.partial.log_mass.exp()).all())


def test_exact_parts_and_empty_parts_add_no_error() -> None:
    (a,) = drawn(2, 3, 1, 0.1, 0.1).parts
    empty = Certified.exact(Partial.empty(400, dv=3, dtype=torch.float64), torch.zeros(400, dtype=torch.float64))
    for merged in (a.merge(empty), empty.merge(a)):
        for name in ("error", "spread", "largest"):
            torch.testing.assert_close(getattr(merged, name), getattr(a, name), rtol=1e-13, atol=0)
    one, two = (replace(x, error=x.error * 0, spread=x.spread * 0) for x in drawn(3, 3, 2, 0, 0).parts)
    assert float(one.merge(two).bound.max()) < 1e-12
    assert float(Certified.exact(a.partial, a.largest, 1e-3).bound.min()) >= 2e-3


def test_a_mass_that_may_vanish_bounds_nothing() -> None:
    (a,) = drawn(4, 2, 1, 0.1, 0.1).parts
    wide = replace(a, spread=torch.ones_like(a.spread))
    assert bool(torch.isinf(wide.bound).all())
    endless = replace(a, error=a.error + torch.inf)
    assert bool(torch.isinf(endless.bound).all()) and not bool(endless.within(1e9).any())
    assert bool(torch.isinf(replace(a, error=a.error * torch.nan).bound).all())
