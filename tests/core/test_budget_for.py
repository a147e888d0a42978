"""`budget_for` inverts `guarantee`: what it returns promises what was asked, and one size less does not."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfloor import Bounded, Method, Spec, parse
from kvfloor.methods.sketches.subgen import SubGen
from kvfloor.methods.sketches.window_sample import WindowSample

SPEC = Spec(2, 4, 8)
errors = st.floats(0.05, 0.9)
failures = st.floats(1e-3, 0.5)


def promised(method: Method, epsilon: float, delta: float) -> bool:
    stated = method.guarantee(SPEC)
    return stated is not None and stated.holds and stated.epsilon <= epsilon and stated.delta <= delta


@settings(max_examples=60, deadline=None)
@given(errors, failures, st.floats(0.05, 0.5), st.floats(0.1, 4.0))
def test_subgens_samples_are_the_fewest(epsilon: float, delta: float, radius: float, longest: float) -> None:
    sized = SubGen(delta=radius, radius=longest).budget_for(epsilon, delta, SPEC)
    assert isinstance(sized, SubGen) and promised(sized, epsilon, delta) and sized.delta == radius
    assert sized.s == 1 or not promised(replace(sized, s=sized.s - 1), epsilon, delta)
    assert sized.t == 1 or not promised(replace(sized, t=sized.t - 1), epsilon, delta)


@settings(max_examples=60, deadline=None)
@given(errors, failures, st.floats(1.0, 20.0), st.integers(1, 10**6))
def test_medians_of_means_take_the_fewest_draws(epsilon: float, delta: float, spread: float, horizon: int) -> None:
    sized = WindowSample(spread=spread, horizon=horizon).budget_for(epsilon, delta, SPEC)
    assert isinstance(sized, WindowSample) and promised(sized, epsilon, delta)
    assert not promised(replace(sized, copies=sized.copies - 1), epsilon, delta)
    assert sized.groups == 1 or not promised(replace(sized, groups=sized.groups - 2), epsilon, delta)
    summary = parse(f"window+value_sample(spread={spread!r},horizon={horizon})@8").budget_for(epsilon, delta, SPEC)
    assert isinstance(summary, Bounded) and promised(summary, epsilon, delta)
    sizes: Any = summary.summary
    assert sizes.sizes(SPEC.dv) == (sized.copies, sized.groups)


@settings(max_examples=40, deadline=None)
@given(st.floats(1e-3, 0.9), st.floats(0.1, 3.0))
def test_taylors_degree_is_the_least_even_one(epsilon: float, radius: float) -> None:
    sized = parse(f"window+taylor(radius={radius!r})@8").budget_for(epsilon, 0.0, SPEC)
    degree = sized.summary.degree  # type: ignore[attr-defined]
    assert promised(sized, epsilon, 0.0) and degree % 2 == 0
    assert degree == 0 or not promised(parse(f"window+taylor(degree={degree - 2},radius={radius!r})@8"), epsilon, 0.0)


def test_an_exact_law_needs_no_size() -> None:
    for text in ("exact", "window+value_sum@8"):
        assert parse(text).budget_for(0.0, 0.0, SPEC) == parse(text)


@pytest.mark.parametrize(
    ("text", "epsilon", "delta", "said"),
    [
        ("h2o@64", 0.1, 0.1, "h2o@64 has no theorem"),
        ("subgen_sketch", 0.1, 0.1, "lacks what it assumes"),
        ("subgen_sketch(radius=1.0)", 1.5, 0.1, "no size of subgen_sketch.radius=1.0. promises epsilon = 1.5"),
        ("subgen_sketch(delta=400.0,radius=1.0)", 0.5, 0.1, "takes too many samples"),
        ("window_sample(spread=2.0,horizon=9)", 0.5, 0.0, "no theorem"),
        ("window+taylor(radius=40.0)@8", 0.1, 0.1, "no size of"),
        ("exact", -0.1, 0.1, "epsilon >= 0"),
        ("exact", 0.1, 1.0, "0 <= delta < 1"),
        ("exact", math.nan, 0.1, "epsilon >= 0"),
    ],
)
def test_what_cannot_be_promised_is_refused(text: str, epsilon: float, delta: float, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse(text).budget_for(epsilon, delta, SPEC)
