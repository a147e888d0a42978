"""Measure the one-sided gap of each key to all other keys, and choose the key family with the largest worst gap.

The keys are public keys of the game: Alice hides values under them, in the KV cache of a method, and Bob reads each
value by a query along its key. A key family is a rule that makes n keys of width d, such as random signs or a code. The
one-sided gap of a key is its squared norm less its largest inner product with another key. A query along the key can
put nearly all softmax mass on this key only if the gap is positive. The worst gap of a family is the smallest gap of
its keys.
"""

import torch
from torch import Tensor

from kvfloor.floors.coherence import gap_hypercube, mu_chirp, mu_rademacher, mu_reed_solomon, mu_sphere
from kvfloor.game.keys.codes import chirp_parameters, reed_solomon_parameters
from kvfloor.game.keys.families import FAMILIES

_MEASURED_UP_TO = 16_384  # keys; beyond it the quadratic measurement gives way to the formulas
_PACKED_UP_TO_D, _PACKED_UP_TO_N = 16, 4_096  # beyond either, greedy packing is slow and no better than a random code
_PRODUCTS_AT_ONCE = 2**24


def one_sided_gaps(keys: Tensor, rows: Tensor | None = None) -> Tensor:
    """Return the gaps |k_i|^2 - max_{j != i} <k_i, k_j> of the keys with indices `rows`, or of all keys: (m,) float64.

    keys (n, d) has any float type, and `rows` (m,) are indices into it. If n = 1, the gap is |k|^2. The time is
    proportional to n m d; products are computed in chunks, so that memory is bounded.
    """
    keys = keys.double()
    n = keys.shape[0]
    rows = torch.arange(n) if rows is None else rows
    gaps = torch.empty(len(rows), dtype=torch.float64)
    step = max(1, _PRODUCTS_AT_ONCE // n)
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        products = keys[part] @ keys.T
        own = torch.arange(len(part))
        norm = products[own, part].clone()
        products[own, part] = -torch.inf
        gaps[start : start + step] = norm - products.amax(dim=1) if n > 1 else norm
    return gaps


def promised_gaps(n: int, d: int) -> dict[str, float]:
    """Return a proven lower bound on the smallest gap of n keys in d dimensions for each key family: name -> bound.

    The gap of a key is its squared norm less its largest inner product with another key. Families that have no n keys
    in d dimensions, or no proven bound, are left out. Over the random draw of the keys, the bound holds with
    probability at least 1/2 for the family rademacher, and with some probability above 0 for sphere; for the others it
    is certain.
    """
    gaps: dict[str, float] = {}
    if chirp_code := chirp_parameters(n, d):
        gaps["chirp"] = 1.0 - mu_chirp(*chirp_code)
    if block_code := reed_solomon_parameters(n, d):
        gaps["reed_solomon"] = 1.0 - mu_reed_solomon(block_code[1], block_code[2])
    signs = max(1, (n - 1).bit_length())
    if signs <= d:
        gaps["hypercube"] = gap_hypercube(signs)
    if d >= 2:
        gaps["sphere"] = 1.0 - mu_sphere(n, d)
        gaps["rademacher"] = 1.0 - mu_rademacher(n, d, 0.5)
    return gaps


def best_family(n: int, d: int, seed: int = 0) -> str:
    """Return the name of the key family whose smallest gap is largest, among those that are cheap to make at (n, d).

    The gap of a key is its squared norm less its largest inner product with another key. Families are compared by
        chirp, reed_solomon, hypercube  the formula for the gap
        sphere, rademacher              the measured gap of the keys that `seed` draws, beyond 16,384 keys a formula
        packing                         the measured gap. Keys are chosen one by one, each as far as possible from those
                                        before, which takes long; so it is compared only for d = 2 and, up to 4,096
                                        keys, for d <= 16
    Raises ValueError where no family has n keys that queries can separate: for d = 1 and n > 2.
    """
    gaps = promised_gaps(n, d)
    if n <= _MEASURED_UP_TO:
        measured = [name for name in ("sphere", "rademacher") if name in gaps]
        if 2 <= d <= _PACKED_UP_TO_D and n <= _PACKED_UP_TO_N:
            measured.append("packing")
        for name in measured:
            gaps[name] = one_sided_gaps(FAMILIES[name](n, d, seed)).min().item()
    if d == 2:
        gaps.setdefault("packing", one_sided_gaps(FAMILIES["packing"](n, d, seed), torch.tensor([0])).item())
    family = max(gaps, key=lambda name: gaps[name], default=None)
    if family is None or gaps[family] <= 0.0:
        raise ValueError(f"no family has n={n} keys that a query can tell apart in d={d}; take d >= 2, or n <= 2")
    return family
