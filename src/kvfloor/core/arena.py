"""Store lists of items of all rows in flat tensors, each list in a stretch of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvfloor.core.memory import Memory
from kvfloor.core.spec import Spec


def grown(size: Any) -> Any:
    """Return the next capacity (an int or a tensor) of a full list: a quarter more, rounded up.

    So each item is copied four times on average, however many come, and a fifth of the capacity at most is empty.
    """
    return size + (size + 3) // 4


class Arena(Memory):
    """Store `lists` lists per row, of held[r] items each, at the front of stretches with capacity[r] places.

    An item is one entry in each of the flat tensors that `_arrays` names, of shape (places, ...). Rows may differ in
    capacity, so that per-row budgets free real bytes. Counts and offsets live on the CPU, so that control flow never
    waits for a device. Places without an item hold `fill`, or an item that was dropped; neither enters a message.
    """

    lists: int = 1
    fill: int = 0

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
        """Return the names of the attributes that hold one entry per item."""
        raise NotImplementedError

    def _arrays(self) -> list[tuple[Memory, str, Tensor]]:
        """Return every tensor with one entry per item, as (owner, attribute, tensor)."""
        return [(self, name, getattr(self, name)) for name in self._own]

    def _moved(self) -> None:
        """Restore what follows from the tensors after all of them were replaced."""

    @property
    def _places(self) -> int:
        """Return the number of places of all lists."""
        return int(self.capacity.sum()) * self.lists

    @property
    def level(self) -> int | None:
        """Return the items of each list, if all rows hold equally many in stretches of one length; otherwise None."""
        counts = self.held.tolist()
        return counts[0] if self.stride and min(counts) == max(counts) else None

    # ---- places ----------------------------------------------------------------------------------------------------

    def places(self, rows: Tensor | None, width: int) -> Tensor:
        """Return the places of the first `width` items of every list of `rows`: (r, lists, width).

        Places beyond the arena are replaced by its last one.
        """
        offset, capacity = (x if rows is None else x[rows] for x in (self.offset, self.capacity))
        start = offset.unsqueeze(1) + torch.arange(self.lists) * capacity.unsqueeze(1)
        place = start.unsqueeze(2) + torch.arange(width)
        return place.clamp_max(max(0, self._places - 1)).to(self.spec.device)

    def live(self, rows: Tensor | None = None) -> Tensor:
        """Return the places of all items, row by row and list by list: 1-d. `rows` (r,) may repeat; None: all."""
        held = self.held if rows is None else self.held[rows]
        width = int(held.max()) if held.numel() else 0
        inside = (torch.arange(width) < held.unsqueeze(1)).unsqueeze(1).expand(-1, self.lists, -1)
        return self.places(rows, width)[inside.to(self.spec.device)]

    def _table(self, x: Tensor, start: int, stop: int, stride: int | None = None) -> Tensor:
        """Return places start .. stop - 1 of every list in a flat tensor, as a view (rows * lists, stop - start, ...).

        The lists have stretches of one length, `stride`. The view is one operation, because in decoding an operation's
        overhead is more than its work.
        """
        stride, (slot, *inner) = stride or self.stride, x.stride()
        shape = (self.spec.rows * self.lists, stop - start, *x.shape[1:])
        return x.as_strided(shape, (stride * slot, slot, *inner), start * slot)

    # ---- size and rows ---------------------------------------------------------------------------------------------

    def resize(self, capacity: Tensor) -> None:
        """Move to an arena with these capacities (rows,). A list keeps its first items where it does not fit."""
        self.held = torch.minimum(self.held, capacity)
        level, stride = self.level, self.stride
        if bool((capacity != capacity[0]).any()):
            level = None
        source = self.live() if level is None else None
        self._lay_out(capacity.clone())
        target = self.live() if level is None else None
        for owner, name, store in self._arrays():
            moved = store.new_full((self._places, *store.shape[1:]), self.fill)
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
            moved = store.new_full((self._places, *store.shape[1:]), self.fill)
            moved[target] = store[source]
            setattr(owner, name, moved)
        self._moved()

    def bytes_by_row(self, rows: int) -> Tensor:
        """Return the bytes of each row (rows,): its own stretches, and an equal part of the clocks."""
        arena_bytes = sum(x.untyped_storage().nbytes() for _, _, x in self._arrays())
        owned = arena_bytes * self.capacity.to(torch.float64) / max(1, int(self.capacity.sum()))
        return owned + (self.nbytes - arena_bytes) / rows

    # ---- as a part of a state --------------------------------------------------------------------------------------

    def _export(self, owner: Memory) -> dict[str, Any]:
        """Return the entries of the items alone, by the attributes of `owner`."""
        live = self.live()
        return {name: x[live] for of, name, x in self._arrays() if of is owner}

    def export(self) -> dict[str, Any]:
        """Return the items only: what dropped items left in their places never reaches a message."""
        return {"held": self.held, "capacity": self.capacity, **self._export(self)}

    def adopt(self, fields: dict[str, Any]) -> None:
        self.held = fields["held"]
        self._lay_out(fields["capacity"])
        live = self.live()
        for owner, name, store in self._arrays():
            placed = store.new_full((self._places, *store.shape[1:]), self.fill)
            sent = self._sent(fields, owner, name)
            if sent is not None:
                placed[live] = sent.to(store.device)
            setattr(owner, name, placed)
        self._moved()

    def _sent(self, fields: dict[str, Any], owner: Memory, name: str) -> Tensor | None:
        """Return the entries of the items that `export` put in `fields` for this attribute; None if it sends none."""
        del owner
        return fields[name]
