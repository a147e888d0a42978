"""Store many growing lists, such as each row's held tokens, in a few flat tensors: an arena.

A row is one (batch item, kv head) stream. A place is an index into the first axis of the flat tensors. Each list owns a
range of consecutive places, its stretch, and its items fill the front of the stretch. A list's capacity is the length
of its stretch; a place is empty if no item is in it. The spec has the sizes, dtype and constants of the cache that the
arena is a part of. In shapes, r is the number of rows of a call: those that an argument `rows` or `index` selects, or
all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvfloor.core.device import sent
from kvfloor.core.memory import Common, Memory, common
from kvfloor.core.spec import Spec


def grown(size: Any) -> Any:
    """Return the capacity to which a full list of capacity `size` grows: a quarter more, rounded up.

    `size` is an int or an int tensor. With this growth each item is copied four times on average, however many are
    added, and at most a fifth of the capacity is empty.
    """
    return size + (size + 3) // 4


class Arena(Memory):
    """Store `lists` lists per row; a list of row i has held[i] items, at the front of a stretch of capacity[i] places.

    For example, the held tokens of a row are a list, and a token is an item. Each item has one entry in each flat
    tensor, i.e. each tensor (places, ...) that `_arrays` returns. Rows may differ in capacity, so that a smaller budget
    takes less memory. Counts and offsets live on the CPU, so that control flow never waits for a device. An empty place
    holds the number `fill`, or what a dropped item left there; a saved state leaves empty places out.
    """

    lists: int = 1
    fill: int = 0
    _known_level: Common | None = None  # of `held`

    def __init__(self, spec: Spec, capacity: Tensor) -> None:
        self.spec = spec
        self.held = torch.zeros_like(capacity)
        self._lay_out(capacity.clone())

    def _lay_out(self, capacity: Tensor) -> None:
        self.capacity = capacity
        self.offset = (torch.cumsum(capacity, 0) - capacity) * self.lists  # the first place of each row's lists
        self.stride = int(capacity[0]) if bool((capacity == capacity[0]).all()) else 0  # 0: rows differ

    @property
    def _own(self) -> tuple[str, ...]:
        """Return the names of those attributes of this object that are flat tensors, with one entry per place."""
        raise NotImplementedError

    def _arrays(self) -> list[tuple[Memory, str, Tensor]]:
        """Return every flat tensor as (object that it is an attribute of, attribute name, tensor).

        The object is this arena, or a part of it that has flat tensors too.
        """
        return [(self, name, getattr(self, name)) for name in self._own]

    def _moved(self) -> None:
        """Update the attributes that alias a flat tensor, after the tensor was replaced, e.g. by `resize`."""

    @property
    def _places(self) -> int:
        """Return the total number of places of all lists, empty ones included."""
        return int(self.capacity.sum()) * self.lists

    def _empty(self, like: Tensor) -> Tensor:
        """Return a new flat tensor of empty places for all lists, with the entry shape and the dtype of `like`."""
        return like.new_full((self._places, *like.shape[1:]), self.fill)

    @property
    def level(self) -> int | None:
        """Return the number of items per list if all rows have the same number and the same capacity, else None."""
        if not self.stride:
            return None
        self._known_level = common(self.held, self._known_level)
        return self._known_level[1]

    # ---- places ----------------------------------------------------------------------------------------------------

    def places(self, rows: Tensor | None, width: int) -> Tensor:
        """Return the first `width` places of every list of `rows` (None: all), as indices (r, lists, width).

        The indices are into the flat tensors. If `width` exceeds the length of a list's stretch, the list's indices run
        on into the next stretch. Indices beyond the arena's last place are replaced by that place.
        """
        return sent(self._places_here(rows, width), self.spec.device)

    def _places_here(self, rows: Tensor | None, width: int) -> Tensor:
        """Return what `places` does, on the host."""
        offset, capacity = (x if rows is None else x[rows] for x in (self.offset, self.capacity))
        start = offset.unsqueeze(1) + torch.arange(self.lists) * capacity.unsqueeze(1)
        place = start.unsqueeze(2) + torch.arange(width)
        return place.clamp_max(max(0, self._places - 1))

    def live(self, rows: Tensor | None = None) -> Tensor:
        """Return the places of all items, row by row and list by list, as 1-d indices into the flat tensors.

        `rows` (r,) selects rows, which may repeat; None: all.
        """
        held = self.held if rows is None else self.held[rows]
        width = int(held.max()) if held.numel() else 0
        inside = (torch.arange(width) < held.unsqueeze(1)).unsqueeze(1).expand(-1, self.lists, -1)
        return sent(self._places_here(rows, width)[inside], self.spec.device)

    def _table(self, x: Tensor, start: int, stop: int, stride: int | None = None) -> Tensor:
        """View places start .. stop - 1 of every list in the flat tensor x: (rows * lists, stop - start, ...).

        Places are counted from the start of each list's stretch. All stretches must have the same length, `stride`
        places (None: their present length). The view is one torch operation, because in decoding an operation's
        overhead exceeds its work.
        """
        stride, (slot, *inner) = stride or self.stride, x.stride()
        shape = (self.spec.rows * self.lists, stop - start, *x.shape[1:])
        return x.as_strided(shape, (stride * slot, slot, *inner), x.storage_offset() + start * slot)

    # ---- size and rows ---------------------------------------------------------------------------------------------

    def resize(self, capacity: Tensor) -> None:
        """Move all items to an arena with these capacities (rows,); a list that does not fit keeps its first items."""
        self.held = torch.minimum(self.held, capacity)
        level, stride = self.level, self.stride
        if bool((capacity != capacity[0]).any()):
            level = None
        source = self.live() if level is None else None
        self._lay_out(capacity.clone())
        target = self.live() if level is None else None
        for owner, name, store in self._arrays():
            moved = self._empty(store)
            if level is None:
                moved[target] = store[source]
            elif level:  # one stride before and after: no index needed
                self._table(moved, 0, level).copy_(self._table(store, 0, level, stride))
            owner.move(name, moved)
        self._moved()

    def select_rows(self, index: Tensor) -> None:
        source = self.live(index)
        self.held = self.held[index]
        self.spec = self.spec.select(index)
        self._lay_out(self.capacity[index])
        target = self.live()
        for owner, name, store in self._arrays():
            moved = self._empty(store)
            moved[target] = store[source]
            setattr(owner, name, moved)
        self._moved()

    def bytes_by_row(self, rows: int) -> Tensor:
        """Return the bytes of memory of each row, (rows,).

        The bytes of the flat tensors are split among the rows by capacity, all other bytes equally. The argument `rows`
        is the number of rows.
        """
        arena_bytes = sum(x.untyped_storage().nbytes() for _, _, x in self._arrays())
        owned = arena_bytes * self.capacity.to(torch.float64) / max(1, int(self.capacity.sum()))
        return owned + (self.nbytes - arena_bytes) / rows

    # ---- as a part of a state --------------------------------------------------------------------------------------

    def _export(self, owner: Memory) -> dict[str, Any]:
        """Return {attribute name: entries of all items} for the flat tensors that are attributes of the object `owner`.

        Each is (items, ...). Entries of empty places are left out.
        """
        live = self.live()
        return {name: x[live] for of, name, x in self._arrays() if of is owner}

    def export(self) -> dict[str, Any]:
        """Return what a saved state keeps of this arena, by name: the counts, the capacities and all items' entries.

        Empty places are left out, so what dropped items left there is never saved.
        """
        return {"held": self.held, "capacity": self.capacity, **self._export(self)}

    def adopt(self, fields: dict[str, Any]) -> None:
        self.held = fields["held"]
        self._lay_out(fields["capacity"])
        live = self.live()
        for owner, name, store in self._arrays():
            placed = self._empty(store)
            sent = self._sent(fields, owner, name)
            if sent is not None:
                placed[live] = sent.to(store.device)
            setattr(owner, name, placed)
        self._moved()

    def _sent(self, fields: dict[str, Any], owner: Memory, name: str) -> Tensor | None:
        """Return the saved entries of one flat tensor, the attribute `name` of the object `owner`.

        `fields` is what `export` returned. Returns None if `export` leaves this attribute out.
        """
        del owner
        return fields[name]
