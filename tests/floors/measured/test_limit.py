"""A search that is stopped returns a valid floor, no more than an unstopped one, and more the later it stops."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvfloor.floors.measured import Demand, Limit, anytime, readable_within, readable_within_rows, shares
from tests.floors.measured import families, read_oracle

BOTH = pytest.mark.parametrize("others", ["absent", "present"])
LAW = {"eta": 0.05, "dv": 16}


class Ticks:
    """A clock that moves by one second whenever it is read, so that a stop hits one check after the other."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 1.0
        return self.now


def small_steps(monkeypatch):
    monkeypatch.setattr(anytime, "_SORTED_AT_ONCE", 24)
    monkeypatch.setattr(anytime.Present, "at_once", 5)
    monkeypatch.setattr(anytime.Alone, "at_once", 5)
    monkeypatch.setattr(anytime, "TOKENS_AT_ONCE", 7)


def valid(found, k, radius):
    short = found.groups == 0 or float(found.queries.double().norm(dim=1).max()) <= radius
    return short and read_oracle.holds(found, k) and read_oracle.survives(found, k)


@BOTH
@pytest.mark.parametrize("family", families.FAMILIES)
@pytest.mark.parametrize("later", [None, 1.0])
def test_stopped_after_any_number_of_tokens_a_floor_is_valid_and_grows(monkeypatch, family, others, later):
    small_steps(monkeypatch)
    k = families.keys(family, 24, 24)
    law = LAW | {"radius": 1.5, "others": others, "later_mass": later}
    full, before = readable_within(k, **law, limit=Limit()), 0.0
    for tokens in range(1, 25):
        found = readable_within(k, **law, limit=Limit(tokens=tokens))
        assert valid(found, k, 1.5) and before <= found.bits <= full.bits
        if tokens < 24:
            assert found.stopped == (tokens, 24) and str(found.stopped) == f"stopped after {tokens} of 24 tokens"
            assert found.as_dict()["stopped_after"] == tokens
        before = found.bits
    assert found.stopped is None and found.bits == full.bits and found.as_dict()["stopped_after"] is None


@BOTH
@pytest.mark.parametrize("family", families.FAMILIES)
def test_not_stopped_it_is_the_floor_without_a_limit(family, others):
    k = families.keys(family, 60, 32)
    law = LAW | {"radius": 2.0, "others": others}
    plain, full = readable_within(k, **law), readable_within(k, **law, limit=Limit(seconds=1e6, clock=Ticks()))
    assert full.stopped is None and full.bits == plain.bits
    for name in ("stream", "group", "queries", "asked", "weights", "leaks", "levels"):
        assert torch.equal(getattr(full, name), getattr(plain, name)), name


@BOTH
def test_stopped_at_any_check_of_the_clock_a_floor_is_valid_and_grows(monkeypatch, others):
    small_steps(monkeypatch)
    k = families.keys("gaussian", 30, 16)
    law = LAW | {"radius": 1.5, "others": others}
    plain, before, told = readable_within(k, **law), 0.0, []
    for seconds in itertools.count(1):
        found = readable_within(k, **law, limit=Limit(seconds=seconds - 0.5, clock=Ticks()))
        assert valid(found, k, 1.5) and before <= found.bits <= plain.bits
        before = found.bits
        if found.stopped is None:
            break
        told.append(found.stopped.weighed)
    assert found.bits == plain.bits and told == sorted(told) and told[0] == 0
    assert told.count(30) >= 3  # stopped in the longer search, too


@given(
    st.integers(0, 2**20), st.integers(1, 14), st.integers(1, 5), st.sampled_from([0.3, 2.0, 10.0, 100.0]),
    st.sampled_from([0.3, 0.03]), st.sampled_from([None, 3.0]), st.sampled_from([None, 1.0]),
    st.sampled_from(["absent", "present"]), st.integers(1, 14),
)  # fmt: skip
def test_the_law_holds_when_stopped(seed, n, d, radius, eta, softcap, later, others, tokens):
    k = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    law = {"radius": radius, "eta": eta, "dv": 16, "scale": 0.7, "softcap": softcap, "later_mass": later}
    found = readable_within(k, **law, others=others, limit=Limit(tokens=tokens))
    assert valid(found, k, radius) and found.stopped == (None if tokens >= n else (tokens, n))
    assert torch.equal(found.stream, torch.arange(n) if others == "present" else found.stream.unique())


def test_stopped_floors_stay_below_the_best_of_all_choices():
    for seed, d, radius in ((1, 2, 1.0), (2, 3, 2.0), (4, 2, 4.0)):
        k = torch.randn(4, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        (best,) = read_oracle.best_within_by_all_choices(k, radius, [Demand(0.03, 0.9, 64)])
        for tokens in (1, 2, 3):
            found = readable_within(k, radius=radius, eta=0.03, dv=64, limit=Limit(tokens=tokens))
            assert 0.0 < found.bits <= best * (1 + 1e-9)


@BOTH
def test_sums_in_float32_are_counted_at_the_most_that_rounding_hides(monkeypatch, others):
    monkeypatch.setattr(shares, "_WIDE_UP_TO", 0)
    monkeypatch.setattr(shares, "short_products", lambda device: False)
    small_steps(monkeypatch)
    k = torch.randn(300, 16, generator=torch.Generator().manual_seed(4))
    found = readable_within(k, radius=5.0, **LAW, others=others, limit=Limit(tokens=200))
    between = read_oracle.pairs(found, k)
    own, leak = between.diagonal(), between.triu(1).sum(1)
    assert found.groups > 50 and bool((found.weights <= own).all()) and bool((found.weights > 0.99 * own).all())
    assert bool((found.weights / (0.05 + found.leaks) <= own / (0.05 + leak)).all())
    assert bool(((found.levels - 1) * (0.05 + leak) < own).all())


@pytest.mark.parametrize("others", ["absent", "present"])
def test_a_search_that_counts_the_last_groups_twice_when_stopped_is_caught(monkeypatch, others):
    small_steps(monkeypatch)
    k = families.keys("gaussian", 40, 24)
    law = LAW | {"radius": 1.5, "others": others, "limit": Limit(tokens=20)}
    assert valid(readable_within(k, **law), k, 1.5)
    growing = anytime.Alone if others == "absent" else anytime.Present
    once = growing.grow

    def twice(self, tokens, q):
        once(self, tokens, q)
        if others == "present" and self._formed:
            self._formed.append(self._formed[-1])
            self._count += len(self._formed[-1][0])
        if others == "absent" and self._count:
            bits, *rest = self._best
            last = float(self._demand.bits(rest[1][-1:], rest[2][-1:]).sum())
            self._best = (bits + last, *rest)

    monkeypatch.setattr(growing, "grow", twice)
    assert not valid(readable_within(k, **law), k, 1.5)


def test_members_that_do_not_lose_weight_to_later_ones_are_caught(monkeypatch):
    """In a stream of the read keys alone, former members must be weighed again when others join."""
    small_steps(monkeypatch)
    k = families.keys("gaussian", 40, 24)
    law = LAW | {"radius": 1.5, "limit": Limit(tokens=30)}
    assert valid(readable_within(k, **law), k, 1.5)
    kept = anytime.Alone._keep_the_best

    def forgetful(self):
        self._before[: self._count] *= 0.5
        kept(self)

    monkeypatch.setattr(anytime.Alone, "_keep_the_best", forgetful)
    assert not valid(readable_within(k, **law), k, 1.5)


def test_each_row_has_its_own_limit(draw):
    k = draw(2, 20, 6)
    rows = readable_within_rows(k, radius=2.0, **LAW, limit=Limit(tokens=7))
    assert [row.stopped for row in rows] == [(7, 20), (7, 20)]
    assert rows[1].bits == readable_within(k[1], radius=2.0, **LAW, limit=Limit(tokens=7)).bits


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"seconds": 0.0}, "seconds must be a positive number, got 0.0"),
        ({"seconds": -1.0}, "seconds must be a positive number"),
        ({"tokens": 0}, "tokens must be"),
        ({"tokens": 1.5}, "tokens must be"),
    ],
)
def test_refusals_name_the_argument(given, message):
    with pytest.raises(ValueError, match=message):
        Limit(**given)
