"""The volume floor against exact volumes of all answers, its formula by definition, and a code that is as small."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvfloor.floors import H2
from kvfloor.floors.measured import VolumeFloor, volume_by
from kvfloor.floors.measured.levels import Demand
from tests.floors.measured.read_oracle import weights
from tests.support import seeded


def drawn(seed: int, n: int, m: int, d: int, size: float) -> tuple[Tensor, Tensor]:
    draw = seeded(seed)
    return draw(n, d), size * draw(m, d)


def most_bits(found: VolumeFloor, k: Tensor, q: Tensor) -> float:
    """Return log2 of the volume of all answers to the asked queries, in boxes of side 2 (eta + u).

    The answers of one coordinate fill the zonotope of the attention rows. Its volume is 2^R times the sum over R of the
    n tokens of the absolute determinant. An entropy is at most the log of a volume.
    """
    rows = weights(q[found.asked], k)
    count, n = rows.shape
    volume = sum(float(rows[:, list(tokens)].det().abs()) for tokens in itertools.combinations(range(n), count))
    return found.demand.dv * (math.log2(volume) - count * math.log2(found.demand.error))


def by_definition(found: VolumeFloor, k: Tensor, q: Tensor, later_mass: Tensor | None = None) -> float:
    """Return the bits of the asked queries by the law, with the worst p' looked for on a grid."""
    rows = weights(q[found.asked], k, later_mass=None if later_mass is None else later_mass[found.asked])
    demand, bits = found.demand, 0.0
    for i, row in enumerate(rows):
        residual = float(row.norm()) if i == 0 else float(away(row, rows[:i]).norm())
        w = float(row.sum())
        grid = torch.linspace(demand.p, 1.0, 20001).tolist() if demand.p < 1 else [1.0]
        bits += demand.dv * math.log2(residual) - max(
            p * demand.dv * math.log2(demand.error) + (1 - p) * demand.dv * math.log2(w) + H2(p) for p in grid
        )
    return bits


def away(row: Tensor, others: Tensor) -> Tensor:
    return row - torch.linalg.lstsq(others.T, row.unsqueeze(1), driver="gelsd").solution.squeeze(1) @ others


@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 4), st.sampled_from([0.3, 0.05, 0.002]))
def test_no_floor_above_the_volume_of_all_answers(seed: int, n: int, m: int, eta: float) -> None:
    k, q = drawn(seed, n, m, 3, 2.0)
    found = volume_by(k, q, eta=eta, dv=2, p=1.0)
    assert found.bits >= 0.0
    assert len(found.asked) == 0 or found.bits <= most_bits(found, k, q) + 1e-6


def test_a_larger_constant_is_above_that_volume() -> None:
    """The mutant: the entropy of a Gaussian of the values' variance instead of that of their entropy."""
    k, q = torch.eye(1), torch.eye(1)
    found = volume_by(k, q, eta=0.1, dv=2, p=1.0)
    assert found.bits + 2 * 0.5 * math.log2(math.pi * math.e / 6) > most_bits(found, k, q) + 0.1


def test_orthogonal_tokens_need_exactly_the_bits_of_a_quantiser() -> None:
    k = 60.0 * torch.eye(8)
    for eta in (0.5, 0.1, 0.01):
        found = volume_by(k, torch.eye(8), eta=eta, dv=16, p=1.0)
        assert found.bits == pytest.approx(8 * 16 * math.log2(1 / (eta + 2**-25)), rel=1e-6)
        assert found.bits <= 8 * 16 * math.ceil(math.log2(1 / eta))  # of a code with cells of 2 eta


@given(st.integers(0, 10**6), st.sampled_from([0.2, 0.6, 0.9, 1.0]), st.sampled_from([0.1, 0.01]))
def test_bits_are_those_of_the_law(seed: int, p: float, eta: float) -> None:
    k, q = drawn(seed, 24, 12, 8, 3.0)
    later = seeded(seed + 1)(12).double()
    found = volume_by(k, q, eta=eta, dv=4, p=p, later_mass=later)
    if len(found.asked):
        assert found.bits == pytest.approx(by_definition(found, k, q, later), rel=1e-4, abs=1e-3)


@given(st.integers(0, 10**6))
def test_the_floor_grows_with_precision_and_with_certainty(seed: int) -> None:
    k, q = drawn(seed, 40, 20, 8, 3.0)
    bits = [volume_by(k, q, eta=eta, dv=4).bits for eta in (0.3, 0.1, 0.03, 0.01, 0.001)]
    assert bits == sorted(bits)
    low, high = (volume_by(k, q, eta=0.01, dv=4, p=p).bits for p in (0.6, 0.95))
    assert low <= high * (1 + 1e-6)


def test_a_token_outside_takes_weight_and_adds_no_volume() -> None:
    k, q = drawn(4, 30, 10, 8, 2.0)
    outside = drawn(5, 1, 1, 8, 1.0)[0]
    found = volume_by(k, q, eta=0.01, dv=4, later_mass=(q @ outside.T).squeeze(1))
    assert found.bits < volume_by(k, q, eta=0.01, dv=4).bits
    rows = weights(q[found.asked], torch.cat([k, outside]))[:, :-1]
    assert torch.allclose(rows, weights(q[found.asked], k, later_mass=(q[found.asked] @ outside.T).squeeze(1)))


def test_a_floor_is_above_the_read_floor_where_queries_mix_tokens() -> None:
    from kvfloor.floors.measured import readable_by

    k, q = drawn(6, 256, 128, 32, 0.3)
    assert volume_by(k, q, eta=0.01, dv=32).bits > 2 * readable_by(k, q, eta=0.01, dv=32).bits


def test_equal_keys_or_queries_are_counted_once() -> None:
    k, q = drawn(7, 12, 6, 4, 3.0)
    once = volume_by(k, q, eta=0.01, dv=4)
    assert volume_by(k, q.repeat(3, 1), eta=0.01, dv=4).bits == pytest.approx(once.bits, rel=1e-6)
    assert volume_by(k[:1].repeat(20, 1), q, eta=0.01, dv=4).bits <= 4 * math.log2(1 / (0.01 * 20**0.5)) + 1e-6


@pytest.mark.parametrize("size", [0.0, 1e-20, 1e4, 1e15])
def test_extreme_logits_give_a_finite_floor(size: float) -> None:
    k, q = drawn(8, 50, 30, 8, size)
    found = volume_by(k, q, eta=0.05, dv=8, softcap=None)
    assert 0.0 <= found.bits <= 50 * 8 * math.log2(1 / 0.05)
    assert volume_by(k, q, eta=0.05, dv=8, softcap=30.0).bits >= 0.0


def test_answers_of_little_weight_need_nothing() -> None:
    k, q = drawn(9, 20, 10, 4, 1.0)
    assert volume_by(k, q, eta=0.05, dv=4, later_mass=40.0).bits == 0.0


def test_coarse_formats_bound_the_floor() -> None:
    k, q = 60.0 * torch.eye(8), torch.eye(8)
    fine, coarse = (volume_by(k, q, eta=0.0, dv=4, p=1.0, dtype=t) for t in (torch.float32, torch.bfloat16))
    assert fine.bits == pytest.approx(8 * 4 * 25, rel=1e-6) and coarse.bits == pytest.approx(8 * 4 * 9, rel=1e-6)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"eta": -0.1}, "eta"),
        ({"p": 0.0}, "p must"),
        ({"dv": 0}, "dv"),
        ({"softcap": -1.0}, "softcap"),
        ({"later_mass": torch.zeros(3)}, "later_mass"),
        ({"k": torch.full((4, 2), torch.nan)}, "k must be finite"),
        ({"q": torch.zeros(4, 3)}, "q must have shape"),
    ],
)
def test_bad_arguments_are_refused(wrong: dict, message: str) -> None:
    given = {"k": torch.zeros(4, 2), "q": torch.zeros(5, 2), "eta": 0.1, "dv": 4} | wrong
    with pytest.raises(ValueError, match=message):
        volume_by(**given)


def test_the_demand_is_kept() -> None:
    found = volume_by(torch.eye(3), torch.eye(3), eta=0.1, dv=4, p=0.8)
    assert found.demand == Demand(0.1, 0.8, 4)
    assert found.bytes == math.ceil(found.bits / 8)
