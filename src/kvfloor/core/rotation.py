"""Rotate keys and queries by RoPE, by a token's rank among the held tokens or by its position in the stream.

The rank is the token's index among the held tokens of its row, the oldest at 0. A place is the whole number that a
rotation angle is proportional to: a rank, or a position in the stream. A pair is two entries of a key or query that are
rotated together. A `Circle` is two tensors (..., pairs): the cosine and the sine of each pair's angle at each place.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvfloor.core.device import sent

_TABLE_PLACES = 1 << 15  # places whose cosines are kept; those of later places are computed at each call
_FIRST_PLACES = 1024

Circle = tuple[Tensor, Tensor]  # cosine and sine of every pair's angle, (..., pairs) each


@dataclass(frozen=True)
class Rotation:
    """Rotate pairs of a vector's entries by angles proportional to a place (Su et al. 2021, RoPE, arXiv 2104.09864).

    frequencies  radians per place, one number per pair
    start        index of the first rotated entry; two entries per pair are rotated, the others stay
    interleaved  True: pair i is the rotated entries 2i and 2i + 1; False: i and i + (number of pairs)
    At place p a pair (x, y) becomes (x cos a - y sin a, y cos a + x sin a), where the angle a is p times the pair's
    frequency. As in transformers, a is rounded to float32. So `turned` rotates as the model does, and with `back` it
    undoes the model's rotation exactly, however large p is.
    """

    frequencies: tuple[float, ...]
    start: int = 0
    interleaved: bool = False

    def __post_init__(self) -> None:
        frequencies = tuple(float(x) for x in self.frequencies)
        if not frequencies or not all(math.isfinite(x) for x in frequencies):
            raise ValueError(f"Rotation.frequencies must be finite numbers, one per pair, got {self.frequencies!r}")
        if not isinstance(self.start, int) or isinstance(self.start, bool) or self.start < 0:
            raise ValueError(f"Rotation.start must be a whole number >= 0, got {self.start!r}")
        object.__setattr__(self, "frequencies", frequencies)
        object.__setattr__(self, "_tables", {})

    @property
    def stop(self) -> int:
        """Return the index of the first entry of a vector after the rotated entries."""
        return self.start + 2 * len(self.frequencies)

    def circle(self, place: Tensor, dtype: torch.dtype, below: int | None = None) -> Circle:
        """Return the cosines and sines (..., pairs) of the angles at each place (...), int64, in `dtype`.

        below: all places are less than this number; None: unknown. Under a small bound the cosines and sines are looked
        up in a table, otherwise they are computed.
        """
        if below is None or below > _TABLE_PLACES:
            return self._computed(place, dtype)
        cos, sin = self._table(below, dtype, place.device)
        at = place.flatten()
        return tuple(x.index_select(0, at).view(*place.shape, -1) for x in (cos, sin))  # pyright: ignore[reportReturnType]

    def _computed(self, place: Tensor, dtype: torch.dtype) -> Circle:
        """Compute the cosines and sines (..., pairs) of the angles at each place (...), and round them to `dtype`.

        They are computed in float64, so that the bits of the result do not depend on how torch vectorises the
        computation.
        """
        frequency = sent(torch.tensor(self.frequencies, dtype=torch.float32), place.device)
        angle = (place.to(torch.float32).unsqueeze(-1) * frequency).to(torch.float64)
        return angle.cos().to(dtype), angle.sin().to(dtype)

    def _table(self, below: int, dtype: torch.dtype, device: torch.device) -> Circle:
        """Return the cosines and sines at places 0, 1, 2, ..., at least `below` of them: (places, pairs) each.

        The table is fixed by the rotation alone, so it is kept for later calls.
        """
        tables: dict[Any, Circle] = vars(self)["_tables"]
        table = tables.get((dtype, device))
        if table is None or table[0].shape[0] < below:
            places = _FIRST_PLACES
            while places < below:
                places *= 2
            table = tables[dtype, device] = self._computed(torch.arange(places, device=device), dtype)
        return table

    def turned(self, x: Tensor, circle: Circle, back: bool = False) -> Tensor:
        """Rotate x (..., d) by the angles of `circle`, or by the opposite angles if `back`; the result has x's dtype.

        `circle` has the angles' cosines and sines (..., pairs). The rotation is computed in the dtype of these tensors,
        and the result is rounded once.
        """
        cos, sin = circle[0], -circle[1] if back else circle[1]
        middle = x[..., self.start : self.stop].to(cos.dtype)
        if self.interleaved:
            one, two = middle[..., 0::2], middle[..., 1::2]
        else:
            one, two = middle.chunk(2, -1)
        new = (one * cos - two * sin, two * cos + one * sin)
        turned = (torch.stack(new, -1).flatten(-2) if self.interleaved else torch.cat(new, -1)).to(x.dtype)
        if turned.shape[-1] == x.shape[-1]:
            return turned
        return torch.cat([x[..., : self.start], turned, x[..., self.stop :]], -1)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON-ready dict, from which `from_dict` makes an equal rotation."""
        return {"frequencies": list(self.frequencies), "start": self.start, "interleaved": self.interleaved}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Rotation:
        return cls(tuple(plain["frequencies"]), plain["start"], plain["interleaved"])
