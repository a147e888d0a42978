"""Compute row by row: a result's bits depend on the row's own numbers alone, on any BLAS and any instruction set.

A matrix product, a factorisation, a reduction or an exponential may round the same number differently: rounding depends
on the number's place in a batch, on how many rows are beside it, on how storage is aligned and on how threads share the
work. Two forms of computation always round a number alike:
    row by row   the same call on tensors of the same shape, contiguous and aligned alike, one row at a time
    by elements  additions, multiplications, divisions and square roots: each rounds once, alike anywhere in a tensor
Any number that enters a state, or decides which tokens stay, is computed in one of these forms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_BOUNDARY_BYTES = 64  # the alignment of torch's own allocations
_TERMS = 12  # of the logarithm's series; the next one is below 2^-64


def aligned(x: Tensor) -> Tensor:
    """Return x, or a copy of x, such that the result is contiguous and starts at a multiple of 64 bytes in memory.

    A copy is made only if x itself is not contiguous or starts elsewhere.
    """
    dense, size = [], 1
    for extent in reversed(x.shape):
        dense.append(size)
        size *= extent
    if x.stride() == tuple(reversed(dense)) and x.data_ptr() % _BOUNDARY_BYTES == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def row_by_row(
    work: Callable[..., Tensor],
    *columns: Tensor,
    held: Sequence[int] | None = None,
    beside: Sequence[Tensor] = (),
    fill: float = 0.0,
) -> Tensor:
    """Apply `work` to one row after another and stack the results, so that a row's bits depend on its numbers alone.

    work     called once per row, with that row of every tensor of `columns` and `beside`, each (1, ...); returns
             (1, ...), and changes none of its arguments
    columns  tensors (rows, ...); if `held` is given, `work` gets only the first held[r] items of row r's second axis
    beside   further tensors (rows, ...), of which `work` always gets the whole row
    held     the length of each row, if rows differ in length; None: they do not. For row r `work` returns held[r]
             numbers along the last axis, and numbers `fill` are added up to the full length
    """
    rows = columns[0].shape[0]
    if rows == 0 or (held is not None and columns[0].shape[1] == 0):
        return work(*columns, *beside)

    def one(row: int) -> Tensor:
        here = slice(row, row + 1)
        own = (x[here] if held is None else x[here, : held[row]] for x in columns)
        return work(*map(aligned, own), *(aligned(x[here]) for x in beside))

    parts = [one(row) for row in range(rows)]
    if held is not None and min(held) < columns[0].shape[1]:
        width = columns[0].shape[1]
        parts = [torch.nn.functional.pad(x, (0, width - x.shape[-1]), value=fill) for x in parts]
    return parts[0] if rows == 1 else torch.cat(parts)


def product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply the matrices a (rows, m, n) and b (rows, n, p), row by row: (rows, m, p)."""
    return row_by_row(torch.matmul, a, b)


def total(x: Tensor, axis: int = -1) -> Tensor:
    """Sum x along an axis in a fixed order of additions, so that rounding does not depend on the other axes."""
    x = x.movedim(axis, 0)
    n = x.shape[0]
    if n < 2:
        return x[0] if n else x.new_zeros(x.shape[1:])
    half = 1 << ((n - 1).bit_length() - 1)
    tree = x[:half].clone()
    tree[: n - half] += x[half:]
    while half > 1:
        half //= 2
        tree[:half] += tree[half : 2 * half]
    return tree[0]


def length(x: Tensor) -> Tensor:
    """Return the Euclidean norm of x along its last axis; its bits do not depend on the batch around it."""
    return total(x.square()).sqrt()


def logarithm(x: Tensor) -> Tensor:
    """Return the natural logarithm of positive float64 numbers, element by element, to a few units in the last place.

    It is log x = log m + k log 2, where x = m 2^k with m in [sqrt(1/2), sqrt(2)). log m is 2 artanh(s), by the power
    series of artanh, with s = (m - 1) / (m + 1).
    """
    fraction, exponent = torch.frexp(x)
    small = fraction < math.sqrt(0.5)
    fraction = torch.where(small, 2.0 * fraction, fraction)
    s = (fraction - 1.0) / (fraction + 1.0)
    square = s * s
    series = torch.full_like(square, 1.0 / (2 * _TERMS + 1))
    for k in reversed(range(_TERMS)):
        series = series * square + 1.0 / (2 * k + 1)
    return (exponent - small.to(exponent.dtype)).to(x.dtype) * math.log(2.0) + 2.0 * s * series
