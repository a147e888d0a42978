"""Slots: the one token store. A flat arena of keys and values with an offset and a capacity per row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvfloor.core.memory import Memory
from kvfloor.core.spec import Spec


@dataclass(frozen=True)
class View:
    """Some rows' slots side by side: k (r, s, d), v (r, s, dv), position (r, s), live (r, s) or None if all are."""

    k: Tensor
    v: Tensor
    live: Tensor | None
    fetch: Callable[[], Tensor] = field(repr=False)

    @property
    def position(self) -> Tensor:
        """When a slot's token came; fetched when asked for, as attention needs none."""
        return self.fetch()


class Slots(Memory):
    """Held tokens of every row, packed at the front of the row's stretch of the arena.

    A row's slots carry no order; `position` says when a token came. Rows may have different capacities (per-head
    budgets free real bytes) and different fill (`held`). `columns` are per-slot numbers that a policy keeps, zero
    where a slot holds no token. Clocks and counts live on the CPU, so that control flow never waits for a device.
    """

    def __init__(self, spec: Spec, capacities: Sequence[int], columns: dict[str, torch.dtype] | None = None) -> None:
        self.spec = spec
        self.held = torch.zeros(spec.rows, dtype=torch.int64)
        self.columns = Columns()
        self._lay_out(torch.tensor(list(capacities), dtype=torch.int64))
        total = int(self.capacity.sum())
        self.k = torch.zeros(total, spec.d, dtype=spec.dtype, device=spec.device)
        self.v = self.k if spec.tied else torch.zeros(total, spec.dv, dtype=spec.dtype, device=spec.device)
        self.position = torch.zeros(total, dtype=torch.int64, device=spec.device)
        for name, dtype in (columns or {}).items():
            setattr(self.columns, name, torch.zeros(total, dtype=dtype, device=spec.device))

    def _lay_out(self, capacity: Tensor) -> None:
        self.capacity = capacity
        self.offset = torch.cumsum(capacity, 0) - capacity
        self.stride = int(capacity[0]) if bool((capacity == capacity[0]).all()) else 0  # 0: ragged

    @property
    def _own(self) -> tuple[str, ...]:
        """What is kept of every token beside the columns; of keys that are values as well, one copy."""
        return ("k", "position") if self.spec.tied else ("k", "v", "position")

    def _columns(self) -> dict[str, Tensor]:
        return self.columns.tensors()

    def _arrays(self) -> list[tuple[Any, str, Tensor]]:
        """Every per-slot tensor, as (owner, attribute, tensor)."""
        own = [(self, name, getattr(self, name)) for name in self._own]
        return own + [(self.columns, name, tensor) for name, tensor in self._columns().items()]

    @property
    def level(self) -> int | None:
        """Tokens in every row, where rows are in step: as many in each, in stretches of one length; None elsewhere."""
        counts = self.held.tolist()
        return counts[0] if self.stride and min(counts) == max(counts) else None

    # ---- reading -------------------------------------------------------------------------------------------

    def view(self, rows: Tensor | None = None, width: int | None = None) -> View:
        """The slots of `rows` (all if None), `width` wide (default: the fullest row). Copies only if ragged."""
        held = self.held if rows is None else self.held[rows]
        counts = held.tolist()
        if width is None:
            width = max(counts, default=0)
        live = None
        if min(counts, default=width) < width:
            live = torch.arange(width) < held.unsqueeze(1)
            live = live.to(self.k.device)
        k, v = (self.across(x, rows, width) for x in (self.k, self.v))
        return View(k, v, live, lambda: self.across(self.position, rows, width))

    def across(self, x: Tensor, rows: Tensor | None, width: int) -> Tensor:
        """A per-slot tensor as (rows, width, ...)."""
        if self.stride:
            table = self._table(x, 0, min(width, self.stride))
            return table if rows is None else table[rows.to(x.device)]
        return x[self._index(rows, width)]

    def _table(self, x: Tensor, start: int, stop: int, stride: int | None = None) -> Tensor:
        """Slots start .. stop - 1 of every row of a per-slot tensor, as a view (rows, stop - start, ...).

        Rows have stretches of one length, `stride`. One operation, because each costs more than its work in decoding.
        """
        stride, (slot, *inner) = stride or self.stride, x.stride()
        shape = (self.spec.rows, stop - start, *x.shape[1:])
        return x.as_strided(shape, (stride * slot, slot, *inner), start * slot)

    def fetch(self, x: Tensor, slot: Tensor, rows: Tensor | None = None) -> Tensor:
        """A per-slot tensor at slot (r, m, c) of each of `rows`, copied: (r, m, c, ...)."""
        offset = (self.offset if rows is None else self.offset[rows]).to(slot.device).view(-1, 1, 1)
        index = (offset + slot).clamp_max(x.shape[0] - 1).flatten()
        return x.index_select(0, index).view(*slot.shape, *x.shape[1:])

    def column(self, name: str, rows: Tensor | None, width: int) -> Tensor:
        return self.across(getattr(self.columns, name), rows, width)

    def _index(self, rows: Tensor | None, width: int) -> Tensor:
        offset = self.offset if rows is None else self.offset[rows]
        index = (offset.unsqueeze(1) + torch.arange(width)).clamp_max(self.k.shape[0] - 1)
        return index.to(self.k.device)

    def live_index(self) -> Tensor:
        """Arena indices of all held tokens, row by row, in slot order."""
        width = int(self.held.max()) if self.held.numel() else 0
        live = torch.arange(width) < self.held.unsqueeze(1)
        return (self.offset.unsqueeze(1) + torch.arange(width))[live].to(self.k.device)

    # ---- writing -------------------------------------------------------------------------------------------

    def push(self, k: Tensor, v: Tensor, position: Tensor, take: Tensor) -> None:
        """Add the first take[r] of row r's tokens: k (rows, a, d), v (rows, a, dv), position (rows, a)."""
        a, at = k.shape[1], self.level if min(take.tolist()) == k.shape[1] else None
        if at is None or at + a > self.stride:
            self._reserve(self.held + take)
        given = {"k": k, "v": v, "position": position}
        if at is not None:
            for name in self._own:
                self._table(getattr(self, name), at, at + a).copy_(given[name])
        else:
            wanted = torch.arange(a) < take.unsqueeze(1)
            slot = (self.offset + self.held).unsqueeze(1) + torch.arange(a)
            slot, wanted = slot[wanted].to(self.k.device), wanted.to(self.k.device)
            for name in self._own:
                getattr(self, name)[slot] = given[name][wanted]
        self.held = self.held + take

    def put(self, k: Tensor, v: Tensor, position: int) -> None:
        """`push` of one token of this position to every row, for rows in step that have room for it."""
        at = self.held.tolist()[0]
        self._table(self.k, at, at + 1).copy_(k)
        if not self.spec.tied:
            self._table(self.v, at, at + 1).copy_(v)
        self.position[at :: self.stride] = position
        self.held = self.held + 1

    def put_column(self, name: str, rows: Tensor | None, values: Tensor) -> None:
        """Write a column back for `rows`: values (r, width)."""
        store, level = getattr(self.columns, name), self.level if rows is None else None
        if level is not None:
            self.across(store, None, level).copy_(values[:, :level])
            return
        held = self.held if rows is None else self.held[rows]
        live = (torch.arange(values.shape[1]) < held.unsqueeze(1)).to(store.device)
        store[self._index(rows, values.shape[1])[live]] = values[live].to(store.dtype)

    def evict(self, leaving: Tensor) -> None:
        """Drop the slots marked in leaving (rows, width), bool, live ones only.

        Survivors from the end of a row move into the holes further front, so a row stays packed and at most as
        many tokens move as leave.
        """
        leaving = leaving.cpu()
        slot = torch.arange(leaving.shape[1])
        held = self.held - leaving.sum(1)
        ends = (slot >= held.unsqueeze(1)) & (slot < self.held.unsqueeze(1))  # each row's slots to give up
        source, target, freed = (
            (self.offset[row] + at).to(self.k.device)
            for row, at in (x.nonzero(as_tuple=True) for x in (ends & ~leaving, leaving & ~ends, ends))
        )
        for _, _, store in self._arrays():
            store.index_copy_(0, target, store.index_select(0, source))
        for store in self._columns().values():
            store.index_fill_(0, freed, 0)
        self.held = held

    def flat(self, marked: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(row, k, v, position) of the slots marked in (rows, width): (e,), (e, d), (e, dv), (e,), in slot order."""
        row, slot = marked.cpu().nonzero(as_tuple=True)
        index = (self.offset[row] + slot).to(self.k.device)
        return row.to(self.k.device), self.k[index], self.v[index], self.position[index]

    # ---- size ----------------------------------------------------------------------------------------------

    def bytes_by_row(self, rows: int) -> Tensor:
        """A row has its stretch of the arena; the clocks are split."""
        return self._by_capacity(rows, [store for _, _, store in self._arrays()], self.capacity)

    def _reserve(self, needed: Tensor) -> None:
        if bool((needed > self.capacity).any()):
            wanted = torch.maximum(needed, 2 * self.capacity)
            # Rows in step stay in step: one stride for all keeps every view free of copies.
            self.resize(
                wanted.max().expand_as(wanted)
                if self.stride
                else torch.where(needed > self.capacity, wanted, self.capacity)
            )

    def resize(self, capacity: Tensor) -> None:
        """Move the held tokens to an arena with these capacities (rows,), each at least what the row holds."""
        level, stride = self.level, self.stride
        if bool((capacity != capacity[0]).any()):
            level = None
        source = self.live_index() if level is None else None
        self._lay_out(capacity.clone())
        target = self.live_index() if level is None else None
        for owner, name, store in self._arrays():
            moved = store.new_zeros(int(capacity.sum()), *store.shape[1:])
            if level is None:
                moved[target] = store[source]
            else:  # rows in step, before and after: no index
                self._table(moved, 0, level).copy_(self._table(store, 0, level, stride))
            owner.move(name, moved)
        self._tie()

    def _tie(self) -> None:
        if self.spec.tied:
            self.v = self.k

    # ---- as a part of a state ------------------------------------------------------------------------------

    def export(self) -> dict[str, Any]:
        """Only held tokens travel: an evicted token's bytes still in the arena never reach the message."""
        index = self.live_index()
        live = {name: tensor[index] for owner, name, tensor in self._arrays() if owner is self}
        columns = {name: tensor[index] for name, tensor in self._columns().items()}
        return {"held": self.held, "capacity": self.capacity, "columns": columns, **live}

    def adopt(self, fields: dict[str, Any]) -> None:
        self.held = fields["held"]
        self._lay_out(fields["capacity"])
        index = self.live_index()
        for owner, name, store in self._arrays():
            sent = fields[name] if owner is self else fields["columns"][name]
            placed = store.new_zeros(int(self.capacity.sum()), *store.shape[1:])
            placed[index] = sent.to(store.device)
            setattr(owner, name, placed)
        self._tie()

    def select_rows(self, index: Tensor) -> None:
        sources = [int(self.offset[row]) + torch.arange(int(self.held[row])) for row in index.tolist()]
        source = torch.cat(sources).to(self.k.device)
        self.held = self.held[index]
        self.spec = self.spec.select(index)
        self._lay_out(self.capacity[index])
        target = self.live_index()
        for owner, name, store in self._arrays():
            moved = store.new_zeros(int(self.capacity.sum()), *store.shape[1:])
            moved[target] = store[source]
            setattr(owner, name, moved)
        self._tie()


class Columns(Memory):
    """Per-slot tensors (total slots,) that a policy keeps beside the keys and values."""

    def tensors(self) -> dict[str, Tensor]:
        """Column name -> tensor."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
