"""Define the allowed values of each field of a saved state, so that loading refuses all other values.

A saved state is also called a message. A part of a state is a `Memory` object: its attributes are tensors, numbers, or
further parts. A field is one saved attribute of a part.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MOST = 1 << 48  # bounds any count or position: more tokens than any stream has, far from where sums overflow


@dataclass(frozen=True)
class Field:
    """Define the values that one field of a saved state may have: tensors of a dtype and shape, or numbers of a type.

    kind        dtype of a tensor, or bool, int or float for a number
    shape       one size per axis: a number, None for any size, or a word for a size that must be the same in all
                fields of the same part (a `Memory`) whose shapes use the word
    least, most bounds on every entry; None: unbounded. NaN violates every bound
    finite      True: entries may be neither NaN nor infinite
    optional    True: None is allowed too
    """

    kind: torch.dtype | type
    shape: tuple[int | str | None, ...] = ()
    least: float | None = None
    most: float | None = None
    finite: bool = False
    optional: bool = False

    @classmethod
    def like(cls, x: Tensor) -> Field:
        """Return the default field for a tensor attribute whose allowed values its class does not declare.

        x is the attribute's value in a newly opened part, which holds no token. A saved tensor must have the dtype and
        shape of x. An axis of size 0 in x grows with the stream, and may have any size. Integers are counts or
        positions: they must lie in 0 .. MOST (2^48).
        """
        counts = x.dtype in (torch.int64, torch.int32, torch.int16)
        shape = tuple(size or None for size in x.shape)
        return cls(x.dtype, shape, least=0 if counts else None, most=MOST if counts else None)

    def require(self, value: Any, where: str, sizes: dict[str, int]) -> None:
        """Raise ValueError unless this field allows `value`.

        where   path of the field in the saved state, for the error
        sizes   word used in a shape -> the size that it stands for, as found so far; the sizes of other words are taken
                from `value` and added
        """
        if value is None and self.optional:
            return
        if not isinstance(self.kind, torch.dtype):
            if type(value) is not self.kind or not isinstance(value, (bool, int, float)):
                raise ValueError(f"{where} is {value!r}, no {self.kind.__name__}")
            self._require_within(torch.tensor(float(value), dtype=torch.float64), where)
            return
        if not isinstance(value, Tensor) or value.dtype != self.kind:
            found = value.dtype if isinstance(value, Tensor) else repr(value)
            raise ValueError(f"{where} is {found}, not a {self.kind} tensor")
        wanted = tuple(sizes.get(size) if isinstance(size, str) else size for size in self.shape)
        fits = len(value.shape) == len(wanted)
        if not fits or any(size not in (None, found) for size, found in zip(wanted, value.shape, strict=True)):
            told = ", ".join("any" if size is None else str(size) for size in wanted)
            raise ValueError(f"{where} has shape {tuple(value.shape)}, not ({told})")
        sizes |= {size: found for size, found in zip(self.shape, value.shape, strict=True) if isinstance(size, str)}
        self._require_within(value, where)

    def _require_within(self, x: Tensor, where: str) -> None:
        if x.numel() == 0:
            return
        if self.finite and not bool(torch.isfinite(x).all()):
            raise ValueError(f"{where} has NaN or infinite entries")
        if self.least is not None and not bool((x >= self.least).all()):
            raise ValueError(f"{where} has entries below {self.least:g}")
        if self.most is not None and not bool((x <= self.most).all()):
            raise ValueError(f"{where} has entries above {self.most:g}")


def require_equal(found: Tensor, wanted: Tensor, what: str) -> None:
    """Raise ValueError unless the counts `found` in a saved state equal `wanted`, derived from its other fields.

    what: the name of the counts, for the error.
    """
    if not torch.equal(found, wanted):
        raise ValueError(f"{what}: {found.tolist()} where {wanted.tolist()} follow from the other fields")


def require_room(numbers: float, itemsize: int, what: str) -> None:
    """Raise ValueError if `numbers` entries of `itemsize` bytes each exceed the memory of this machine.

    Do nothing if the size of the memory is unknown. what: the name of the entries, for the error.
    """
    try:
        memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return
    if numbers * itemsize > memory_bytes > 0:
        raise ValueError(f"{what} would take {numbers * itemsize:.3g} bytes, more than this machine has")
