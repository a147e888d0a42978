"""Covering numbers against greedy clusterings that are really run."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvfloor import floors


def in_ball(count: int, d: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    points = torch.nn.functional.normalize(torch.randn(count, d, generator=generator, dtype=torch.float64), dim=1)
    return points * torch.rand(count, 1, generator=generator, dtype=torch.float64) ** (1 / d)


def greedy(points: torch.Tensor, delta: float) -> torch.Tensor:
    """Centres (c, d) of the online rule: a point farther than delta from all centres becomes one."""
    centres = points[:1]
    for point in points[1:]:
        if (centres - point).norm(dim=1).min() > delta:
            centres = torch.cat([centres, point.unsqueeze(0)])
    return centres


@pytest.mark.parametrize(("d", "delta"), [(1, 0.5), (1, 0.1), (2, 0.5), (2, 0.25), (3, 0.6), (2, 1.2), (3, 2.0)])
def test_greedy_opens_no_more_centres_and_they_cover(d, delta):
    points = in_ball(1500, d, seed=d)
    centres = greedy(points, delta)
    assert len(centres) <= floors.greedy_centres(delta, d)
    assert torch.cdist(points, centres).min(dim=1).values.max() <= delta
    closest = torch.cdist(points, centres).argmin(dim=1)
    clusters = [points[closest == c] for c in range(len(centres))]
    widest = max(torch.cdist(own, own).max().item() for own in clusters)
    assert widest <= 2 * delta
    if delta < 1:
        assert widest > delta  # the mutant: radius delta taken for diameter delta


def test_a_line_needs_nearly_as_many():
    """d = 1, delta = 0.5: the points -1, -0.49, 0.02, 0.53 are more than 0.5 apart, and 1 + 2/0.5 = 5 is the bound."""
    spread = torch.tensor([[-1.0], [-0.49], [0.02], [0.53]])
    assert len(greedy(spread, 0.5)) == 4 <= floors.greedy_centres(0.5, 1) == 5
    assert 2 / 0.5 - 1 < 4  # the mutant that forgets the border: a ball of radius 1 - delta/2


def test_numbers_by_hand():
    assert floors.covering_balls(0.5, 3) == 125.0
    assert floors.clusters(0.5, 3) == 729.0
    assert floors.greedy_centres(0.5, 3) == 125.0
    assert [floors.covering_balls(1.0, 9), floors.clusters(2.0, 9), floors.greedy_centres(2.0, 9)] == [1.0, 1.0, 1.0]
    assert floors.greedy_centres(1.0, 9) == 3.0**9
    assert floors.covering_balls(1e-6, 1000) == math.inf
    printed = (9 / math.e) ** 16  # (3/delta)^d at delta = e/3, which Lemma 14 reads as e^d
    assert math.log(printed) == pytest.approx(1.197 * 16, rel=1e-3)


@given(st.floats(0.01, 3.0), st.integers(1, 64), st.floats(1.0, 4.0))
def test_monotone_in_every_argument(delta, d, factor):
    for count in (floors.covering_balls, floors.clusters, floors.greedy_centres):
        assert count(delta, d) >= count(delta * factor, d) >= 1.0
        assert count(delta, d + 1) >= count(delta, d)
    assert floors.clusters(delta, d) == floors.covering_balls(delta / 2, d)
