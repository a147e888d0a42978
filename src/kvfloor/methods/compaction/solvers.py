"""Solve the two least-squares problems of compaction: non-negative weights of tokens, and values near given ones.

In shapes, rows are independent problems, n unknowns each, m equations, c right-hand sides. A Gram matrix is A'A of a
matrix A of equations.
"""

from __future__ import annotations

import torch
from torch import Tensor

_TOLERANCE = 1e-11  # below it, relative to the largest entry, a number counts as zero
_FULL_EXCHANGES = 3
MOST_ROUNDS = 200


def nonnegative(gram: Tensor, moment: Tensor, most_rounds: int = MOST_ROUNDS) -> Tensor:
    """Solve min |A x - b|^2 over x >= 0 for each row: x (rows, n), from A'A (rows, n, n) and A'b (rows, n).

    A'A must be positive definite. The solution is exact up to rounding: block principal pivoting (Kim and Park 2011,
    "Fast nonnegative matrix factorization", algorithm 1). Each unknown is either fixed at zero or free; the free ones
    solve their normal equations; then all unknowns on the wrong side change sides at once, or only the last of them
    where that stopped helping. After `most_rounds` rounds, which rounding could cause on a nearly singular matrix,
    negative entries of the last solution are set to zero.
    """
    rows, n = moment.shape
    solution, open_rows = torch.zeros_like(moment), torch.arange(rows, device=moment.device)
    free = torch.ones_like(moment, dtype=torch.bool)
    fewest, chances = torch.full_like(open_rows, n + 1), torch.full_like(open_rows, _FULL_EXCHANGES)
    numbers = torch.arange(n, device=moment.device)
    for _ in range(most_rounds):
        mine, sides = gram[open_rows], free[open_rows]
        both = sides.unsqueeze(2) & sides.unsqueeze(1)
        square = mine.masked_fill(~both, 0.0) + torch.diag_embed((~sides).to(mine.dtype))
        wanted = moment[open_rows].masked_fill(~sides, 0.0).unsqueeze(2)
        x = torch.cholesky_solve(wanted, torch.linalg.cholesky(square)).squeeze(2)
        slope = (mine @ x.unsqueeze(2)).squeeze(2) - moment[open_rows]
        small = _TOLERANCE * moment[open_rows].abs().amax(1, keepdim=True)
        wrong = torch.where(sides, x < -_TOLERANCE * x.abs().amax(1, keepdim=True), slope < -small)
        solution[open_rows] = x.clamp_min(0.0)
        count = wrong.sum(1)
        better, left = count < fewest[open_rows], chances[open_rows]
        last = numbers == torch.where(wrong, numbers, -1).amax(1, keepdim=True)
        free[open_rows] = sides ^ torch.where((better | (left > 0)).unsqueeze(1), wrong, last)
        chances[open_rows] = torch.where(better, _FULL_EXCHANGES, (left - 1).clamp_min(0))
        fewest[open_rows] = torch.minimum(fewest[open_rows], count)
        open_rows = open_rows[count > 0]
        if not len(open_rows):
            break
    return solution


def nearest(a: Tensor, b: Tensor, prior: Tensor, ridge: float) -> Tensor:
    """Solve min |A X - B|^2 + r |X - X0|^2 for each row: X (rows, n, c), from A (rows, m, n) and B (rows, m, c).

    prior  X0 (rows, n, c), from which X departs only as far as the equations ask
    ridge  r as a share of the mean diagonal entry of A'A; above 0
    """
    gram = a.mT @ a
    lift(gram, ridge)
    return prior + torch.cholesky_solve(a.mT @ (b - a @ prior), torch.linalg.cholesky(gram))


def lift(gram: Tensor, ridge: float) -> Tensor:
    """Add `ridge` times its mean to the diagonal of each matrix (rows, n, n), in place; return what was added (rows,).

    A matrix of zeros gets `ridge` itself.
    """
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1)
    added = ridge * torch.where(mean > 0, mean, torch.ones_like(mean))
    diagonal += added.unsqueeze(-1)
    return added
