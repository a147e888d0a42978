"""The covering ceiling: the literal greedy rule, SubGen's own clusters, and what they cost by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvfloor import floors
from kvfloor.floors.measured import covering, covering_curve, covering_number, greedy_cover
from tests.support import filled


def greedy(k, delta):
    """The rule, token by token."""
    centres = []
    for i, key in enumerate(k):
        if all(float(torch.dist(key, k[c])) > delta for c in centres):
            centres.append(i)
    return centres


@given(
    st.integers(0, 2**20), st.integers(1, 80), st.integers(1, 3), st.sampled_from([0.3, 1.0, 2.5]), st.integers(1, 9)
)
def test_equals_the_literal_rule_for_every_block(seed, n, d, delta, block):
    k = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(covering, "_TOKENS_AT_ONCE", block)
        assert greedy_cover(k, delta).tolist() == greedy(k, delta)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_key_at_exactly_delta_joins(dtype):
    """Whole-number keys far from 0: distances are exact, the products that sort pairs out are not."""
    generator = torch.Generator().manual_seed(1)
    k = (torch.randint(0, 7, (250, 3), generator=generator) + 1000).to(dtype)
    for delta in (1.0, 2.0, 3.0):
        assert greedy_cover(k, delta).tolist() == greedy(k.double(), delta)
        strict = greedy(k.double(), delta * (1 - 1e-6))
        assert len(strict) > len(greedy_cover(k, delta))  # the mutant that opens a centre at equal distance


def test_within_a_block_earlier_tokens_count(monkeypatch):
    k = torch.zeros(20, 2)
    assert greedy_cover(k, 0.5).tolist() == [0]
    monkeypatch.setattr(covering, "_first_come", lambda k, delta: torch.ones(len(k), dtype=torch.bool))
    assert len(greedy_cover(k, 0.5)) == 20


@pytest.mark.parametrize(("dtype", "delta"), [(torch.float64, 3.0), (torch.float32, 3.0), (torch.float32, 4.0)])
def test_is_the_number_of_clusters_that_subgen_opens(dtype, delta):
    generator = torch.Generator().manual_seed(2)
    k = torch.randn(2, 320, 12, generator=generator).to(dtype) + 3.0
    state = filled(f"subgen_sketch(delta={delta},block=64,s=1,t=1)", k)
    assert covering_number(k, delta).tolist() == state.clusters.tolist()
    assert 5 < int(state.clusters.min()) < 300


def test_repeated_keys_open_no_centre(draw):
    k = draw(50, 4)
    assert greedy_cover(torch.cat([k, k]), 0.7).tolist() == greedy_cover(k, 0.7).tolist()


def test_centres_are_apart_and_cover(draw):
    k = draw(400, 3)
    centres = k[greedy_cover(k, 0.8)]
    apart = torch.cdist(centres, centres).fill_diagonal_(math.inf)
    assert float(apart.min()) > 0.8 and float(torch.cdist(k, centres).amin(1).max()) <= 0.8


def test_the_curve_is_what_subgen_holds(draw):
    k = draw(2, 60, 4)
    rows = covering_curve(k, (0.5, 2.0), dv=8, epsilon=0.5, radius=0.3, failure=0.2)
    assert [[point.delta for point in row] for row in rows] == [[0.5, 2.0]] * 2
    for row, keys in zip(rows, k, strict=True):
        for point in row:
            assert point.centres == len(greedy(keys, point.delta))
            assert point.s == math.ceil(9 * 8 / (0.25 * 0.1))
            ratio = math.exp(2 * point.delta * 0.3)
            chebyshev = 9 * (ratio - 1) ** 2 / (4 * ratio * 0.25 * 0.1)
            chernoff = 27 * ratio * math.log(2 * point.centres / 0.1) / 0.25
            assert point.t == max(1, math.ceil(min(chebyshev, chernoff)))
            assert point.numbers == floors.subgen_numbers(4, 8, point.s, point.t, point.centres)
            assert point.vacuous == (point.s >= 60 or point.t >= 60 or point.numbers >= 60 * 12)


def test_a_radius_beyond_floats_is_vacuous(draw):
    point = covering_curve(draw(1, 10, 2), (5.0,), dv=2, epsilon=0.5, radius=1e4)[0][0]
    assert point.vacuous and point.numbers == 10 * 4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda k: greedy_cover(k, 0.0), r"delta must be a positive number, got 0.0"),
        (lambda k: greedy_cover(k[0], 1.0), "k must have shape"),
        (lambda k: covering_number(k, 1.0), r"k must be a tensor \(rows, n, d\)"),
        (lambda k: covering_curve(k[None], (1.0,), dv=0, epsilon=0.5, radius=1.0), "dv must be a whole number"),
        (lambda k: covering_curve(k[None], (1.0,), dv=2, epsilon=1.5, radius=1.0), "epsilon must lie in"),
    ],
)
def test_refusals_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(5, 2))
