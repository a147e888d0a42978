"""The floor of all queries in a ball: legal queries, the law, all choices on a few tokens, known families."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvfloor.floors.measured import Demand, directions, readable_within, readable_within_rows, spread
from tests.floors.measured import families, read_oracle

BOTH = pytest.mark.parametrize("others", ["absent", "present"])


def legal(found, radius: float) -> bool:
    return found.groups == 0 or float(found.queries.double().norm(dim=1).max()) <= radius


@BOTH
def test_orthogonal_keys_are_all_read_once_the_radius_allows(others):
    k = families.keys("orthogonal", 16, 16)  # norm 4
    found = readable_within(k, radius=5.0, eta=0.1, dv=16, others=others)
    assert found.groups == 16 and set(found.levels.tolist()) == {10} and legal(found, 5.0)
    assert readable_within(k, radius=1e-3, eta=0.1, dv=16, others=others).groups < 16


@BOTH
def test_equal_keys_are_one_group(others):
    found = readable_within(families.keys("equal", 30, 8), radius=9.0, eta=0.1, dv=16, others=others)
    assert found.groups == 1 and found.levels.tolist() == [10]
    assert found.n == (1 if others == "absent" else 30)


@BOTH
def test_one_token(others, draw):
    found = readable_within(draw(1, 4), radius=1.0, eta=0.1, dv=16, others=others)
    assert (found.n, found.groups, found.levels.tolist()) == (1, 1, [10])
    beside = readable_within(draw(1, 4), radius=4.0, eta=0.1, dv=16, others=others, later_mass=0.0)
    assert beside.groups == 1 and float(beside.weights[0]) > 0.9  # a query along the key outweighs a token of logit 0


def test_near_duplicates_count_once_in_either_stream():
    k = families.keys("clusters", 60, 48)
    absent = readable_within(k, radius=6.0, eta=0.1, dv=16)
    present = readable_within(k, radius=6.0, eta=0.1, dv=16, others="present")
    clusters = torch.arange(60) // 4
    assert absent.n == absent.groups == 15 and len(clusters[absent.stream].unique()) == 15
    assert present.n == 60 and present.groups == 15
    assert all(len(present.group[clusters == c].unique()) == 1 for c in range(15))


@given(
    st.integers(0, 2**20), st.integers(1, 14), st.integers(1, 5), st.sampled_from([0.3, 2.0, 10.0, 100.0]),
    st.sampled_from([0.3, 0.03]), st.sampled_from([None, 3.0]), st.sampled_from([None, 1.0]),
    st.sampled_from(["absent", "present"]),
)  # fmt: skip
def test_the_law_holds_for_legal_queries(seed, n, d, radius, eta, softcap, later, others):
    k = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = readable_within(
        k, radius=radius, eta=eta, dv=16, scale=0.7, softcap=softcap, later_mass=later, others=others
    )
    assert legal(found, radius)
    assert read_oracle.holds(found, k) and read_oracle.survives(found, k)
    assert torch.equal(found.stream, torch.arange(n) if others == "present" else found.stream.unique())
    if others == "absent":
        assert found.n == found.groups and torch.equal(found.asked.sort().values, found.stream)


def test_the_search_comes_close_to_all_choices():
    shares, demands = [], [Demand(eta, 0.9, 64) for eta in (0.2, 0.03)]
    for seed, d, radius in ((1, 2, 1.0), (2, 3, 2.0), (3, 8, 1.0), (4, 2, 4.0), (5, 3, 8.0)):
        k = torch.randn(4, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        best = read_oracle.best_within_by_all_choices(k, radius, demands)
        found = [readable_within(k, radius=radius, eta=demand.eta, dv=64).bits for demand in demands]
        shares += [bits / most for bits, most in zip(found, best, strict=True)]
    assert sum(shares) / len(shares) > 0.96 and min(shares) > 0.88


@BOTH
@pytest.mark.parametrize("family", families.FAMILIES)
@pytest.mark.parametrize("mutant", [None, families.ignores_the_leak, families.counts_a_level_too_many])
def test_families_survive_and_mutants_do_not(family, others, mutant):
    k = families.keys(family, 32, 32)
    found = readable_within(k, radius=2.0 if family == "gaussian" else 1.2, eta=0.02, dv=8, others=others)
    assert found.groups > 0 and read_oracle.holds(found, k) and read_oracle.survives(found, k)
    if mutant is not None and (found.groups > 1 or mutant is families.counts_a_level_too_many):
        assert not read_oracle.survives(mutant(found), k)


def test_directions_reach_the_largest_weight():
    """The log weight is concave in the query: many steps of plain gradient ascent find nothing better."""
    k = torch.randn(60, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    q = directions.towards_each(k.float(), 3.0, 1.0, None)
    reached = torch.softmax(q.double() @ k.T, 1).diagonal()
    best = read_oracle.largest_weights(k, 3.0, steps=1000).diagonal()
    assert bool((reached > 0.95 * best).all()) and bool((reached < 1.001 * best).all())


def test_without_refinement_skewed_keys_are_read_worse(monkeypatch):
    """Keys with one long axis: the straight direction away from the mean is not the one that tells them apart."""
    generator = torch.Generator().manual_seed(3)
    k = torch.randn(200, 16, generator=generator) * torch.logspace(1.0, -0.5, 16)
    refined = readable_within(k, radius=6.0, eta=0.05, dv=16, others="present").bits
    monkeypatch.setattr(directions, "_STEPS", 0)
    monkeypatch.setattr(directions.Ball, "_longest", lambda self, aim: self._stretched(aim))
    assert readable_within(k, radius=6.0, eta=0.05, dv=16, others="present").bits < 0.9 * refined


@BOTH
def test_long_streams_take_the_sampled_path_and_hold(monkeypatch, others):
    for module in (directions, spread):
        monkeypatch.setattr(module, "FEW", 64)
    monkeypatch.setattr(directions, "SAMPLE", 50)
    k = torch.randn(500, 16, generator=torch.Generator().manual_seed(4))
    found = readable_within(k, radius=5.0, eta=0.05, dv=16, others=others)
    assert found.groups > 50 and read_oracle.holds(found, k) and legal(found, 5.0)


def test_near_duplicates_that_a_sample_misses_are_found_pair_by_pair(monkeypatch):
    for module in (directions, spread):
        monkeypatch.setattr(module, "FEW", 64)
    monkeypatch.setattr(directions, "SAMPLE", 50)
    k = torch.randn(250, 32, generator=torch.Generator().manual_seed(5)).repeat(2, 1)
    found = readable_within(k, radius=8.0, eta=0.05, dv=16)
    assert found.groups > 240 and len((found.stream % 250).unique()) == found.groups
    assert read_oracle.holds(found, k)


@pytest.mark.slow
@pytest.mark.parametrize("radius", [6.0, 14.0])
def test_long_streams_hold_in_bfloat16(radius):
    """8,192 keys of width 80: weights are bounded from bfloat16 products, and checked in float64 on some queries."""
    k = torch.randn(8192, 80, generator=torch.Generator().manual_seed(6))
    for others in ("absent", "present"):
        found = readable_within(k, radius=radius, scale=80**-0.5, eta=0.05, dv=80, others=others)
        some = torch.arange(0, found.groups, max(1, found.groups // 100))
        seen = read_oracle.weights(found.queries[some], k[found.stream], found.scale)
        for weights, g in zip(seen, some.tolist(), strict=True):
            own, leak = float(weights[found.group == g].sum()), float(weights[found.group > g].sum())
            assert 0.7 * own <= float(found.weights[g]) <= own and leak <= 1.2 * float(found.leaks[g])
            assert (int(found.levels[g]) - 1) * (0.05 + leak) < own
        assert found.groups > 5 and legal(found, radius)


def test_rows_have_their_own_radius_and_real_tokens(draw):
    k = draw(2, 20, 6)
    present = torch.rand(2, 20) > 0.3
    rows = readable_within_rows(k, radius=torch.tensor([0.5, 4.0]), present=present, eta=0.05, dv=8)
    for row, radius in enumerate((0.5, 4.0)):
        tokens = present[row].nonzero()[:, 0]
        alone = readable_within(k[row, tokens], radius=radius, eta=0.05, dv=8)
        assert rows[row].bits == alone.bits
        assert torch.equal(rows[row].stream, tokens[alone.stream]) and read_oracle.holds(rows[row], k[row])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"radius": 0.0}, r"radius must be a positive number, got 0.0"),
        ({"radius": math.nan}, "radius must be a positive number"),
        ({"others": "gone"}, "others must be one of absent, present, got 'gone'"),
        ({"k": torch.ones(0, 4)}, "k must have shape"),
        ({"later_mass": math.inf}, "later_mass must be finite or -inf"),
    ],
)
def test_refusals_name_the_argument(changed, message):
    with pytest.raises(ValueError, match=message):
        readable_within(**({"k": torch.ones(3, 4), "radius": 1.0, "eta": 0.1, "dv": 4} | changed))
