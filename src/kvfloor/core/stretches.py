"""Store a selector's index as lists of items, one or more lists per row, in flat tensors.

A row is one (batch item, kv head) stream. A selector picks the held tokens that a query reads. A selector's index is
what it stores about the held keys to find those of large logit: for example, an item for each token in sorted order, or
for each group of tokens. A place is a position in the flat tensors; each list grows in its own stretch, a range of
places. In shapes, r are the rows of a call.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kvfloor.core.arena import Arena
from kvfloor.core.fields import Field
from kvfloor.core.spec import Spec


class Stretches(Arena):
    """Store the lists of a selector's index; each item of a list has one entry in each column.

    A column is a named attribute: a flat tensor (places, ...) of any shape and dtype.
    """

    def __init__(
        self,
        spec: Spec,
        capacity: Tensor,
        columns: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
        lists: int = 1,
        fill: int = 0,
    ) -> None:
        """Make `lists` empty lists per row, each with space for capacity[r] items in row r.

        spec      the sizes and constants of the cache that the index belongs to; the tensors are on its device
        capacity  (rows,)
        columns   column name -> (shape, dtype) of one item's entry
        fill      number that places without an item get
        """
        self.lists, self.fill = lists, fill
        super().__init__(spec, capacity)
        for name, (shape, dtype) in columns.items():
            setattr(self, name, torch.full((self._places, *shape), fill, dtype=dtype, device=spec.device))

    @property
    def _own(self) -> tuple[str, ...]:
        own = (name for name, value in vars(self).items() if isinstance(value, Tensor))
        return tuple(name for name in own if name not in ("held", "capacity", "offset"))

    def across(self, name: str, rows: Tensor | None, width: int) -> Tensor:
        """Return the first `width` entries of each list in the column `name`: (r, lists, width, ...).

        rows: (r,) the rows to return; None: all rows. Entries behind a list's last item are arbitrary. The entries are
        copied only if capacities differ or `rows` is given.
        """
        column = getattr(self, name)
        if self.stride and rows is None:
            return self._table(column, 0, min(width, self.stride)).unflatten(0, (self.spec.rows, self.lists))
        return column[self.places(rows, width)]

    def write(self, name: str, rows: Tensor, held: Tensor, items: Tensor) -> None:
        """Replace the lists of `rows` (r,) in the column `name` by `items` (r, lists, w, ...).

        held (r,): each new list of row rows[i] has held[i] items, the first of the w entries in `items`. Where the old
        list was longer, the places behind the new one get the number `fill`. The attribute `self.held`, the lengths of
        all lists, is not changed: the caller sets it.
        """
        column = getattr(self, name)
        width = int(torch.maximum(held, self.held[rows]).max())
        if width > items.shape[2]:
            items = torch.nn.functional.pad(items, (0, width - items.shape[2]), value=self.fill)
        items = items[..., :width]
        if len(rows) == self.spec.rows and self.stride and bool((held == width).all()):
            self._table(column, 0, width).copy_(items.flatten(0, 1))
            return
        rank = torch.arange(width)
        items = items.masked_fill((rank >= held.unsqueeze(1)).unsqueeze(1).to(column.device), self.fill)
        inside = rank < torch.maximum(held, self.held[rows]).unsqueeze(1)
        inside = inside.unsqueeze(1).expand(-1, self.lists, -1).to(column.device)
        column[self.places(rows, width)[inside]] = items[inside]

    def fields(self) -> dict[str, Any]:
        return {name: Field(x.dtype, ("items", *x.shape[1:])) for _, name, x in self._arrays()}

    def require_sound(self, fields: dict[str, Any]) -> None:
        held, capacity = fields["held"], fields["capacity"]
        if bool((held > capacity).any()):
            raise ValueError(f"lists of {held.tolist()} items in {capacity.tolist()} places")
        sizes = {len(fields[name]) for name in self._own}
        if sizes != {int(held.sum()) * self.lists}:
            raise ValueError(f"{self.lists} lists of {held.tolist()} items, and {sizes} are there")
