"""What is possible: sizes by hand, the running sum against its law, and vacuous methods told as such."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfloor import floors


def named(floor: floors.Floor) -> dict[str, floors.Possible]:
    return {memory.name.split(",")[0].split("(")[0]: memory for memory in floor.possible}


def test_exact_bytes_by_hand():
    assert floors.exact_bytes(1024, 64, 32) == 1024 * 96 * 2
    assert floors.exact_bytes(1024, 64, 32, "bf16") == 1024 * 96 * 2
    assert floors.exact_bytes(1024, 64, 32, "fp32") == 1024 * 96 * 4
    assert floors.exact_bytes(0, 64, 32) == 0
    floor = floors.space(1024, 64, 32, heads=8, layers=4, values="binary")
    assert [memory.name for memory in floor.possible] == ["public keys", "exact, fp16", "exact, bf16", "exact, fp32"]
    assert named(floor)["public keys"].bits == floor.upper_bits == 32 * 1024 * 32
    assert {m.name: m.bits for m in floor.possible}["exact, bf16"] == 32 * 1024 * 96 * 16
    fine = floors.space(1024, 1, 32, eta=0.0, values="fp32")
    assert [memory.name for memory in fine.possible if memory.name.startswith("exact")] == ["exact, fp32"]


def test_running_sum_is_exact_with_the_numbers_that_it_counts():
    W, d, dv, n = 5, 3, 2, 23
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(n, width, generator=generator, dtype=torch.float64) for width in (d, dv))
    q = torch.randn(d, generator=generator, dtype=torch.float64)
    held_k, held_v, total, count = k[-W:], v[-W:], v[:-W].sum(dim=0), n - W
    assert held_k.numel() + held_v.numel() + total.numel() + 1 == floors.running_sum_numbers(W, d, dv)
    mass = torch.exp(held_k @ q)
    answer = (total + mass @ held_v) / (count + mass.sum())
    scores = k @ q
    scores[:-W] = 0.0
    exact = torch.softmax(scores, dim=0) @ v
    assert torch.allclose(answer, exact, atol=1e-12)
    without_count = (total + mass @ held_v) / mass.sum()  # the mutant that keeps one number less
    assert not torch.allclose(without_count, exact, atol=1e-3)


def test_a_window_offers_both_laws():
    sliding = floors.space(1000, 8, 4, attention="window", window=100)
    assert named(sliding)["window and running sum"].bits == (100 * 12 + 4 + 1) * 32
    assert "leave the softmax" in named(sliding)["exact"].condition
    assert "10 bits" in named(sliding)["window and running sum"].condition  # ceil(log2 900)
    assert "window and running sum" not in named(floors.space(100, 8, 4, window=100))


def test_moments_are_listed_under_a_radius_and_marked_where_tokens_are_fewer():
    small = named(floors.space(10**6, 2, 64, radius=2.0))
    (moments,) = [memory for name, memory in small.items() if name.startswith("Taylor")]
    degree = floors.taylor_degree(2.0, 0.5)
    assert moments.bits == math.comb(2 + degree, degree) * 65 * 64
    assert not moments.vacuous
    (large,) = [m for m in floors.space(10**6, 64, radius=8.0).possible if m.name.startswith("Taylor")]
    assert large.vacuous
    beyond = floors.space(10, 5000, radius=1000.0)
    (infinite,) = [m for m in beyond.possible if m.name.startswith("Taylor")]
    assert infinite.bits == math.inf and infinite.vacuous
    assert beyond.as_dict()["possible"][-1]["bits"] is beyond.as_dict()["possible"][-1]["bytes"] is None
    for floor in (floors.space(100, 2, radius=2.0, eta=0.0), floors.space(100, 2, radius=1e9),
                  floors.space(100, 2, radius=2.0, window=10)):  # fmt: skip
        assert not [m for m in floor.possible if m.name.startswith("Taylor")]


def test_subgen_is_listed_for_its_own_guarantees_and_says_when_it_is_vacuous():
    def subgen(n, **changed):
        asked = {"metric": "operator", "epsilon": 0.5, "radius": 1.0} | changed
        return [m for m in floors.space(n, 64, **asked).possible if m.name.startswith("SubGen")]

    (useful,) = subgen(10**6)
    _, s, t, centres = floors.subgen_plan(10**6, 64, 64, 0.5, 1.0, 1 - 0.9)
    assert useful.bits == 32 * floors.subgen_numbers(64, 64, s, t, centres)
    assert not useful.vacuous
    (vacuous,) = subgen(4096)
    assert vacuous.vacuous and "s = 46,081 >= n" in vacuous.condition
    (short,) = subgen(10**6, radius=16.0)
    assert short.vacuous
    (frobenius,) = subgen(10**6, metric="frobenius")
    assert frobenius.bits < useful.bits
    for changed in (
        {"metric": "max"},
        {"epsilon": 1.5},
        {"p": 1.0},
        {"window": 100},
        {"radius": None},
        {"epsilon": 0.0},
    ):
        assert subgen(10**6, **changed) == []


def test_lazy_gumbel_stands_beside_the_line():
    (lazy,) = [m for m in floors.space(10**4, 1, 4).possible if m.name.startswith("lazy")]
    assert lazy.bits == pytest.approx(32 * 5 * (200 + 99))
    assert not lazy.vacuous
    assert all(m.vacuous for m in floors.space(3, 1, 4).possible if m.name.startswith("lazy"))
    assert not [m for m in floors.space(100, 2).possible if m.name.startswith("lazy")]


@settings(deadline=None)
@given(
    st.integers(1, 10**5), st.integers(1, 64), st.integers(1, 64), st.floats(0.05, 20.0), st.floats(0.05, 1.0),
    st.sampled_from(floors.METRICS), st.floats(0.51, 0.99),
    st.sampled_from(["fp16", "bf16", "binary"]),
)  # fmt: skip
def test_what_is_possible_is_never_impossible(n, d, dv, radius, epsilon, metric, p, values):
    accuracy = {"eta": min(epsilon, 0.99)} if metric == "entrywise" else {"epsilon": epsilon}
    floor = floors.space(n, d, dv, metric=metric, radius=radius, p=p, values=values, **accuracy)
    assert all(memory.bits * (1 + 1e-9) >= floor.bits for memory in floor.possible)
    assert [memory.bits for memory in floor.possible] == sorted(memory.bits for memory in floor.possible)
    for memory, told in zip(floor.possible, floor.as_dict()["possible"], strict=True):
        assert told["ratio"] is None or told["ratio"] == pytest.approx(memory.bits / floor.bits)
        assert told["ratio"] is not None or floor.bits == 0.0 or memory.bits == math.inf
