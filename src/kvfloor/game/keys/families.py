"""Make public keys for the game: families of nearly orthogonal keys, each a deterministic function of (n, d, seed).

In the game, Alice hides values under the keys, in the KV cache of a method. Bob, who makes the same keys, reads each
value by a query along its key. `seed` is public and is never the seed of the hidden values. All families but `jl` have
unit norm. The gap of a key is its squared norm less its largest inner product with another key; docs/floors.md says how
it depends on n and d.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from kvfloor.floors.coherence import jl_dim_paper
from kvfloor.game.keys.codes import chirp, reed_solomon
from kvfloor.game.keys.tori import torus_keys

_CANDIDATES_PER_KEY = 8


def _random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rademacher(n: int, d: int, seed: int = 0) -> Tensor:
    """Draw n keys (n, d), float64, of independent fair signs ±1/sqrt(d)."""
    signs = torch.randint(0, 2, (n, d), generator=_random(seed), dtype=torch.int64)
    return (2.0 * signs.double() - 1.0) / math.sqrt(d)


def sphere(n: int, d: int, seed: int = 0) -> Tensor:
    """Draw n keys (n, d), float64, uniform on the unit sphere."""
    return _unit(torch.randn(n, d, generator=_random(seed), dtype=torch.float64))


def hypercube(n: int, d: int, seed: int = 0) -> Tensor:
    """List the first n of the 2^s sign vectors on s = max(1, ceil(log2 n)) coordinates as keys (n, d), float64.

    The signs are ±1/sqrt(s), and the d - s further coordinates are 0. The gap (1 less the largest inner product of two
    keys) is 2/s. `seed` is not used. Raises ValueError when d < s.
    """
    del seed
    signs = max(1, math.ceil(math.log2(n)))
    if signs > d:
        raise ValueError(f"the hypercube has 2^d keys: n={n} needs d of at least {signs}, got {d}")
    keys = torch.zeros(n, d, dtype=torch.float64)
    digit = (torch.arange(n).unsqueeze(1) >> torch.arange(signs)) & 1
    keys[:, :signs] = (2.0 * digit.double() - 1.0) / math.sqrt(signs)
    return keys


def jl(n: int, d: int, seed: int = 0) -> Tensor:
    """Draw the keys (n, d), float64, of Haris & Onak (COLT 2025): Gaussian entries of variance 1/d.

    These are n orthogonal unit vectors after a random (Johnson-Lindenstrauss) projection to d dimensions; their norms
    are only near 1. The paper's theorem needs d >= `jl_dimension(n)`. Below that, the gap (squared norm less largest
    inner product with another key) can be negative.
    Source: Haris & Onak (COLT 2025), Lemma 3.
    """
    return torch.randn(n, d, generator=_random(seed), dtype=torch.float64) / math.sqrt(d)


def jl_dimension(n: int, eps: float = 0.1) -> int:
    """Return the dimension that Haris & Onak (COLT 2025) require for n Gaussian keys (`jl`).

    In this dimension, all inner products of two keys are within eps of 0 with probability 1 - 1/n; the paper takes eps
    = 0.1.
    """
    return math.ceil(jl_dim_paper(n, eps))


def packing(n: int, d: int, seed: int = 0) -> Tensor:
    """Choose n unit keys (n, d), float64, one by one: each as far as possible from all keys chosen before.

    All are chosen from one pool of 8 n random unit vectors. The first key is the pool's first vector; each next key is
    the vector whose largest inner product with a chosen key is least. For d = 2 the best set is known and taken: n
    equally spaced points of the circle. For d = 1 there are only the keys ±1. Raises ValueError for d = 1 and n > 2.
    """
    if d == 1:
        return hypercube(n, d)
    if d == 2:
        angle = 2.0 * math.pi * torch.arange(n, dtype=torch.float64) / n
        return torch.stack([torch.cos(angle), torch.sin(angle)], dim=1)
    candidates = sphere(_CANDIDATES_PER_KEY * n, d, seed)
    chosen = torch.zeros(n, dtype=torch.int64)
    nearest = candidates @ candidates[0]
    for place in range(1, n):
        chosen[place] = torch.argmin(nearest)
        torch.maximum(nearest, candidates @ candidates[chosen[place]], out=nearest)
    return candidates[chosen]


def _unit(keys: Tensor) -> Tensor:
    return keys / keys.norm(dim=1, keepdim=True)


FAMILIES: dict[str, Callable[[int, int, int], Tensor]] = {
    "chirp": chirp,
    "reed_solomon": reed_solomon,
    "sphere": sphere,
    "rademacher": rademacher,
    "hypercube": hypercube,
    "packing": packing,
    "tori": torus_keys,
    "jl": jl,
}
