"""Store the held tokens of all rows: one flat arena of keys and values, with an offset and a capacity per row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvfloor.core.fields import MOST, Field, require_room
from kvfloor.core.memory import Memory
from kvfloor.core.spec import Spec


def grown(size: Any) -> Any:
    """Return the next size of an arena (an int or a tensor) that is full at `size`: a quarter more, rounded up.

    So each token is copied four times on average, however many come, and a fifth of the arena at most is empty.
    """
    return size + (size + 3) // 4


@dataclass(frozen=True)
class View:
    """Show some rows' slots side by side: k (r, s, d), v (r, s, dv), position (r, s), live (r, s).

    live is None if every slot holds a token.
    """

    k: Tensor
    v: Tensor
    live: Tensor | None
    fetch: Callable[[], Tensor] = field(repr=False)

    @property
    def position(self) -> Tensor:
        """Return the arrival index of each slot's token; fetched on access, as attention does not need it."""
        return self.fetch()


class Slots(Memory):
    """Store the held tokens of every row, packed at the front of the row's stretch of the arena.

    A row's slots carry no order; `position` is the arrival index of each token. Rows may have different capacities
    (per-head budgets free real bytes) and different fill (`held`). `columns` are per-slot numbers that a policy keeps,
    zero where a slot holds no token. Clocks and counts live on the CPU, so that control flow never waits for a device.

    Under `spec.rotation` k has the keys that queries read, rotated to the rank of their token among the row's. An
    eviction changes the ranks of the tokens behind the evicted ones. Then k is rotated anew from `bare`, the unrotated
    keys, so that no rounding builds up. Slots that `lose` no token, and whose values are not the keys, need no `bare`.
    """

    def __init__(
        self,
        spec: Spec,
        capacities: Sequence[int],
        columns: dict[str, torch.dtype] | None = None,
        lose: bool = True,
    ) -> None:
        self.spec = spec
        self.held = torch.zeros(spec.rows, dtype=torch.int64)
        self.columns = Columns()
        self._lay_out(torch.tensor(list(capacities), dtype=torch.int64))
        total = int(self.capacity.sum())
        self.k = torch.zeros(total, spec.d, dtype=spec.dtype, device=spec.device)
        turns = spec.rotation is not None and (lose or spec.tied)
        self.bare = torch.zeros_like(self.k) if turns else None
        self.v = self.k if spec.tied else torch.zeros(total, spec.dv, dtype=spec.dtype, device=spec.device)
        self._tie()
        self.position = torch.zeros(total, dtype=torch.int64, device=spec.device)
        for name, dtype in (columns or {}).items():
            setattr(self.columns, name, torch.zeros(total, dtype=dtype, device=spec.device))

    def _lay_out(self, capacity: Tensor) -> None:
        self.capacity = capacity
        self.offset = torch.cumsum(capacity, 0) - capacity
        self.stride = int(capacity[0]) if bool((capacity == capacity[0]).all()) else 0  # 0: ragged

    @property
    def _own(self) -> tuple[str, ...]:
        """Return the names of the per-token tensors beside the columns; tied keys and values are one tensor."""
        own = ("k", "position") if self.spec.tied else ("k", "v", "position")
        return own if self.bare is None else (*own, "bare")

    def _columns(self) -> dict[str, Tensor]:
        return self.columns.tensors()

    def _arrays(self) -> list[tuple[Any, str, Tensor]]:
        """Return every per-slot tensor, as (owner, attribute, tensor)."""
        own = [(self, name, getattr(self, name)) for name in self._own]
        return own + [(self.columns, name, tensor) for name, tensor in self._columns().items()]

    @property
    def level(self) -> int | None:
        """Return the tokens held per row, if all rows hold equally many in stretches of one length; otherwise None."""
        counts = self.held.tolist()
        return counts[0] if self.stride and min(counts) == max(counts) else None

    # ---- reading -------------------------------------------------------------------------------------------

    def view(self, rows: Tensor | None = None, width: int | None = None) -> View:
        """Return the slots of `rows` (all if None), `width` wide (default: the fullest row). Copies only if ragged."""
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
        """Return a per-slot tensor as (rows, width, ...)."""
        if self.stride:
            table = self._table(x, 0, min(width, self.stride))
            return table if rows is None else table[rows.to(x.device)]
        return x[self._index(rows, width)]

    def _table(self, x: Tensor, start: int, stop: int, stride: int | None = None) -> Tensor:
        """Return slots start .. stop - 1 of every row of a per-slot tensor, as a view (rows, stop - start, ...).

        Rows have stretches of one length, `stride`. The view is one operation, because in decoding an operation's
        overhead is more than its work.
        """
        stride, (slot, *inner) = stride or self.stride, x.stride()
        shape = (self.spec.rows, stop - start, *x.shape[1:])
        return x.as_strided(shape, (stride * slot, slot, *inner), start * slot)

    def fetch(self, x: Tensor, slot: Tensor, rows: Tensor | None = None) -> Tensor:
        """Copy a per-slot tensor at slot (r, m, c) of each of `rows`: (r, m, c, ...)."""
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
        """Return the arena indices of all held tokens, row by row, in slot order."""
        width = int(self.held.max()) if self.held.numel() else 0
        live = torch.arange(width) < self.held.unsqueeze(1)
        return (self.offset.unsqueeze(1) + torch.arange(width))[live].to(self.k.device)

    # ---- writing -------------------------------------------------------------------------------------------

    def push(self, k: Tensor, v: Tensor, position: Tensor, take: Tensor, bare: Tensor | None = None) -> None:
        """Add the first take[r] of row r's tokens: k (rows, a, d), v (rows, a, dv), position (rows, a).

        bare (rows, a, d): the keys before they were rotated to their ranks, under a rotation.
        """
        a, at = k.shape[1], self.level if min(take.tolist()) == k.shape[1] else None
        if at is None or at + a > self.stride:
            self._reserve(self.held + take)
        given = {"k": k, "v": v, "position": position, "bare": bare}
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

    def put(self, k: Tensor, v: Tensor, position: int, bare: Tensor | None = None) -> None:
        """Push one token of this position to every row, for rows that hold equally many tokens and have room."""
        at = self.held.tolist()[0]
        self._table(self.k, at, at + 1).copy_(k)
        if self.bare is not None:
            self._table(self.bare, at, at + 1).copy_(k if bare is None else bare)
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
        ends = (slot >= held.unsqueeze(1)) & (slot < self.held.unsqueeze(1))  # each row's slots to free
        source, target, freed = (
            (self.offset[row] + at).to(self.k.device)
            for row, at in (x.nonzero(as_tuple=True) for x in (ends & ~leaving, leaving & ~ends, ends))
        )
        for _, _, store in self._arrays():
            store.index_copy_(0, target, store.index_select(0, source))
        for store in self._columns().values():
            store.index_fill_(0, freed, 0)
        fewer = held < self.held
        self.held = held
        if self.bare is not None:
            self._turn(None if bool(fewer.all()) else fewer.nonzero().squeeze(1))

    def _turn(self, rows: Tensor | None) -> None:
        """Rotate the keys of `rows` (None: all) to the ranks that their tokens have now."""
        bare, rotation = self.bare, self.spec.rotation
        held = self.held if rows is None else self.held[rows]
        width = int(held.max()) if len(held) else 0
        if bare is None or rotation is None or width == 0:
            return
        live = torch.arange(width) < held.unsqueeze(1)
        position = self.across(self.position, rows, width).masked_fill(~live.to(bare.device), 1 << 62)
        rank = torch.empty_like(position).scatter_(
            1, position.argsort(1), torch.arange(width, device=bare.device).expand_as(position)
        )
        circle = rotation.circle(rank, self.spec.compute_dtype, below=width)
        turned = rotation.turned(self.across(bare, rows, width), circle)
        if rows is None and self.level is not None:
            self._table(self.k, 0, width).copy_(turned)
        else:
            live = live.to(bare.device)
            self.k[self._index(rows, width)[live]] = turned[live]

    def find(self, row: Tensor, position: Tensor) -> Tensor:
        """Mark the slots (rows, width), bool on the CPU, that hold the tokens named by row (e,) and position (e,)."""
        view = self.view()
        wanted = torch.zeros(self.spec.rows, int(position.max()) + 2, dtype=torch.bool)  # the last column stays False
        wanted[row, position] = True
        found = wanted.gather(1, view.position.cpu().clamp_max(wanted.shape[1] - 1))
        return found if view.live is None else found & view.live.cpu()

    def flat(self, marked: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return (row, k, v, position) of the marked slots, in slot order: (e,), (e, d), (e, dv), (e,).

        marked (rows, width) is a mask.
        """
        row, slot = marked.cpu().nonzero(as_tuple=True)
        index = (self.offset[row] + slot).to(self.k.device)
        return row.to(self.k.device), self.k[index], self.v[index], self.position[index]

    # ---- size ----------------------------------------------------------------------------------------------

    def bytes_by_row(self, rows: int) -> Tensor:
        """Return the bytes of each row: its own stretch of the arena, and an equal part of the clocks."""
        return self._by_capacity(rows, [store for _, _, store in self._arrays()], self.capacity)

    def _reserve(self, needed: Tensor) -> None:
        if bool((needed > self.capacity).any()):
            wanted = torch.maximum(needed, grown(self.capacity))
            # Rows of one stride keep one stride, so that views need no copies.
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
            else:  # one stride before and after: no index needed
                self._table(moved, 0, level).copy_(self._table(store, 0, level, stride))
            owner.move(name, moved)
        self._tie()

    def _tie(self) -> None:
        if self.spec.tied:
            self.v = self.k if self.bare is None else self.bare

    # ---- as a part of a state ------------------------------------------------------------------------------

    def export(self) -> dict[str, Any]:
        """Return the held tokens only: an evicted token's bytes still in the arena never reach the message."""
        index = self.live_index()
        follows = ("k",) if self.bare is not None else ()  # adopt() rotates it from `bare`
        live = {name: tensor[index] for owner, name, tensor in self._arrays() if owner is self and name not in follows}
        columns = {name: tensor[index] for name, tensor in self._columns().items()}
        return {"held": self.held, "capacity": self.capacity, "columns": columns, **live}

    def fields(self) -> dict[str, Any]:
        """Declare one entry per held token in every field."""
        spec, tokens = self.spec, "tokens"
        wide = {"k": spec.d, "v": spec.dv}
        own = {name: Field(spec.dtype, (tokens, wide[name]), finite=True) for name in wide if name in self._own}
        columns = {name: Field(column.dtype, (tokens,)) for name, column in self._columns().items()}
        return {**own, "position": Field(torch.int64, (tokens,), least=0, most=MOST), "columns": columns}

    def require_sound(self, fields: dict[str, Any]) -> None:
        held, capacity = fields["held"], fields["capacity"]
        if bool((capacity < self.capacity).any()) or bool((held > capacity).any()):
            raise ValueError(f"rows hold {held.tolist()} tokens in {capacity.tolist()} slots")
        if int(held.sum()) != len(fields["position"]):
            raise ValueError(f"rows hold {held.tolist()} tokens, and {len(fields['position'])} are there")
        width = self.spec.d + self.spec.dv + 2
        require_room(float(capacity.double().sum()) * width, self.spec.dtype.itemsize, "the slots")

    def adopt(self, fields: dict[str, Any]) -> None:
        self.held = fields["held"]
        self._lay_out(fields["capacity"])
        index = self.live_index()
        for owner, name, store in self._arrays():
            placed = store.new_zeros(int(self.capacity.sum()), *store.shape[1:])
            if owner is self and name == "k" and self.bare is not None:
                setattr(owner, name, placed)  # rotated below
                continue
            sent = fields[name] if owner is self else fields["columns"][name]
            placed[index] = sent.to(store.device)
            setattr(owner, name, placed)
        self._tie()
        self._turn(None)

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
    """Store the per-slot tensors (total slots,) that a policy keeps beside the keys and values."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by column name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}


def require_positions(fields: dict[str, Any], seen: Tensor) -> None:
    """Raise ValueError unless the tokens in these fields of slots came once each, among the first seen (rows,)."""
    row = torch.arange(len(seen)).repeat_interleave(fields["held"])
    position = fields["position"]
    if bool((position >= seen[row]).any()):
        raise ValueError("a token's position lies beyond the tokens that its row has seen")
    order = torch.argsort(position, stable=True)
    order = order[torch.argsort(row[order], stable=True)]
    again = (position[order][1:] == position[order][:-1]) & (row[order][1:] == row[order][:-1])
    if bool(again.any()):
        raise ValueError("two tokens of a row have the same position")
