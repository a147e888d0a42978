"""The floor of given queries: against the law written down anew, the worst answers, all choices, and mutants."""

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvfloor import floors
from kvfloor.floors.measured import Demand, readable, readable_by, readable_by_rows
from kvfloor.floors.measured.improve import Choice
from tests.floors.measured import families, read_oracle

ROW = 0.9 * 16 * math.log2(10) - floors.H2(0.9)  # bits of a group read at ten levels, dv = 16


def spikes(k, length=30.0):
    """One query per key that sees little else."""
    return length * k / k.square().sum(1, keepdim=True)


def test_orthogonal_keys_are_read_one_by_one():
    k = families.keys("orthogonal", 12, 16)
    found = readable_by(k, spikes(k), eta=0.1, dv=16)
    assert found.groups == 12 and found.levels.tolist() == [10] * 12
    assert found.bits == pytest.approx(12 * ROW)
    assert found.bytes == math.ceil(12 * ROW / 8)
    assert sorted(found.asked.tolist()) == list(range(12)) and found.n == 12
    for g in range(12):
        assert found.group[found.asked[g]] == g


def test_equal_keys_are_one_group_whatever_is_asked(draw):
    k = families.keys("equal", 20, 8)
    found = readable_by(k, draw(6, 8), eta=0.1, dv=16)
    assert found.groups == 1 and bool((found.group == 0).all())
    assert found.bits == pytest.approx(ROW)


def test_one_token_is_one_group(draw):
    found = readable_by(draw(1, 8), draw(3, 8), eta=0.1, dv=16)
    assert (found.groups, found.levels.tolist()) == (1, [10])


def test_near_duplicates_count_once():
    k = families.keys("clusters", 40, 32)
    found = readable_by(k, spikes(k), eta=0.1, dv=16)
    clusters = torch.arange(40) // 4
    assert found.groups == 10
    assert all(len(found.group[clusters == c].unique()) == 1 for c in range(10))


def test_what_queries_cannot_tell_from_their_own_tokens_is_not_read():
    k = families.keys("orthogonal", 4, 16)
    q = spikes(k)
    alone, beside = (readable_by(k, q, eta=0.1, dv=16, later_mass=mass) for mass in (None, 30.0))
    assert alone.groups == 4 and beside.groups == 4
    assert set(beside.levels.tolist()) == {5}  # half of the weight: 4 * 0.1 < 0.5 and 5 * 0.1 is not
    assert readable_by(k, q, eta=0.1, dv=16, later_mass=40.0).bits == 0.0


def test_two_queries_by_hand():
    """Logits ln 3 and 0 against 0 and ln 3: weights 3/4 and 1/4. The first is decoded beside a leak of 1/4, the second
    with the first known."""
    k, q = torch.eye(2, dtype=torch.float64), math.log(3.0) * torch.eye(2, dtype=torch.float64)
    found = readable_by(k, q, eta=0.1, dv=16, dtype=torch.float64)
    assert found.weights.tolist() == pytest.approx([0.75, 0.75])
    assert found.leaks.tolist() == pytest.approx([0.25, 0.0])
    assert found.levels.tolist() == [3, 8]  # 2 * 0.35 < 0.75 < 3 * 0.35 and 7 * 0.1 < 0.75 < 8 * 0.1
    assert found.bits == pytest.approx(0.9 * 16 * math.log2(24) - 2 * floors.H2(0.9))


def test_tokens_that_only_disturb_get_no_value():
    """A sink takes a third of every query's weight; without a value of its own it leaks nothing."""
    k = torch.eye(4, dtype=torch.float64)
    q = torch.cat([8.0 * torch.eye(3, dtype=torch.float64), torch.full((3, 1), 7.3, dtype=torch.float64)], 1)
    found = readable_by(k, q, eta=0.05, dv=16)
    assert found.groups == 3 and found.group[:3].tolist() != [-1, -1, -1]
    assert read_oracle.survives(found, k)
    assert float(found.leaks.max()) < 0.4


def instance(seed: int, n: int, m: int, temperature: float):
    generator = torch.Generator().manual_seed(seed)
    k = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return k, temperature * torch.randn(m, 4, generator=generator, dtype=torch.float64)


@given(
    st.integers(0, 2**20), st.integers(1, 14), st.integers(1, 9), st.sampled_from([0.1, 1.0, 4.0]),
    st.sampled_from([0.3, 0.05, 0.0]), st.sampled_from([None, 2.0]), st.booleans(),
)  # fmt: skip
def test_the_law_holds_and_levels_survive_the_worst_answers(seed, n, m, temperature, eta, softcap, later):
    k, q = instance(seed, n, m, temperature)
    mass = torch.logsumexp(q @ k.T, 1) if later else None
    found = readable_by(k, q, eta=eta, dv=16, softcap=softcap, later_mass=mass, most_levels=1000)
    assert read_oracle.holds(found, k) and read_oracle.survives(found, k)
    assert found.groups <= min(n, m)
    assert found.bits <= found.groups * found.demand.ceiling + 1e-9
    assert torch.equal(q[found.asked], found.queries)


@given(st.integers(0, 2**20), st.integers(1, 12), st.integers(1, 6))
def test_any_choice_whatever_the_search_makes_of_it_is_valid(seed, n, m):
    """The search replaced by dice: the floor may be small, it still holds."""
    generator = torch.Generator().manual_seed(seed)

    def dice(sight, demand):
        order = torch.randperm(m, generator=generator)[: int(torch.randint(0, m + 1, (1,), generator=generator))]
        reader = torch.cat([order, torch.tensor([-1])])
        return Choice(order, reader[torch.randint(0, len(reader), (n,), generator=generator)])

    k, q = instance(seed, n, m, 2.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readable, "find_groups", dice)
        found = readable_by(k, q, eta=0.05, dv=16)
    assert read_oracle.holds(found, k) and read_oracle.survives(found, k)


@pytest.mark.parametrize("eta", [0.2, 0.05, 0.01])
def test_the_search_comes_close_to_all_choices(eta):
    shares = []
    for seed, (n, m), temperature in (
        (1, (5, 3), 0.5), (2, (5, 3), 1.0), (3, (5, 3), 4.0), (4, (4, 4), 0.5), (5, (4, 4), 1.0), (6, (4, 4), 2.0),
    ):  # fmt: skip
        k, q = instance(seed, n, m, temperature)
        demand = Demand(eta, 0.9, 64)
        best = read_oracle.best_by_all_choices(read_oracle.weights(q, k), demand)
        found = readable_by(k, q, eta=eta, dv=64)
        assert found.bits <= best * (1 + 1e-9)
        shares.append(found.bits / best if best else 1.0)
    assert sum(shares) / len(shares) > 0.95 and min(shares) > 0.75


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family_holds_and_survives(family):
    k = families.keys(family, 24, 24)
    found = readable_by(k, spikes(k, 6.0), eta=0.07, dv=8)
    assert found.groups > 0
    assert read_oracle.holds(found, k) and read_oracle.survives(found, k)


@pytest.mark.parametrize("mutant", families.MUTANTS, ids=lambda mutant: mutant.__name__)
def test_mutants_do_not_survive(mutant):
    k = families.keys("gaussian", 24, 8)
    q = spikes(k, 3.0)
    found = readable_by(k, q, eta=0.05, dv=8, later_mass=torch.logsumexp(q @ k.T, 1))
    assert found.groups > 3 and float(found.leaks.max()) > 0.02
    assert read_oracle.survives(found, k)
    assert not read_oracle.survives(mutant(found), k)
    assert not read_oracle.holds(mutant(found), k)


def test_repeating_all_keys_changes_no_weight_and_shifting_them_none_either(draw):
    k, q = instance(11, 12, 6, 1.5)
    found = readable_by(k, q, eta=0.05, dv=16)
    shifted = readable_by(k + draw(1, 4), q, eta=0.05, dv=16)
    assert shifted.bits == pytest.approx(found.bits)
    repeated = dataclasses.replace(found, stream=torch.arange(36), group=found.group.repeat(3))
    assert read_oracle.survives(repeated, k.repeat(3, 1))
    torch.testing.assert_close(read_oracle.pairs(repeated, k.repeat(3, 1)), read_oracle.pairs(found, k))


def test_the_scale_multiplies_the_queries():
    k, q = instance(12, 20, 8, 2.0)
    assert readable_by(k, q, eta=0.05, dv=16, scale=0.25).bits == readable_by(k, 0.25 * q, eta=0.05, dv=16).bits


@pytest.mark.parametrize(("n", "m"), [(300, 300), (1200, 300), (200, 1)])
def test_larger_sizes_take_the_other_paths_and_hold(n, m, draw):
    k = draw(n, 16, dtype=torch.float32)
    q = 6.0 * k[:m] + draw(m, 16, dtype=torch.float32) if m <= n else draw(m, 16, dtype=torch.float32)
    found = readable_by(k, q, eta=0.1, dv=16, scale=0.25)
    assert found.groups > 0 and read_oracle.holds(found, k)


def test_rows_are_read_each_for_itself_over_their_real_tokens(draw):
    k, q, later = draw(3, 30, 8), draw(3, 10, 8, scale=2.0), draw(3, 10)
    present, asked = torch.rand(3, 30) > 0.3, torch.rand(3, 10) > 0.3
    rows = readable_by_rows(k, q, present=present, asked=asked, later_mass=later, eta=0.05, dv=8)
    for row, found in enumerate(rows):
        tokens, queries = present[row].nonzero()[:, 0], asked[row].nonzero()[:, 0]
        alone = readable_by(k[row, tokens], q[row, queries], later_mass=later[row, queries], eta=0.05, dv=8)
        assert found.bits == alone.bits and torch.equal(found.stream, tokens)
        assert torch.equal(q[row, found.asked], found.queries)
        assert read_oracle.holds(found, k[row])


def test_what_it_says_is_plain_json(draw):
    said = readable_by(draw(9, 4), draw(4, 4), eta=0.05, dv=8).as_dict()
    assert json.loads(json.dumps(said, allow_nan=False))["n"] == 9
    nothing = readable_by(draw(9, 4), draw(4, 4), eta=0.05, dv=8, later_mass=50.0)
    assert (nothing.bits, nothing.groups, nothing.bytes) == (0.0, 0, 0)
    json.dumps(nothing.as_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"k": torch.ones(3)}, r"k must have shape \(n, d\) with at least 1 rows, got \(3,\)"),
        ({"k": [1.0]}, r"k must be a floating-point tensor \(n, d\), got list"),
        ({"k": torch.ones(3, 4, dtype=torch.int64)}, "k must be a floating-point tensor"),
        ({"k": torch.full((3, 4), math.nan)}, "k must be finite"),
        ({"q": torch.ones(2, 5)}, r"q must have shape \(n, 4\)"),
        ({"q": torch.ones(0, 4)}, "q must have shape"),
        ({"eta": 1.5}, r"eta must lie in \[0, 1\), got 1.5"),
        ({"p": 0.0}, r"p must lie in \(0, 1\]"),
        ({"dv": 0}, "dv must be a whole number"),
        ({"scale": math.inf}, "scale must be a finite number, got inf"),
        ({"softcap": 0.0}, "softcap must be None or a positive number, got 0.0"),
        ({"later_mass": torch.ones(3)}, r"later_mass must be one number or have shape \(2,\), got \(3,\)"),
        ({"later_mass": math.nan}, "later_mass must be finite or -inf"),
    ],
)
def test_refusals_name_the_argument(changed, message):
    with pytest.raises(ValueError, match=message):
        readable_by(**({"k": torch.ones(3, 4), "q": torch.ones(2, 4), "eta": 0.1, "dv": 4} | changed))
