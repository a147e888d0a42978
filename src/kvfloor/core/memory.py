"""Measure, copy and export the memory of a state by walking its attributes.

No method declares its own size: `nbytes` walks the attributes of a state and everything they reach, counts every
storage once, and raises TypeError on any object whose size it cannot measure.

A state is a cache method's memory of its streams; a row is one (batch item, kv head) stream, a slot the place of one
held token. A part of a state is a `Memory` object. A storage is the block of bytes behind one or several tensors. A
newly opened part is one that was made, empty, from the method (configuration) and the spec (sizes and constants) alone.
A message is a saved state, the bytes that `State.to_bytes` returns. Its fields are the saved attributes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from kvfloor.core.fields import Field

# Not memory: values fixed before the stream, so known to any reader of a message; the record of past sizes; the
# callback; the count of what was read; the name of the running call; what is kept outside of the memory, which
# `State.cold_nbytes` counts; and what a step remembers of the tensors that it has looked at (`_known...`).
_KNOWN = frozenset(
    {
        "_known_level",
        "_known_tables",
        "_known_numbers",
        "_known_arrays",
        "_known_coded",
        "_known_clock",
        "_known_finite",
        "_known_graphs",
    }
)
PUBLIC = frozenset({"method", "spec", "shared", "peak", "on_evict", "tally", "cold", "_underway"}) | _KNOWN
SCALAR_BYTES = 8


class Memory:
    """Store a part of a state: its attributes are tensors, numbers, None, or further parts (`Memory`).

    The attributes named in PUBLIC, such as `method` and `spec`, are neither counted as memory nor exported.
    """

    peak = 0  # most bytes this part's own tensors took so far, set where storage is moved (old and new at once)

    @property
    def nbytes(self) -> int:
        """Return the bytes of all tensors and numbers in this part and the parts inside it, each storage counted once.

        Raises TypeError for an attribute whose size cannot be measured.
        """
        storages: dict[int, int] = {}
        scalars = _walk(self, storages, "state")
        return sum(storages.values()) + scalars

    @property
    def peak_nbytes(self) -> int:
        """Return the most bytes held at any time so far, including the copies made while storage grew or shrank."""
        return self.nbytes + self._excess()

    def bytes_by_row(self, rows: int) -> Tensor:
        """Return `nbytes` split by row, (rows,) float64; `rows` is the number of rows.

        The bytes of a row's own slots count for that row; all other bytes are split equally.
        """
        total = torch.zeros(rows, dtype=torch.float64)
        for name, value in vars(self).items():
            if name in PUBLIC:
                continue
            if isinstance(value, Memory):
                total += value.bytes_by_row(rows)
            else:
                storages: dict[int, int] = {}
                total += (_walk(value, storages, name) + sum(storages.values())) / rows
        return total

    def _excess(self) -> int:
        parts = [value for name, value in vars(self).items() if name not in PUBLIC and isinstance(value, Memory)]
        inside = sum(part._excess() for part in parts)
        return inside + max(0, self.peak - self._own_bytes())

    def _own_bytes(self) -> int:
        """Return the bytes of this part's own tensors; a storage that two tensors share counts once."""
        storages: dict[int, int] = {}
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and name not in PUBLIC:
                _walk(value, storages, name)
        return sum(storages.values())

    def move(self, name: str, new: Tensor) -> None:
        """Replace the tensor attribute `name` by its copy `new` in other storage.

        The bytes of both together are recorded, for `peak_nbytes`.
        """
        self.peak = max(self.peak, self._own_bytes() + new.untyped_storage().nbytes())
        setattr(self, name, new)

    def export(self) -> dict[str, Any]:
        """Return the attributes that a saved state keeps of this part, by name.

        The values are tensors, numbers, None, or nested dicts of them, one dict for each part inside this one. The
        attributes named in PUBLIC are left out.
        """
        return {name: _export(value, name) for name, value in vars(self).items() if name not in PUBLIC}

    def fields(self) -> dict[str, Any]:
        """Return the allowed values of the saved attributes that may change after the part was opened: {name: `Field`}.

        A saved state is checked against them before it is loaded. Where `export` returns nested dicts, so does this
        method. An attribute that is not named here is compared with the same attribute of a newly opened part. A number
        must be equal. A tensor must have the same dtype and shape, but an axis of size 0 in the new part may have any
        size.
        """
        return {}

    def require_sound(self, fields: dict[str, Any]) -> None:
        """Raise ValueError if the fields of a saved state contradict each other.

        It is called last, when every field by itself has an allowed value.
        """

    def require(self, fields: Any, where: str = "") -> None:
        """Raise ValueError unless the `fields` of a saved state can be loaded into this newly opened part by `adopt`.

        where: path of this part in the saved state, for the error.
        """
        opened, declared = self.export(), self.fields()
        sizes: dict[str, int] = {}
        _require_names(fields, opened, where)
        for name, value in fields.items():
            mine = vars(self).get(name)
            if isinstance(mine, Memory) and name not in declared:
                mine.require(value, f"{where}{name}/")
            else:
                _require_field(declared.get(name), opened[name], value, where + name, sizes)
        self.require_sound(fields)

    def adopt(self, fields: dict[str, Any]) -> None:
        """Load saved `fields` into this newly opened part.

        `fields` is what `export` returned for another part of the same method and spec.
        """
        for name, value in fields.items():
            mine = getattr(self, name)
            if isinstance(mine, Memory):
                mine.adopt(value)
            elif isinstance(value, Tensor):  # clocks are on the CPU from the start, and stay there
                setattr(self, name, value.to(mine.device if isinstance(mine, Tensor) else vars(self)["spec"].device))
            else:
                setattr(self, name, value)

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes to copy or pickle: all but what a step remembers of tensors that it has looked at."""
        return {name: value for name, value in vars(self).items() if name not in _KNOWN}

    def select_rows(self, index: Tensor) -> None:
        """Keep only the rows at `index` (r,), in this order, repeats allowed.

        Parts whose tensors do not have rows as first axis override this.
        """
        for name, value in vars(self).items():
            if name == "spec":
                self.spec = value.select(index)
            elif name in PUBLIC:
                continue
            elif isinstance(value, Memory):
                value.select_rows(index)
            elif isinstance(value, Tensor):
                setattr(self, name, value.index_select(0, index.to(value.device)))

    def copied(self) -> Any:
        """Return an independent copy of this part, which shares only the attributes named in PUBLIC with it.

        The shared attributes do not count as memory: for example the method, the spec, and tensors that are fixed by
        the two alone.
        """
        keep = {id(getattr(self, name)): getattr(self, name) for name in PUBLIC if hasattr(self, name)}
        return copy.deepcopy(self, keep)


Common = tuple[ref[Tensor], int | None]
"""A tensor of counts, and the number that all of them are; None if they differ."""


def common(counts: Tensor, known: Common | None) -> Common:
    """Return the number that all counts (rows,) are, beside a reference to them; `known` if it is of these counts.

    Counts never change in place: a change makes a new tensor.
    """
    if known is not None and known[0]() is counts:
        return known
    numbers = counts.tolist()
    return ref(counts), numbers[0] if min(numbers) == max(numbers) else None


def joined(parts: Sequence[Any], where: str = "") -> Any:
    """Join saved states of one method along their rows: return the fields of one state with the rows of all `parts`.

    parts: what `export` returned for the states, whose streams must be equally long; their rows come in the order of
    `parts`. All tensors have rows, or items listed row by row, as their first axis; numbers are the same in all parts.
    where: path of the fields, for the error. Raises ValueError for parts that differ in anything but their rows.
    """
    first = parts[0]
    if isinstance(first, dict) and all(isinstance(part, dict) and part.keys() == first.keys() for part in parts):
        return {name: joined([part[name] for part in parts], f"{where}{name}/") for name in first}
    tensors = [part for part in parts if isinstance(part, Tensor)]
    if len(tensors) == len(parts) and len({(x.dtype, x.shape[1:]) for x in tensors}) == 1:
        return torch.cat(tensors)
    if not tensors and all(type(part) is type(first) and part == first for part in parts):
        return first
    raise ValueError(f"states differ in {where.rstrip('/')}, so that their rows cannot be joined")


def _require_names(fields: Any, opened: dict[str, Any], where: str) -> None:
    if not isinstance(fields, dict):
        raise ValueError(f"{where or 'the state'} is {fields!r}, no part with fields")
    differ = set(fields) ^ set(opened)
    if differ:
        raise ValueError(f"the fields of {where or 'the state'} differ from this release's in {sorted(differ)}")


def _require_field(declared: Any, opened: Any, value: Any, where: str, sizes: dict[str, int]) -> None:
    """Raise ValueError unless a saved `value` may replace `opened`, the same attribute of a newly opened part.

    declared  the allowed values (a `Field`), a dict of fields for a nested value, or None if the part declares none
    where     path of the value in the saved state, for the error
    sizes     word in a field's shape -> the size that it stands for, as found so far; new words are added
    """
    if isinstance(declared, Field):
        declared.require(value, where, sizes)
    elif isinstance(opened, dict):
        _require_names(value, opened, f"{where}/")
        for name, inner in value.items():
            _require_field((declared or {}).get(name), opened[name], inner, f"{where}/{name}", sizes)
    elif isinstance(opened, Tensor):
        Field.like(opened).require(value, where, sizes)
    elif type(value) is not type(opened) or value != opened:
        raise ValueError(f"{where} is {value!r}; a state opened for this method and spec has {opened!r}")


def _export(value: Any, name: str) -> Any:
    if isinstance(value, Memory):
        return value.export()
    if value is None or isinstance(value, (Tensor, bool, int, float)):
        return value
    raise TypeError(f"{name} is a {type(value).__name__}: a state sends tensors, numbers, None and Memory only")


def _walk(value: Any, storages: dict[int, int], path: str) -> int:
    """Add the bytes of each tensor storage inside `value` to `storages`, by the storage's address.

    Returns the bytes of everything else inside `value`: numbers, texts and containers. path: the name of the value, for
    errors.
    """
    if value is None:
        return 0
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_quantized:
            raise TypeError(f"{path} is a {value.layout} tensor; only dense ones can be sized")
        storage = value.untyped_storage()
        storages[storage.data_ptr() or id(storage)] = storage.nbytes()
        return 0
    if isinstance(value, (bool, int, float)):
        return max(SCALAR_BYTES, (int(value).bit_length() + 7) // 8 if isinstance(value, int) else 0)
    if isinstance(value, (str, bytes, bytearray)):
        return len(value)
    if isinstance(value, (list, tuple, set, frozenset)):
        return SCALAR_BYTES + sum(_walk(item, storages, f"{path}[]") for item in value)
    if isinstance(value, dict):
        return SCALAR_BYTES + sum(
            _walk(key, storages, path) + _walk(item, storages, f"{path}[{key!r}]") for key, item in value.items()
        )
    if isinstance(value, Memory):
        return sum(_walk(item, storages, f"{path}.{name}") for name, item in vars(value).items() if name not in PUBLIC)
    raise TypeError(f"{path} is a {type(value).__name__}, which cannot be sized: keep tensors, numbers or Memory")
