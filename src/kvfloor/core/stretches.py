"""Store an index's lists, one or more per row, each in its own stretch of a flat arena."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kvfloor.core.fields import Field
from kvfloor.core.memory import Memory
from kvfloor.core.spec import Spec


class Stretches(Memory):
    """Store `lists` lists per row, of `used` items each, packed at the front of stretches of `capacity` places.

    An item is one entry in every column, a tensor (places, ...). Rows may differ in capacity, so per-row budgets free
    real bytes. Places beyond `used` hold `fill` until items stood there; their contents never enter a message.
    """

    def __init__(
        self,
        spec: Spec,
        capacity: Tensor,
        columns: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
        lists: int = 1,
        fill: int = 0,
    ) -> None:
        self.spec = spec
        self.lists, self.fill = lists, fill
        self.used = torch.zeros_like(capacity)
        self.capacity = capacity.clone()
        for name, (shape, dtype) in columns.items():
            setattr(self, name, torch.full((self._places(), *shape), fill, dtype=dtype, device=spec.device))

    def _places(self) -> int:
        return int(self.capacity.sum()) * self.lists

    def _columns(self) -> dict[str, Tensor]:
        own = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return {name: value for name, value in own.items() if name not in ("used", "capacity")}

    # ---- reading and writing -------------------------------------------------------------------------------

    def across(self, name: str, rows: Tensor | None, width: int) -> Tensor:
        """Return a column as (r, lists, width, ...); entries beyond `used` are `fill` or garbage.

        Copies only if capacities differ or not all rows are wanted.
        """
        column = getattr(self, name)
        if self._level and rows is None:
            stride = int(self.capacity[0])
            return column.view(self.spec.rows, self.lists, stride, *column.shape[1:])[:, :, :width]
        return column[self.places(rows, width)]

    def write(self, name: str, rows: Tensor, used: Tensor, items: Tensor) -> None:
        """Write the first used (r,) of items (r, lists, w) to the lists of `rows` (r,), and `fill` to their old end."""
        column = getattr(self, name)
        width = int(torch.maximum(used, self.used[rows]).max())
        if width > items.shape[2]:
            items = torch.nn.functional.pad(items, (0, width - items.shape[2]), value=self.fill)
        items = items[..., :width]
        if len(rows) == self.spec.rows and self._level and bool((used == width).all()):
            column.view(self.spec.rows, self.lists, -1)[:, :, :width] = items
            return
        rank = torch.arange(width)
        items = items.masked_fill((rank >= used.unsqueeze(1)).unsqueeze(1).to(column.device), self.fill)
        inside = rank < torch.maximum(used, self.used[rows]).unsqueeze(1)
        inside = inside.unsqueeze(1).expand(-1, self.lists, -1).to(column.device)
        column[self.places(rows, width)[inside]] = items[inside]

    @property
    def _level(self) -> bool:
        return bool((self.capacity == self.capacity[0]).all())

    def places(self, rows: Tensor | None, width: int) -> Tensor:
        """Return the places of the first `width` items of every list: (r, lists, width), clamped to the arena."""
        start = (torch.cumsum(self.capacity, 0) - self.capacity) * self.lists
        start = start.unsqueeze(1) + torch.arange(self.lists) * self.capacity.unsqueeze(1)
        start = start if rows is None else start[rows]
        place = start.unsqueeze(2) + torch.arange(width)
        return place.clamp_max(max(0, self._places() - 1)).to(self.spec.device)

    def live(self) -> Tensor:
        """Return the places of all items, list by list, row by row."""
        width = int(self.used.max()) if self.used.numel() else 0
        inside = (torch.arange(width) < self.used.unsqueeze(1)).unsqueeze(1).expand(-1, self.lists, -1)
        return self.places(None, width)[inside.to(self.spec.device)]

    def resize(self, capacity: Tensor) -> None:
        """Move to an arena of these capacities (rows,); a list keeps its first items where it does not fit."""
        self.used = torch.minimum(self.used, capacity)
        source, old = self.live(), self._columns()
        self.capacity = capacity.clone()
        target = self.live()
        for name, column in old.items():
            moved = column.new_full((self._places(), *column.shape[1:]), self.fill)
            moved[target] = column[source]
            self.move(name, moved)

    def bytes_by_row(self, rows: int) -> Tensor:
        """Return the bytes of each row: its own lists, and an equal part of the clocks."""
        return self._by_capacity(rows, self._columns().values(), self.capacity)

    # ---- as a part of a state ------------------------------------------------------------------------------

    def export(self) -> dict[str, Any]:
        live = self.live()
        items = {name: column[live] for name, column in self._columns().items()}
        return {"used": self.used, "capacity": self.capacity, **items}

    def fields(self) -> dict[str, Any]:
        items = {name: Field(x.dtype, ("items", *x.shape[1:])) for name, x in self._columns().items()}
        return items

    def require_sound(self, fields: dict[str, Any]) -> None:
        used, capacity = fields["used"], fields["capacity"]
        if bool((used > capacity).any()):
            raise ValueError(f"lists of {used.tolist()} items in {capacity.tolist()} places")
        sizes = {len(fields[name]) for name in self._columns()}
        if sizes != {int(used.sum()) * self.lists}:
            raise ValueError(f"{self.lists} lists of {used.tolist()} items, and {sizes} are there")

    def adopt(self, fields: dict[str, Any]) -> None:
        self.used, self.capacity = fields["used"], fields["capacity"]
        live = self.live()
        for name, column in self._columns().items():
            placed = column.new_full((self._places(), *column.shape[1:]), self.fill)
            placed[live] = fields[name].to(column.device)
            setattr(self, name, placed)

    def select_rows(self, index: Tensor) -> None:
        width = int(self.used.max())
        source = self.places(index, width)
        self.used, self.capacity = self.used[index], self.capacity[index]
        self.spec = self.spec.select(index)
        inside = (torch.arange(width) < self.used.unsqueeze(1)).unsqueeze(1).expand(-1, self.lists, -1)
        source, target = source[inside.to(source.device)], self.live()
        for name, column in self._columns().items():
            moved = column.new_full((self._places(), *column.shape[1:]), self.fill)
            moved[target] = column[source]
            setattr(self, name, moved)
