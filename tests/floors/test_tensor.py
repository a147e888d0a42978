"""Tensor attention's floor: keys that are drawn or built, and a softmax over all pairs that is really decoded."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfloor import floors

ETA = 0.5


def rows_of_signs(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 2, (n, d), generator=torch.Generator().manual_seed(seed)).double() * 2 - 1


def pairs(k1: torch.Tensor, k2: torch.Tensor) -> torch.Tensor:
    """All products (n^2, d), pair (j1, j2) in row j1 n + j2."""
    return (k1.unsqueeze(1) * k2.unsqueeze(0)).flatten(0, 1)


def axes(n: int) -> torch.Tensor:
    """The pairs that four caches ask for: (i, 0) and (0, i), i > 0."""
    own = torch.arange(1, n)
    return torch.cat([own * n, own])


def gap_of(keys: torch.Tensor, asked: torch.Tensor) -> float:
    scores = keys[asked] @ keys.T / keys.shape[1]
    scores[torch.arange(len(asked)), asked] = -torch.inf
    return 1.0 - scores.max().item()


def with_zero_token(*caches: torch.Tensor) -> list[torch.Tensor]:
    return [torch.cat([cache, torch.zeros_like(cache[:1])]) for cache in caches]


# ---- keys ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "d", "caches"), [(16, 128, 4), (16, 128, 2), (50, 512, 4), (9, 40, 2)])
def test_union_bound_is_what_it_says_and_such_keys_are_drawn(n, d, caches):
    mu = floors.mu_tensor(n, d, caches=caches)
    asked, competitors = (2 * (n - 1), n**2 - 1) if caches == 4 else (n**2, (n**2 - 1) / 2)
    most = 2 * n**3 if caches == 4 else n**4 / 2
    assert asked * competitors < most
    assert most * math.exp(-d * mu**2 / 2) == pytest.approx(1.0)
    rows = axes(n) if caches == 4 else torch.arange(n**2)
    gaps = [gap_of(pairs(rows_of_signs(n, d, 2 * s), rows_of_signs(n, d, 2 * s + 1)), rows) for s in range(20)]
    assert max(gaps) >= 1 - mu
    assert sum(gap >= 1 - mu for gap in gaps) >= 10


def test_mutant_that_counts_pairs_of_tokens_only_is_exceeded():
    """n^2/2 pairs, as for standard keys, would promise an inner product that draws exceed again and again."""
    n, d = 50, 512
    standard = floors.mu_sphere(n, d)
    exceeded = [
        1 - gap_of(pairs(rows_of_signs(n, d, 2 * s), rows_of_signs(n, d, 2 * s + 1)), axes(n)) > standard
        for s in range(20)
    ]
    assert sum(exceeded) > 10


# ---- spikes --------------------------------------------------------------------------------------------------


@given(st.integers(1, 1000), st.floats(0.01, 2.0), st.floats(0.001, 0.9))
def test_the_leak_of_the_worst_competitors(n, g, eps_s):
    C = floors.tensor_C(n, g, eps_s)
    assert (n**2 - 1) * math.exp(-C * g) + (2 * n + 1) * math.exp(-C) <= eps_s * (1 + 1e-9)
    asking = floors.tensor_C(n, g, eps_s, append=False)
    assert (n**2 - 1) * math.exp(-asking * g) <= eps_s * (1 + 1e-9)
    assert asking <= C


def test_mutants_of_the_length_leak():
    n, eps_s = 20, 0.125
    for g in (1.0, 1.6):
        without_zero_pairs = math.log((n**2 - 1) / eps_s) / g
        slope_not_capped = math.log((n**2 + 2 * n) / eps_s) / g
        lengths = (without_zero_pairs,) if g == 1.0 else (without_zero_pairs, slope_not_capped)
        for C in lengths:
            assert (n**2 - 1) * math.exp(-C * g) + (2 * n + 1) * math.exp(-C) > eps_s


def decoded(queries: torch.Tensor, k1, k2, v1, v2) -> torch.Tensor:
    weights = torch.softmax(queries @ pairs(k1, k2).T, dim=1)
    answers = weights @ pairs(v1, v2)
    return (answers > floors.tau(ETA, floors.eps_s(ETA))).double(), weights


@pytest.mark.parametrize("append", [True, False])
def test_all_hidden_rows_of_four_sign_caches_are_read(append):
    n, d, dv = 24, 96, 7
    k1, k2 = rows_of_signs(n, d, 0), rows_of_signs(n, d, 1)
    v1, v2 = (rows_of_signs(n, dv, seed) > 0 for seed in (2, 3))
    v1[0] = v2[0] = True
    gap = gap_of(pairs(k1, k2), axes(n))
    C = floors.tensor_C(n, gap, floors.eps_s(ETA), append=append)
    queries = C / d * pairs(k1, k2)[axes(n)]
    caches = [k1, k2, v1.double(), v2.double()]
    bits, weights = decoded(queries, *(with_zero_token(*caches) if append else caches))
    assert torch.equal(bits, torch.cat([v1[1:], v2[1:]]).double())
    assert len(bits) == floors.tensor_rows(n, d)
    assert 1 - weights.max(dim=1).values.min() <= floors.eps_s(ETA)


@pytest.mark.parametrize("caches", [4, 2])
@pytest.mark.parametrize(("n", "d"), [(7, 4), (12, 5), (12, 6)])
def test_low_dimensions_split_the_keys(n, d, caches):
    """K1 = (a, 1), K2 = (1, b) on two circles: the product is (a, b), and Bob's zero token is in the stream."""
    angle = 2 * math.pi * torch.arange(n, dtype=torch.float64) / n
    circle = torch.stack([angle.cos(), angle.sin()], dim=1)
    one, rest = torch.ones_like(circle), torch.zeros(n, d - 4, dtype=torch.float64)
    k1, k2 = torch.cat([circle, one, rest], dim=1), torch.cat([one, circle, rest], dim=1)
    constants = floors.tensor_space(n, d, caches=caches, eta=ETA, values="binary").constants
    assert constants["keys"].startswith("halves")
    if d < 6:
        assert constants["gap"] == pytest.approx(floors.gap_circle(n))
    C = math.log(n / (math.sqrt(1 + floors.eps_s(ETA)) - 1)) / floors.gap_circle(n)
    asked = axes(n) if caches == 4 else torch.arange(n**2)
    assert len(asked) == constants["rows"] == floors.tensor_rows(n, d, caches=caches)
    keys = torch.cat([pairs(k1, k2), torch.zeros(2 * n + 1, d, dtype=torch.float64)])
    weights = torch.softmax(C * keys[asked] @ keys.T, dim=1)
    off = 1 - weights[torch.arange(len(asked)), asked]
    assert (off / (1 - off)).max() <= floors.eps_s(ETA)


def test_with_one_plane_there_is_no_room_for_both_caches():
    """d = 2 or 3: K2 = V2 = 1 leaves standard attention; d = 1 its two ends."""
    assert [floors.tensor_rows(50, d) for d in (1, 2, 3, 4)] == [2, 50, 50, 98]
    assert [floors.tensor_rows(50, d, caches=2) for d in (1, 2, 3, 4)] == [2, 50, 50, 2500]
    assert [floors.tensor_rows(n, 64) for n in (1, 2, 3)] == [1, 2, 4]


def test_both_caches_within_a_radius_by_hand():
    """d = 64: each half has 64 axes ±e_i of gap 1, of which (sqrt(1.125) - 1) e^(r/2) are separated.

    r = 13.4: 0.06066 e^6.7 = 49.3, so 2 x 48 rows; r = 13.5: 51.8 > n = 50, so 2 x 49; r = 10: 9, and K2 = V2 = 1 is
    better with all 50. A mutant with the whole radius, or the whole ratio 0.125, for each half takes 98 at r = 13.4.
    """
    rows = [floors.tensor_space(50, 64, radius=r).constants["rows"] for r in (13.4, 13.5, 10.0)]
    assert rows == [96, 98, 50]
    assert floors.tensor_space(50, 64, caches=2, radius=13.4).constants["rows"] == 49**2
    n, C = 49, 6.7
    halves = torch.eye(32, dtype=torch.float64)
    halves = torch.cat([halves, -halves])[:n]
    one = torch.ones_like(halves)
    k1, k2 = torch.cat([halves, one], dim=1), torch.cat([one, halves], dim=1)
    keys = torch.cat([pairs(k1, k2), torch.zeros(2 * n + 1, 64, dtype=torch.float64)])
    scores = C * keys[: n**2] @ keys.T
    assert scores.max() == pytest.approx(13.4)
    on_spike = torch.softmax(scores, dim=1).diagonal()
    assert ((1 - on_spike) / on_spike).max() <= 0.125


def test_keys_within_a_radius_separate():
    n, d, radius = 10**4, 64, 14.0
    half = floors.separable_keys(d // 2, radius / 2, math.sqrt(1.125) - 1)
    rows = floors.tensor_space(n, d, radius=radius).constants["rows"]
    assert rows == max(floors.separable_keys(d, radius, 0.125), 2 * (half - 1))
    m, C = int(half), radius / 2
    gap = math.log(m / (math.sqrt(1.125) - 1)) / C
    one_half = (m - 1) * math.exp(-C * gap)
    assert (1 + one_half) ** 2 - 1 + (2 * m + 1) * math.exp(-2 * C) <= 0.125


# ---- the floor -----------------------------------------------------------------------------------------------


def test_space_by_hand():
    row = 0.9 * 64 - floors.H2(0.9)
    four = floors.tensor_space(1000, 64, values="binary")
    assert four.bits == pytest.approx(1998 * row)
    assert four.upper_bits == 2 * 1000 * 64
    assert four.constants["gap"] == pytest.approx(1 - math.sqrt((6 * math.log(1000) + 2 * math.log(2)) / 64))
    assert four.constants["C"] == pytest.approx(math.log(1_002_000 / 0.125) / four.constants["gap"])
    assert four.regime == "tensor, four caches"
    assert {m.name: m.bits for m in four.possible}["four caches, fp16"] == 1000 * 4 * 64 * 16
    two = floors.tensor_space(100, 64, 32, caches=2, heads=3, layers=2, values="binary")
    assert two.bits == pytest.approx(6 * 100**2 * (0.9 * 32 - floors.H2(0.9)))
    assert two.upper_bits == 6 * 100**2 * 32
    assert {m.name: m.bits for m in two.possible}["key factors and pair values, fp32"] == 6 * 32 * (
        200 * 64 + 10**4 * 32
    )


def test_values_of_a_format_hide_as_many_levels_as_answers_tell_apart():
    """Pairs multiply two values, so the leak must be smaller by the largest value, 65,504."""
    one, fine = floors.tensor_space(1000, 64), floors.tensor_space(1000, 64, eta=0.1)
    assert one.bits == pytest.approx(1998 * (0.9 * 64 * math.log2(26) - floors.H2(0.9)))
    assert fine.bits == pytest.approx(1998 * (0.9 * 64 * math.log2(133) - floors.H2(0.9)))
    assert one.constants["eps_s"] == pytest.approx(floors.levels_leak(0.5) / 65_504)
    bounded = floors.tensor_space(1000, 64, radius=20.0)
    assert bounded.bits == floors.tensor_space(1000, 64, radius=20.0, values="binary").bits


@settings(deadline=None)
@given(
    st.integers(1, 3000), st.integers(1, 200), st.integers(1, 100), st.floats(0.0, 0.99), st.floats(0.01, 1.0),
    st.none() | st.floats(0.01, 100.0), st.sampled_from([4, 2]), st.integers(1, 100), st.floats(1.0, 3.0),
)  # fmt: skip
def test_monotone_in_every_argument_and_below_what_suffices(n, d, dv, eta, p, radius, caches, more, factor):
    def bits(**changed):
        given_arguments = {"n": n, "d": d, "dv": dv, "eta": eta, "p": p, "radius": radius, "caches": caches}
        return floors.tensor_space(**(given_arguments | changed)).bits

    here, slack = bits(), 1 + 1e-9
    for changed in ({"n": n + more}, {"d": d + more}, {"dv": dv + more}, {"eta": 0.0}, {"p": 1.0}, {"radius": None},
                    {"heads": 2}, {"layers": 2}):  # fmt: skip
        assert bits(**changed) * slack >= here
    if radius is not None:
        assert bits(radius=radius * factor) * slack >= here
    floor = floors.tensor_space(n, d, dv, eta=eta, p=p, radius=radius, caches=caches)
    assert 0.0 <= floor.bits <= floor.upper_bits * slack
    assert floor.bits <= min(memory.bits for memory in floor.possible) * slack
