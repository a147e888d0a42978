"""Make the keys of the torus codes that the floor counts: layers of products of two codes in fewer dimensions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvfloor.floors.spherical import (
    AXES,
    CIRCLE,
    MOST_TORUS,
    PADDED,
    inner_levels,
    latitudes,
    level_gaps,
    options,
    torus_codes,
)


def torus_keys(n: int, d: int, seed: int = 0) -> Tensor:
    """Make n unit keys (n, d), float64, of the torus code of the largest gap that has so many (`torus_codes`).

    `seed` is not used: the code is explicit. Dimensions above 16 are 0. Raises ValueError where the code of the
    smallest gap has fewer keys.
    """
    del seed
    wide = min(d, MOST_TORUS)
    count = torus_codes(wide).count
    if n > count[-1]:
        raise ValueError(f"the torus codes of {wide} dimensions have up to {count[-1]:.0f} keys: n={n} is too many")
    keys = _code(wide, int((count >= n).argmax()))[:n]
    return torch.nn.functional.pad(keys, (0, d - wide))


def _code(d: int, level: int) -> Tensor:
    """Return the code (count, d) of a level, float64; level -1: one key."""
    if level < 0:
        return torch.eye(1, d, dtype=torch.float64)
    codes = torus_codes(d)
    level = int(codes.source[level])
    option = int(codes.option[level])
    if option == AXES:
        axes = torch.eye(d, dtype=torch.float64)
        return torch.stack([axes, -axes], 1).flatten(0, 1)[: int(codes.count[level])]  # antipodes first
    if option == PADDED:
        return torch.nn.functional.pad(_code(d - 1, level), (0, 1))
    if option == CIRCLE:
        angle = 2.0 * math.pi * torch.arange(int(codes.count[level]), dtype=torch.float64) / codes.count[level]
        return torch.stack([angle.cos(), angle.sin()], 1)
    one, other, shift = options(d)[option]
    gap = level_gaps()[level : level + 1]
    layers = latitudes(gap, shift)[0]
    first, second = inner_levels(gap[:, None], layers[None, :])
    return torch.cat([_layer(one, other, *at) for at in zip(layers.tolist(), first[0], second[0], strict=True)])


def _layer(one: int, other: int, phi: float, first: int, second: int) -> Tensor:
    """Return the keys (cos(phi) a, sin(phi) b) for all pairs of a key a and a key b of two codes."""
    a, b = math.cos(phi) * _code(one, int(first)), math.sin(phi) * _code(other, int(second))
    return torch.cat([a.repeat_interleave(len(b), 0), b.repeat(len(a), 1)], 1)
