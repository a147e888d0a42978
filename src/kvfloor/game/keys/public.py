"""Define public keys by a family, a size and a seed that Alice and Bob share, and make spike queries for these keys.

In the game, Alice hides values under the keys, in the KV cache of a method. Bob reads each value by a spike query: a
multiple of one key, long enough to give this key nearly all softmax mass. The one-sided gap of a key is its squared
norm less its largest inner product with another key.
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
    """Define n keys of width d by a family and a public seed, from which Alice and Bob make the same table of keys.

    family  name of the rule that makes the keys, such as "chirp" (a code) or "sphere" (random unit keys)
    """

    family: str
    n: int
    d: int
    seed: int
    dtype: str = "float32"

    @classmethod
    def chosen(cls, family: str | None, n: int, d: int, seed: int, dtype: str = "float32") -> PublicKeys:
        """Return n public keys of width d of the given family, or, if it is None, of the family with the largest gap.

        The gap of a key is its squared norm less its largest inner product with another key; the gap of a family is the
        smallest gap of its n keys. Raises ValueError where there is no such family, or none with n keys of positive
        gap.
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
        """Return all keys as a tensor (n, d), in `dtype`."""
        return FAMILIES[self.family](self.n, self.d, self.seed).to(DTYPES[self.dtype])

    def aim(self, rows: Tensor, spec: Spec, length: Callable[[float, float], float]) -> tuple[Tensor, Tensor]:
        """Return the spike queries (m, d) of the keys with indices `rows` (m,), and the gaps (m,) of these keys.

        A spike query is a multiple of its key that gives this key nearly all softmax mass. The gap is the key's squared
        norm less its largest inner product with another key.
        spec    settings of the state that is queried, of which the logits' scale and the dtype are used
        length  called with (gap, squared norm) of a key; returns the factor C of the query C k / scale of the key k
        """
        return aim(self.table, rows, spec, length)


def aim(keys: Tensor, rows: Tensor, spec: Spec, length: Callable[[float, float], float]) -> tuple[Tensor, Tensor]:
    """Return the spike query C_i k_i / scale of each key i of `rows` (m,), as (m, d), and the gaps (m,) of these keys.

    A spike query gives its key nearly all softmax mass. The gap is the key's squared norm less its largest inner
    product with another key.
    keys    (n, d), all keys
    spec    settings of the state that is queried, of which the logits' scale and the dtype are used
    length  called with (gap, squared norm) of key i, the gap cut to at most the squared norm; returns C_i, which is
            rounded up to a multiple of 1/64
    Raises ValueError where a gap is not positive, so that no query singles the key out.
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
