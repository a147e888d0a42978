"""Count unit keys of a given gap that surely exist in d dimensions: by caps, circles, axes and layers of tori.

The gap of two unit keys is 1 less their inner product, i.e. 1 - cos(theta) at an angle theta. A code of gap g is a set
of unit keys with pairwise gaps of at least g. Proofs are in docs/floors.md ("Bounded norms").
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from kvfloor.validation import whole, within

_TERMS = 300
_ROUNDING = 1e-9
_STEPS = 32  # levels of gaps per factor of 2
_LEVELS = 12 * _STEPS + 1
MOST_TORUS = 16
"""Most dimensions that layers of tori are counted in; more dimensions have the codes of so many."""

AXES, PADDED, CIRCLE = -1, -2, -3
"""How a code is made where it is no layers of tori: the vectors ±e_i, the code of one dimension less, or a circle's."""

Numbers = NDArray[np.float64]
Indices = NDArray[np.int64]


def log_cap_share(d: int, gap: float) -> float:
    """Return the log of a bound on the share of the sphere in d >= 2 dimensions within the gap `gap` <= 1 of a point.

    Law: with x = sin(theta)^2 the share is x^((d-1)/2) / ((d-1) B) times the hypergeometric series F(1/2, (d-1)/2;
    (d+1)/2; x), B = sqrt(pi) Gamma((d-1)/2) / Gamma(d/2). What its first 300 terms leave out is bounded by a geometric
    series. The share is at most x^((d-1)/2) / 2 also, which is taken where it is less.
    """
    x, half = gap * (2.0 - gap), 0.5 * (d - 1)
    log_sine = half * math.log(x)
    simple = log_sine - math.log(2.0)
    if x >= 1.0:
        return simple
    total = term = 1.0
    for k in range(_TERMS):
        term *= (0.5 + k) / (k + 1.0) * (half + k) / (half + k + 1.0) * x
        total += term
        if term < 1e-14 * total:
            break
    total += term * x / (1.0 - x)
    whole = 0.5 * math.log(math.pi) + math.lgamma(half) - math.lgamma(0.5 * d) + math.log(d - 1.0)
    return min(simple, log_sine + math.log(total) - whole + _ROUNDING)


def log_packing_count(d: int, gap: float) -> float:
    """Return ln m for a number m such that some m unit keys in d >= 2 dimensions have pairwise gaps of at least `gap`.

    m is the largest of three numbers; it need not be whole. It does not fall with d, nor rise with the gap.
        1 / share   where `share` of the sphere is within the gap of a point (`log_cap_share`): as long as there are
                    fewer keys than that, their caps do not cover the sphere, and another key finds place
        2d          the vectors ±e_i along the axes
        the keys of layers of tori, in up to 16 dimensions (`torus_codes`), and of equally spaced points of a circle
    Raises ValueError for gaps above 1, as the proof of the first number ends there. Derived here.
    """
    d = whole("d", d, least=2)
    gap = within("gap", gap, 0.0, 1.0, low_open=True)
    tori = torus_codes(min(d, MOST_TORUS))
    return max(math.log(2.0 * d), -log_cap_share(d, gap), math.log(tori.count[level_of(gap)]))


def gap_packing(n: int, d: int) -> float:
    """Return a gap that `n` well-chosen unit keys in d >= 2 dimensions have: the largest that is proven here, up to 1.

    It is the inverse of `log_packing_count`, by bisection, rounded down.
    """
    n, d = whole("n", n), whole("d", d, least=2)
    return 1.0 if n <= 2 * d else _gap_packing(n, d)


@lru_cache(maxsize=4096)
def _gap_packing(n: int, d: int) -> float:
    low, high, wanted = 0.0, 1.0, math.log(n)
    while high - low > 1e-12 * high:
        middle = 0.5 * (low + high)
        low, high = (middle, high) if log_packing_count(d, middle) >= wanted else (low, middle)
    return low


# ---- layers of tori --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TorusCodes:
    """Hold the number of keys of codes in one number of dimensions, for a descending list of gaps (levels).

    count   (levels,) keys of the code of each level
    source  (levels,) the level of larger or equal gap whose code it is
    option  (levels,) how that level's code is made: AXES, PADDED, or an index of `options(d)`
    """

    count: Numbers
    source: Indices
    option: Indices


def level_gaps() -> Numbers:
    """Return the gaps of all levels, from 2 downwards."""
    return 2.0 * 2.0 ** (-np.arange(_LEVELS) / _STEPS)


def level_of(gap: float) -> int:
    """Return the level of the least gap in the list that is at least `gap` <= 2; the last level for smaller ones."""
    return min(math.floor(_STEPS * math.log2(2.0 / gap) - _ROUNDING), _LEVELS - 1)


def _levels(gap: Numbers) -> Indices:
    """Return the levels of gaps; -1 for those above 2, at which a code has one key."""
    with np.errstate(divide="ignore"):
        level = np.floor(_STEPS * np.log2(2.0 / gap) - _ROUNDING)
    return np.clip(level, -1, _LEVELS - 1).astype(np.int64)


def options(d: int) -> list[tuple[int, int, float]]:
    """Return the ways (d1, d2, shift) to split d >= 3 dimensions: d1 + d2 = d, and where the first layer lies.

    The latitudes of layers leave a part of a quarter turn unused; the first layer lies at the share `shift` of it.
    """
    splits = dict.fromkeys([(1, d - 1), (2, d - 2), (d // 2, d - d // 2)])
    return [(one, other, shift) for one, other in splits if one <= other for shift in (0.0, 0.5, 1.0)]


def latitudes(gap: Numbers, shift: float) -> Numbers:
    """Return the latitudes (levels, layers) of layers of codes with these gaps; NaN after the last layer.

    Neighbouring layers are an angle of at least theta apart, the angle of the gap.
    """
    theta = 2.0 * np.arcsin(np.sqrt(gap / 2.0)) * (1.0 + _ROUNDING)
    layers = np.floor(0.5 * math.pi / theta)
    start = shift * np.maximum(0.0, 0.5 * math.pi - layers * theta)
    phi = start[:, None] + np.arange(int(layers.max()) + 1) * theta[:, None]
    return np.where(np.arange(phi.shape[1]) <= layers[:, None], np.minimum(phi, 0.5 * math.pi), np.nan)


def inner_levels(gap: Numbers, phi: Numbers) -> tuple[Indices, Indices]:
    """Return the levels of the two codes that a layer at latitude phi multiplies, -1 for a single key."""
    with np.errstate(divide="ignore"):
        first, second = (gap / np.square(f(phi)) for f in (np.cos, np.sin))
    return _levels(np.nan_to_num(first, nan=3.0)), _levels(np.nan_to_num(second, nan=3.0))


@lru_cache(maxsize=32)
def torus_codes(d: int) -> TorusCodes:
    """Count the keys of layers of tori in 1 <= d <= 16 dimensions, for all levels of gaps.

    Law: a layer at latitude phi has the keys (cos(phi) a, sin(phi) b) for a in a code of d1 and b in one of d2
    dimensions, d1 + d2 = d, of gaps g / cos(phi)^2 and g / sin(phi)^2. Keys of two layers have a gap of at least 1 -
    cos(phi - phi'). In two dimensions the code is a circle's; the 2d vectors ±e_i have gap 1.
    """
    gaps = level_gaps()
    if d == 1:
        return TorusCodes(np.full(_LEVELS, 2.0), np.arange(_LEVELS), np.full(_LEVELS, AXES))
    if d == 2:
        circle = np.floor(math.pi / np.arcsin(np.sqrt(gaps / 2.0)) * (1.0 - _ROUNDING))
        count = np.maximum(circle, np.where(gaps <= 1.0, 4.0, 2.0))
        return TorusCodes(count, np.arange(_LEVELS), np.where(count > circle, AXES, CIRCLE))
    less = torus_codes(d - 1)
    count = np.where(gaps <= 1.0, 2.0 * d, 2.0)
    option = np.full(_LEVELS, AXES)
    count, option = np.where(less.count > count, less.count, count), np.where(less.count > count, PADDED, option)
    for index, (one, other, shift) in enumerate(options(d)):
        phi = latitudes(gaps, shift)
        levels = inner_levels(gaps[:, None], phi)
        sizes = (np.where(at < 0, 1.0, torus_codes(w).count[at]) for at, w in zip(levels, (one, other), strict=True))
        found = np.where(np.isnan(phi), 0.0, math.prod(sizes)).sum(1)
        option, count = np.where(found > count, index, option), np.maximum(found, count)
    most = np.maximum.accumulate(count)
    source = np.maximum.accumulate(np.where(count == most, np.arange(_LEVELS), 0))
    return TorusCodes(most, source, option)
