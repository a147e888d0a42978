"""Divide one token budget among the kv heads of all layers, in proportion to a table of shares.

The budget is the number of tokens that a cache keeps per kv head, as a mean over all heads. A share is a multiple of
it: a head with share 1.5 gets 1.5 times the budget, if the mean of all shares is 1. The table has one tuple per
compressed layer, with a share per kv head or one share for all heads. Shares may fall with depth (`pyramid`), be
measured (`kvfloor.hf.calibrate`), or be given by the user. A compressed layer is one with attention over all tokens,
whose keys and values kvfloor compresses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

import torch

if TYPE_CHECKING:
    pass

# Multiples of one budget, per compressed layer and kv head; a single number in a layer is for all its heads.
Shares = tuple[tuple[float, ...], ...]
Number = TypeVar("Number", int, float)

PYRAMID_SLOPE = 20  # PyramidKV's beta: the deepest layer gets 1 / beta of the mean, the first 2 - 1 / beta


def pyramid(layers: int) -> Shares:
    """Return a table of shares that fall linearly with depth and have mean 1: one tuple (share,) per layer.

    layers: number of compressed layers. A layer's share holds for all its kv heads. The first layer gets 1.95, the last
    0.05; a single layer gets 1.
    Source: Cai et al. 2024, PyramidKV, arXiv 2406.02069.
    """
    if layers == 1:
        return ((1.0,),)
    least = 1 / PYRAMID_SLOPE
    return tuple((2 - least - (2 - 2 * least) * i / (layers - 1),) for i in range(layers))


def per_head(line: Sequence[Number], kv_heads: int, place: int) -> tuple[Number, ...]:
    """Return one number (share, or budget in tokens) per kv head of a layer; a single number is repeated for all heads.

    line: the layer's entry in a table of shares or of budgets, with one number or `kv_heads` numbers. kv_heads: number
    of kv heads of the layer in the whole model, also if it is sharded. place: the layer's index in the table, for the
    error message. Raises ValueError for any other count of numbers.
    """
    if len(line) not in (1, kv_heads):
        raise ValueError(
            f"line {place} of the table has {len(line)} numbers for {kv_heads} kv heads; give one or {kv_heads}"
        )
    return tuple(line) * (kv_heads if len(line) == 1 else 1)


def spread(shares: Sequence[Sequence[float]], budget: int, least: int) -> list[tuple[int, ...]]:
    """Return the budget in tokens of every kv head, one tuple per layer, in proportion to `shares`.

    shares: one sequence per layer, with one share per kv head. Every head gets at least `least` tokens. The mean over
    all heads is exactly `budget`. So if some heads are raised to `least`, the others get less than in proportion.
    Raises ValueError if `budget` is less than `least`.
    """
    flat = torch.tensor([share for line in shares for share in line], dtype=torch.float64)
    total = budget * len(flat)
    if budget < least:
        raise ValueError(f"a budget of {budget} tokens per kv head is too small to share out: each head needs {least}")
    low, high = 0.0, total / float(flat.max())
    for _ in range(200):  # the factor at which the heads above `least` use up the rest
        middle = (low + high) / 2
        low, high = (middle, high) if float((middle * flat).clamp_min(least).sum()) <= total else (low, middle)
    wanted = (low * flat).clamp_min(least)
    given = wanted.floor().to(torch.int64)
    spare = total - int(given.sum())
    given[torch.argsort(wanted - given, descending=True, stable=True)[:spare]] += 1
    cut = given.split([len(line) for line in shares])
    return [tuple(part.tolist()) for part in cut]
