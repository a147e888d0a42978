"""Name public keys by a family, a size and a seed that Alice and Bob agree on, and make spike queries for them.

A spike query is a multiple of one key, long enough to give this key nearly all softmax mass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kvfloor.core.spec import DTYPES, Spec
from kvfloor.game.keys.families import FAMILIES, jl_dimension
from kvfloor.game.keys.gaps import best_family, one_sided_gaps
from kvfloor.validation import one_of

_LENGTH_STEP = 64.0  # query lengths are rounded up to 1/64, so that float noise in a gap cannot change a query


@dataclass(frozen=True)
class PublicKeys:
    """Name n keys of width d by a family and a public seed, from which Alice and Bob make the same table of keys."""

    family: str
    n: int
    d: int
    seed: int
    dtype: str = "float32"

    @classmethod
    def chosen(cls, family: str | None, n: int, d: int, seed: int, dtype: str = "float32") -> PublicKeys:
        """Return public keys of the given family, or of the family with the largest gap at (n, d) if None.

        Raises ValueError where there is no such family, or none with n keys that queries separate.
        """
        if family is None:
            return cls(best_family(n, d, seed), n, d, seed, dtype)
        keys = cls(one_of("family", family, tuple(FAMILIES)), n, d, seed, dtype)
        if family == "jl" and one_sided_gaps(FAMILIES["jl"](n, d, seed)).min() <= 0.0:
            raise ValueError(
                f"family 'jl' has keys that no query singles out at n={n}, d={d}; its theorem needs d >= "
                f"{jl_dimension(n)}; leave the family out to get the best one"
            )
        return keys

    @cached_property
    def table(self) -> Tensor:
        """Return the keys (n, d), in `dtype`."""
        return FAMILIES[self.family](self.n, self.d, self.seed).to(DTYPES[self.dtype])

    def aim(self, rows: Tensor, spec: Spec, length: Callable[[float, float], float]) -> tuple[Tensor, Tensor]:
        """Return the spike queries (m, d) of the keys at `rows` (m,), and their gaps (m,), by the function `aim`.

        A spike query gives its key nearly all softmax mass.
        """
        return aim(self.table, rows, spec, length)


def aim(keys: Tensor, rows: Tensor, spec: Spec, length: Callable[[float, float], float]) -> tuple[Tensor, Tensor]:
    """Return the spike query C_i k_i / scale of each key at `rows`, (m, d) in the spec's dtype, and the gaps (m,).

    A spike query gives its key nearly all softmax mass. `length` returns C from a key's one-sided gap (at most its
    squared norm) and its squared norm. Raises ValueError where a key's gap is not positive, so that no query singles it
    out.
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
