"""Queries that single out one public key each."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from kvfloor.core.spec import Spec
from kvfloor.game.keys.gaps import one_sided_gaps

_LENGTH_STEP = 64.0  # query lengths are rounded up to 1/64, so that float noise in a gap cannot change a query


def aim(keys: Tensor, rows: Tensor, spec: Spec, length: Callable[[float, float], float]) -> tuple[Tensor, Tensor]:
    """One spike query C_i k_i / scale per row (m, d) in the spec's dtype, and the rows' one-sided gaps (m,).

    `length` gives C from a key's gap (at most its squared norm) and its squared norm. Raises ValueError where a key
    does not stand out from the others.
    """
    gaps = one_sided_gaps(keys, rows)
    if not bool((gaps > 0.0).all()):
        raise ValueError(
            f"some of the {len(keys)} keys in d={keys.shape[1]} dimensions cannot be singled out by any query (worst "
            f"gap {gaps.min().item():.3g}): raise d, lower n, or leave the family out to get the best one"
        )
    norms = keys[rows].double().square().sum(dim=1)
    lengths = [
        math.ceil(_LENGTH_STEP * length(min(gap, norm), norm)) / _LENGTH_STEP
        for gap, norm in zip(gaps.tolist(), norms.tolist(), strict=True)
    ]
    scaled = torch.tensor(lengths, dtype=torch.float64) / spec.scale
    return (keys[rows].double() * scaled.unsqueeze(1)).to(spec.dtype), gaps
