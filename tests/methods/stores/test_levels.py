"""The levels are the best ones for entries of random unit vectors, and leave the error that the literature states."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from kvfloor.methods.stores import levels as levels_module
from kvfloor.methods.stores.levels import error, levels
from tests.support import Draw

BITS = range(1, 9)
STATED = {64: (0.3584, 0.1145, 0.0334, 0.0091), 128: (0.3609, 0.1160, 0.0340, 0.0093)}
"""Mean squared error of 1, 2, 3, 4 bits at this width, by numerical integration over the density, to four digits."""
GAUSSIAN = (0.3634, 0.1175, 0.03454, 0.009497)
"""The limit of wide vectors: a normal number by 2, 4, 8 and 16 levels (Max 1960, table 1)."""


def bound(bits: int) -> float:
    """The limit of many levels (Panter and Dite 1951), which also bounds the error of few."""
    return math.sqrt(3) * math.pi / 2 * 4.0**-bits


def density(width: int, points: int, reach: float) -> tuple[Tensor, Tensor]:
    """Return midpoints of a grid on [-reach, reach], and the probabilities of its cells, by another way of counting.

    The probability of an entry's square is that of a beta distribution; here it is the logarithm that is evaluated.
    """
    edge = torch.linspace(-reach, reach, points + 1, dtype=torch.float64)
    middle = (edge[1:] + edge[:-1]) / 2
    weight = torch.softmax((width - 3) / 2 * torch.log1p(-middle.square()), 0)
    return middle, weight


def best_error(bits: int, width: int, points: int = 800) -> float:
    """Return the least error of any levels on a grid, by dynamic programming over the cells' borders."""
    reach = min(1.0, 5.5 / math.sqrt(width))
    t, weight = density(width, points, reach)
    mass, first, second = (
        torch.cat([torch.zeros(1, dtype=torch.float64), (weight * t**power).cumsum(0)]) for power in (0, 1, 2)
    )
    m, f, s = (x.unsqueeze(0) - x.unsqueeze(1) for x in (mass, first, second))  # of the points i .. j - 1
    cost = (s - f.square() / m.clamp_min(1e-300)).masked_fill(m <= 0, 0.0)
    cost = cost.masked_fill(torch.ones_like(cost, dtype=torch.bool).tril(-1), torch.inf)
    least = cost[0]
    for _ in range(2**bits - 1):
        least = (least.unsqueeze(1) + cost).amin(0)
    return float(least[-1]) * width


@pytest.mark.parametrize("width", [1, 2, 3, 5, 64, 80, 128, 576])
@pytest.mark.parametrize("bits", BITS)
def test_levels_ascend_and_are_symmetric(bits: int, width: int) -> None:
    level = levels(bits, width)
    assert level.dtype == torch.float32 and level.shape == (2**bits,)
    assert bool((level[1:] > level[:-1]).all()) and torch.equal(level, -level.flip(0))
    assert float(level.abs().max()) <= 1 and torch.equal(level * 2**16, (level * 2**16).round())


def require_stated(found: dict[int, tuple[float, ...]]) -> None:
    for width, errors in STATED.items():
        assert found[width] == pytest.approx(errors, rel=0.01)


def test_the_error_is_the_stated_one() -> None:
    found = {width: tuple(error(bits, width) for bits in range(1, 5)) for width in STATED}
    require_stated(found)
    with pytest.raises(AssertionError):
        require_stated({64: found[128], 128: found[64]})


def test_wide_vectors_have_the_error_of_a_normal_number() -> None:
    assert tuple(error(bits, 8192) for bits in range(1, 5)) == pytest.approx(GAUSSIAN, rel=0.002)


@pytest.mark.parametrize("width", [3, 8, 64, 128, 576])
def test_the_error_falls_with_bits_and_stays_below_the_bound(width: int) -> None:
    errors = [error(bits, width) for bits in BITS]
    assert all(found <= bound(bits) for found, bits in zip(errors, BITS, strict=True))
    assert all(after < before / 2.5 for before, after in pairwise(errors))


@pytest.mark.parametrize("width", [8, 64, 128])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_no_other_levels_err_less(bits: int, width: int) -> None:
    best = best_error(bits, width)
    assert error(bits, width) == pytest.approx(best, rel=0.003)


@pytest.mark.parametrize("width", [8, 64])
def test_levels_at_equal_distances_err_more_than_the_best(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    even = torch.linspace(-1, 1, 8)
    monkeypatch.setattr(levels_module, "levels", lambda bits, width: even)
    assert error(3, width) > 1.5 * best_error(3, width)


def off_centre(level: Tensor, width: int) -> float:
    """Return the largest distance of a level from the mean of its cell, in units of the narrowest gap of levels."""
    t, weight = density(width, 200_000, min(1.0, 9.0 / math.sqrt(width)))
    level = level.double()
    cell = torch.bucketize(t, (level[1:] + level[:-1]) / 2)
    mass, first = torch.zeros(2, len(level), dtype=torch.float64).index_add_(1, cell, torch.stack((weight, weight * t)))
    return float((first / mass - level).abs().max() / (level[1:] - level[:-1]).min())


@pytest.mark.parametrize("width", [3, 8, 64, 128, 576])
@pytest.mark.parametrize("bits", [1, 2, 4, 6, 8])
def test_each_level_is_the_mean_of_its_cell(bits: int, width: int) -> None:
    """A level lies on a multiple of 2^-16, and Lloyd's rounds end before the last of its digits is settled."""
    assert off_centre(levels(bits, width), width) < 0.03


def test_levels_of_another_width_are_not_the_means_of_their_cells() -> None:
    assert off_centre(levels(4, 64), 80) > 0.03


@pytest.mark.parametrize(("bits", "width"), [(2, 64), (4, 64), (4, 128), (8, 128), (3, 5)])
def test_random_unit_vectors_err_as_stated(draw: Draw, bits: int, width: int) -> None:
    x = draw(500, width)
    x = x / x.norm(dim=-1, keepdim=True)
    level = levels(bits, width).double()
    squared = (x.unsqueeze(-1) - level).abs().amin(-1).square().sum(-1)
    sigma = float(squared.std()) / math.sqrt(len(squared))
    assert abs(float(squared.mean()) - error(bits, width)) < 4.5 * sigma
