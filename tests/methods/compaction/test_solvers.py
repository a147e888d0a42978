"""Non-negative least squares against Lawson and Hanson's algorithm and the optimality conditions; ridge against QR."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from kvfloor.methods.compaction.solvers import lift, nearest, nonnegative


def lawson_hanson(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Solve min |a x - b| over x >= 0 by adding one unknown at a time (Lawson and Hanson 1974, chapter 23)."""
    x, free = np.zeros(a.shape[1]), np.zeros(a.shape[1], dtype=bool)
    while True:
        slope = a.T @ (b - a @ x)
        if free.all() or slope[~free].max() <= 1e-10:
            return x
        free[np.where(free, -np.inf, slope).argmax()] = True
        while True:
            s = np.zeros_like(x)
            s[free] = np.linalg.lstsq(a[:, free], b, rcond=None)[0]
            if s[free].min() > 0:
                x = s
                break
            leaving = free & (s <= 0)
            x = x + (x[leaving] / (x[leaving] - s[leaving])).min() * (s - x)
            free &= x > 1e-14


def problems(rows: int, m: int, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return A (rows, m, n) of positive columns, as softmax shares are, some nearly parallel, and b (rows, m)."""
    source = torch.Generator().manual_seed(seed)
    a = torch.randn(rows, m, n, generator=source, dtype=torch.float64).mul(1.5).exp()
    a[:, :, 1::4] = a[:, :, : n - 1 : 4][:, :, : a[:, :, 1::4].shape[2]] * (1 + 0.05 * a[:, :, 1::4].log())
    return a, torch.randn(rows, m, generator=source, dtype=torch.float64) + 1.0


def require_optimal(solve: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> None:
    gram, moment = a.mT @ a, (a.mT @ b.unsqueeze(2)).squeeze(2)
    x = solve(gram, moment)
    slope = (gram @ x.unsqueeze(2)).squeeze(2) - moment
    size = moment.abs().amax(1, keepdim=True)
    assert bool((x >= 0).all())
    assert bool((slope >= -1e-8 * size).all()), "a zero unknown would lower the error if it grew"
    assert bool((slope[x > 0].abs() <= (1e-8 * size).expand_as(slope)[x > 0]).all()), "a free unknown is not settled"


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("m", "n"), [(40, 1), (40, 2), (30, 12), (60, 40), (200, 90)])
def test_the_solution_is_optimal_and_that_of_lawson_and_hanson(m: int, n: int, seed: int) -> None:
    a, b = problems(3, m, n, seed)
    require_optimal(nonnegative, a, b)
    x = nonnegative(a.mT @ a, (a.mT @ b.unsqueeze(2)).squeeze(2))
    for row in range(3):
        mine, theirs = x[row].numpy(), lawson_hanson(a[row].numpy(), b[row].numpy())
        matrix, wanted = a[row].numpy(), b[row].numpy()
        error, least = (np.linalg.norm(matrix @ y - wanted) for y in (mine, theirs))
        assert error <= least * (1 + 1e-8)
        assert np.allclose(mine, theirs, rtol=1e-4, atol=1e-6 * np.abs(theirs).max())


def _clamped(gram: Tensor, moment: Tensor) -> Tensor:
    return torch.linalg.solve(gram, moment.unsqueeze(2)).squeeze(2).clamp_min(0.0)


def _one_exchange(gram: Tensor, moment: Tensor) -> Tensor:
    return nonnegative(gram, moment, most_rounds=2)


def _signed(gram: Tensor, moment: Tensor) -> Tensor:
    return torch.linalg.solve(gram, moment.unsqueeze(2)).squeeze(2)


@pytest.mark.parametrize("wrong", [_clamped, _one_exchange, _signed])
def test_a_wrong_solver_is_found(wrong: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(AssertionError):
        require_optimal(wrong, *problems(3, 60, 40, 0))


def test_a_row_does_not_depend_on_the_others() -> None:
    a, b = problems(4, 60, 25, 7)
    gram, moment = a.mT @ a, (a.mT @ b.unsqueeze(2)).squeeze(2)
    together = nonnegative(gram, moment)
    alone = torch.cat([nonnegative(gram[i : i + 1], moment[i : i + 1]) for i in range(4)])
    assert torch.allclose(together, alone, rtol=1e-9, atol=1e-12)


def test_cut_short_the_solution_is_still_not_negative() -> None:
    a, b = problems(3, 60, 40, 1)
    x = nonnegative(a.mT @ a, (a.mT @ b.unsqueeze(2)).squeeze(2), most_rounds=1)
    assert bool((x >= 0).all()) and bool(torch.isfinite(x).all())


def stacked(a: Tensor, b: Tensor, prior: Tensor, ridge: float) -> Tensor:
    """Return the ridge solution by QR of the equations with those of the ridge term below them."""
    root = (ridge * a.square().sum(1).mean(1)).sqrt().view(-1, 1, 1)
    eye = torch.eye(a.shape[2], dtype=a.dtype).expand(a.shape[0], -1, -1)
    return torch.linalg.lstsq(torch.cat([a, root * eye], 1), torch.cat([b, root * prior], 1)).solution


@pytest.mark.parametrize(("m", "n"), [(50, 20), (20, 50), (1, 3)])
@pytest.mark.parametrize("ridge", [1e-4, 0.1, 10.0])
def test_values_solve_the_ridge_problem(m: int, n: int, ridge: float) -> None:
    source = torch.Generator().manual_seed(m)
    a, b, prior = (torch.randn(2, *size, generator=source, dtype=torch.float64) for size in ((m, n), (m, 4), (n, 4)))
    assert torch.allclose(nearest(a, b, prior, ridge), stacked(a, b, prior, ridge), rtol=1e-6, atol=1e-8)
    assert not torch.allclose(nearest(a, b, 0 * prior, ridge), stacked(a, b, prior, ridge), rtol=1e-6, atol=1e-8)


def test_lift_adds_a_share_of_the_mean_and_itself_to_zeros() -> None:
    gram = torch.stack([torch.diag(torch.tensor([1.0, 3.0])), torch.zeros(2, 2)])
    assert lift(gram, 0.5).tolist() == [1.0, 0.5]
    assert gram.tolist() == [[[2.0, 0.0], [0.0, 4.0]], [[0.5, 0.0], [0.0, 0.5]]]
