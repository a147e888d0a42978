"""Closed forms for key families against counting, integration and random draws."""

import math

import pytest
import torch

from kvfloor import floors


def test_jl_dimension_by_hand():
    assert floors.jl_dim_paper(1024, 0.1) == pytest.approx(12 * math.log(1024) / 0.009)
    assert math.ceil(floors.jl_dim_paper(1024, 0.1)) == 9242


def cap_share(d: int, cosine: float, steps: int = 20_000) -> float:
    """Share of the sphere in d >= 2 dimensions within arccos(cosine) of a point, by the midpoint rule."""

    def mass(angle: float) -> float:
        width = angle / steps
        return math.fsum(math.sin((i + 0.5) * width) ** (d - 2) * width for i in range(steps))

    return mass(math.acos(cosine)) / mass(math.pi)


@pytest.mark.parametrize("d", [2, 3, 8, 32])
@pytest.mark.parametrize("cosine", [0.0, 0.2, 0.6, 0.95])
def test_cap_bound_holds(d, cosine):
    assert cap_share(d, cosine) <= 0.5 * (1 - cosine**2) ** ((d - 1) / 2) * (1 + 1e-6)


def test_cap_bound_fails_beyond_a_right_angle_so_gaps_above_one_are_refused():
    assert cap_share(8, -0.5) > 0.5 * (1 - 0.25) ** 3.5
    with pytest.raises(ValueError, match="gap must lie in"):
        floors.log_packing_count(8, 1.5)


@pytest.mark.parametrize(("n", "d"), [(5, 2), (100, 3), (1000, 16), (4096, 64)])
def test_packing_count_and_gap_are_inverse(n, d):
    gap = floors.gap_packing(n, d)
    assert floors.log_packing_count(d, gap) >= math.log(n) > floors.log_packing_count(d, gap * (1 + 1e-9))
    assert floors.gap_packing(n, d) >= 1 - floors.mu_sphere(n, d)


def test_rademacher_union_bound_is_what_it_says():
    n, d, delta = 50, 400, 0.3
    mu = floors.mu_rademacher(n, d, delta)
    assert n**2 / 2 * math.exp(-d * mu**2 / 2) == pytest.approx(delta)
    exceeded = 0
    for seed in range(100):
        signs = torch.randint(0, 2, (n, d), generator=torch.Generator().manual_seed(seed)).double() * 2 - 1
        exceeded += bool(((signs @ signs.T / d).fill_diagonal_(-1)).max() > mu)
    assert exceeded <= 30


def test_circle_gap_is_exact():
    angle = 2 * math.pi * torch.arange(7, dtype=torch.float64) / 7
    points = torch.stack([angle.cos(), angle.sin()], dim=1)
    neighbours = (points @ points.T).fill_diagonal_(-1).max(dim=1).values
    assert torch.allclose(1 - neighbours, torch.full((7,), floors.gap_circle(7), dtype=torch.float64), atol=1e-12)


def test_known_gap_falls_with_n_and_grows_with_d():
    table = [[floors.gap_known(n, d) for d in (2, 3, 4, 8, 16, 64)] for n in (2, 5, 9, 17, 100, 1024, 10**6)]
    assert all(list(row) == sorted(row) for row in table)
    assert all(list(column) == sorted(column, reverse=True) for column in zip(*table, strict=True))
    assert floors.gap_known(3, 1) == 0.0
    assert floors.gap_known(2, 1) == 1.0


def test_numbers_by_hand():
    assert floors.mu_chirp(31, 3) == pytest.approx(2 / math.sqrt(31))
    assert floors.mu_reed_solomon(15, 4) == pytest.approx(0.2)
    assert floors.gap_hypercube(10) == 0.2
    with pytest.raises(ValueError, match="p must be above m"):
        floors.mu_chirp(3, 3)
