"""Points of the unit ball: what adversarial answers tell, quantisers that must not be forbidden, the program itself."""

import math

import pytest
import torch

from kvfloor import floors
from kvfloor.floors.metric import NORMS


def points(m: int, dv: int, seed: int) -> torch.Tensor:
    """Draw m uniform points of the unit ball of dv dimensions, (m, dv) float64."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(m, dv, generator=generator, dtype=torch.float64)
    lengths = torch.rand(m, 1, generator=generator, dtype=torch.float64) ** (1.0 / dv)
    return directions / directions.norm(dim=1, keepdim=True) * lengths


def sizes(metric: str, points: torch.Tensor, values: torch.Tensor, rounding: float) -> tuple[float, float]:
    """Return (size of the guarantee without the softmax's norm, the `size` of `ball_radius`) for points and values."""
    if metric == "max":
        return values.norm(dim=1).max().item(), 1.0
    if metric == "frobenius":
        return values.norm().item(), math.sqrt(len(values))
    norm = torch.linalg.matrix_norm(values, 2).item()
    return norm, torch.linalg.matrix_norm(points, 2).item() + math.sqrt(len(values)) * rounding


@pytest.mark.parametrize("metric", NORMS)
@pytest.mark.parametrize("leak", [0.0, 0.02, 0.3])
def test_every_answer_within_the_guarantee_tells_its_point_to_the_radius(metric, leak):
    """The worst answer errs away from the point; the other tokens' values lie opposite to it; values are fp16."""
    m, dv, epsilon, rounding = 6, 5, 0.1, 2.0**-11 * (1 + 2.0**-8)
    closest = math.inf
    for seed in range(20):
        hidden = points(m, dv, seed)
        hidden[0] /= hidden[0].norm()
        if seed % 2:
            hidden[1:] = -hidden[0]
        values = hidden.half().double()
        weights = torch.full((m,), leak / (m - 1), dtype=torch.float64)
        weights[0] = 1.0
        weights /= weights.sum()
        size, counted = sizes(metric, hidden, values, rounding)
        error = epsilon * size * (1.0 if metric == "max" else weights.norm().item())
        attention = weights @ values
        away = attention * (1 + leak) - hidden[0]
        away = hidden[0] if away.norm() == 0 else away / away.norm()
        answer = attention + error * away
        told = floors.ball_radius(epsilon, counted, leak, rounding, of_all=metric != "max")
        distance = ((1 + leak) * answer - hidden[0]).norm().item()
        assert distance <= told * (1 + 1e-12)
        closest = min(closest, told / distance)
    if metric == "max":
        assert closest < 1.05 + 2.5 * leak  # no radius much smaller would do


def test_the_norm_of_rounded_points_may_exceed_their_own_by_more_than_rounding_times_it():
    """Many equal points: the rounding adds up, so a size of (1 + rounding) B would be too small."""
    point = torch.full((4096, 64), 0.125 * 0.9996, dtype=torch.float64)
    grows = torch.linalg.matrix_norm(point.half().double() - point, 2).item()
    assert grows <= math.sqrt(4096) * floors.VALUES["fp16"].rounding
    assert grows > floors.VALUES["fp16"].rounding * floors.ball_norm(4096, 64)


def test_rounding_of_points_is_within_what_is_counted():
    for values, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)):
        for dv in (1, 7, 512):
            hidden = points(50, dv, dv)
            off = (hidden.to(dtype).double() - hidden).norm(dim=1)
            assert off.max().item() <= floors.VALUES[values].rounding
        assert floors.VALUES[values].rounding < 1.01 * torch.finfo(dtype).eps / 2


@pytest.mark.parametrize(("m", "dv"), [(1, 3), (3, 1), (4, 4), (64, 64), (300, 8), (20, 200)])
def test_half_of_all_sets_of_points_keep_to_the_norm(m, dv):
    norms = torch.tensor([torch.linalg.matrix_norm(points(m, dv, seed), 2).item() for seed in range(40)])
    assert (norms <= floors.ball_norm(m, dv)).double().mean() >= 0.5
    assert floors.ball_norm(m, dv) <= 1.8 * norms.median() + 0.3
    assert floors.ball_norm(m, dv) <= math.sqrt(m)


def test_norms_grow_with_the_points_and_fall_with_the_width():
    for dv in (1, 5, 64):
        column = [floors.ball_norm(m, dv) for m in range(1, 300)]
        assert column == sorted(column)
    row = [floors.ball_norm(100, dv) for dv in range(1, 300)]
    assert row == sorted(row, reverse=True)


@pytest.mark.parametrize("p", [0.5, 0.9, 1.0])
@pytest.mark.parametrize("slope", [0.02, 0.1, 0.4])
def test_the_program_is_the_maximum_but_for_its_steps(p, slope):
    def radius(m: int) -> float:
        return slope * math.sqrt(m) + 1e-3

    every = max(m * floors.row_bits(1, 8, p, -math.log2(radius(m))) for m in range(1, 3001) if radius(m) < 1.0)
    m, told, bits = floors.best_points(3000, 8, p, radius)
    assert 0.99 * every <= bits <= every * (1 + 1e-12)
    assert radius(m) <= told and bits == pytest.approx(m * floors.row_bits(1, 8, p, -math.log2(told)))


def test_quantisers_of_an_interval_are_not_forbidden_and_a_guess_more_is():
    """dv = 1: k equal intervals of [-1, 1] tell a point to within 1/k; k^m messages serve m points."""
    for k in (2, 3, 10, 1000):
        for m in (1, 7, 100):
            _, _, bits = floors.best_points(m, 1, 1.0, lambda _, k=k: 1.0 / k)
            assert m * math.log2(k) * 0.99 - m / 128 <= bits <= m * math.log2(k) * (1 + 1e-12)
            share = 0.7  # of the points are sent, the others answered by 0, right with probability 1/k
            sent, success = m * share * math.log2(k), share + (1 - share) / k
            assert floors.best_points(m, 1, success, lambda _, k=k: 1.0 / k)[2] <= sent + 1e-9
            assert k < 3 or m * success * math.log2(k) > sent  # no entropy of which points are right


def test_rotated_grids_are_not_forbidden():
    """A grid of side 2 r/sqrt(dv) within the ball sends cells: its covering radius is r, its rate above the floor."""
    for dv, r in ((2, 0.5), (3, 0.3), (8, 0.2)):
        cells = math.ceil(math.sqrt(dv) / r) ** dv
        assert floors.best_points(1, dv, 1.0, lambda _, r=r: r)[2] <= math.log2(cells)


def test_max_norm_by_hand():
    floor = floors.metric_space(1000, 64, metric="max", epsilon=0.1)
    radius = 0.1 * (1 + floors.VALUES["fp16"].rounding) + floors.VALUES["fp16"].rounding
    exact = 1000 * (0.9 * 64 * math.log2(1 / radius) - floors.H2(0.9))
    assert exact * (1 - 1 / 256 / 3.3) <= floor.bits <= exact
    assert floor.constants["hidden"] == "points of the unit ball"
    assert floor.bits > 3.3 * floors.metric_space(1000, 64, metric="max", epsilon=0.1, values="binary").bits


def test_the_limits_constant():
    """Frobenius, p = 1: max_m m log2(1/(epsilon sqrt m)) = 1/(2 e ln 2 epsilon^2), 0.2654 dv/epsilon^2 bits in all."""
    floor = floors.metric_space(10**9, 64, metric="frobenius", epsilon=1e-2, p=1.0, values="fp32")
    assert floor.bits * 1e-4 / 64 == pytest.approx(1 / (2 * math.e * math.log(2)), rel=2e-3)
    single = floors.metric_space(10**9, 64, metric="frobenius", epsilon=1e-2, p=1.0, values="binary")
    assert 3.7 < floor.bits / single.bits < 3.8


@pytest.mark.parametrize("metric", NORMS)
def test_the_floor_grows_with_precision_and_vanishes_where_0_is_right(metric):
    found = [floors.metric_space(1024, 64, metric=metric, epsilon=e).bits for e in (1.0, 0.5, 0.1, 0.01, 1e-3, 0.0)]
    assert found[0] == 0.0 and found == sorted(found) and len(set(found)) == 6
    for epsilon in (0.5, 0.1, 0.01):
        single = floors.metric_space(1024, 64, metric=metric, epsilon=epsilon, values="binary")
        assert floors.metric_space(1024, 64, metric=metric, epsilon=epsilon).bits >= single.bits
