"""Store the held tokens of all rows in one arena: flat tensors of keys and values, with one stretch per row.

A row is one (batch item, kv head) stream. A slot is the place of one held token; a row's slots are numbered from 0 and
lie in its stretch, a range of the flat tensors. A column is a tensor that an eviction policy keeps, with one number per
slot, such as a score of the slot's token. The rank of a token is its index among the tokens that its row holds, the
oldest at 0. If the spec (sizes and constants of the cache) has a rotation, keys are rotated to ranks: by RoPE with the
rank in place of the position in the stream.
Letters in shapes: r is the number of rows of a call, s or width that of slots per row, a that of new tokens, e that of
tokens chosen in any rows; d and dv are the widths of a key and a value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar
from weakref import ref

import torch
from torch import Tensor

from kvfloor.core.arena import Arena, grown
from kvfloor.core.attend import attend_newest
from kvfloor.core.device import first_marked, sent, sent_index
from kvfloor.core.fields import MOST, Field, require_room
from kvfloor.core.memory import Memory
from kvfloor.core.method import Guarantee
from kvfloor.core.partial import Partial
from kvfloor.core.spec import Spec

_NUMBERED = 64  # slots whose positions are written at once, for tokens still to come


@dataclass(frozen=True)
class View:
    """Hold the first s slots of r rows as batched tensors: k (r, s, d), v (r, s, dv), position (r, s), live (r, s).

    live is True for slots that hold a token; None: all do. `fetch` is a function that returns position. log_weight
    (r, s) is added to the logits; None: nothing is added.
    """

    k: Tensor
    v: Tensor
    live: Tensor | None
    fetch: Callable[[], Tensor] = field(repr=False)
    log_weight: Tensor | None = None

    @property
    def width(self) -> int:
        """Return s, the number of slots of each row."""
        return self.k.shape[1]

    @property
    def position(self) -> Tensor:
        """Return the arrival index of each slot's token; fetched on access, as attention does not need it."""
        return self.fetch()

    def over(self, q: Tensor, spec: Spec, hide: Tensor | None = None) -> Partial:
        """Compute attention of q (r, m, d) over these slots: a `Partial` (r, m), i.e. outputs and log-masses.

        hide: bool (r or 1, m or 1, s), True for slots that a query does not see; None: it sees all
        """
        return Partial.over(q, self.k, self.v, spec, self.log_weight, hide)

    def newest(self, q: Tensor, spec: Spec) -> Tensor:
        """Return attention outputs (r, g, 1, dv) of one token's queries q (r, g, 1, d), which see all s slots."""
        return attend_newest(q, self.k, self.v, spec.scale, spec.softcap, self.log_weight)


class Slots(Arena):
    """Store the held tokens of every row, packed at the front of the row's stretch of the arena.

    The order of tokens in a row's slots means nothing; `position` is the arrival index of each token. Rows may differ
    in capacity, so that a smaller budget takes less memory, and in the number of tokens (`held`). `columns` are numbers
    per slot that a policy keeps, zero where a slot holds no token.

    If the spec has a rotation, `k` has the rotated keys, which queries are multiplied with. An eviction changes the
    ranks of the tokens that came after the evicted ones. Then `k` is computed anew from `bare`, the unrotated keys, so
    that rounding errors do not add up. `bare` is kept only if tokens can leave the slots (argument `lose`) or the
    values are the keys (`spec.tied`).
    """

    plain: ClassVar[bool] = True
    """True if queries read `k` and `v`, the keys and values as they were given; False if they read codes of them."""
    position_dtype: ClassVar[torch.dtype] = torch.int64
    group: int = 1
    """Number of a row's tokens that are coded together; 1 where none is coded."""
    _known_tables: tuple[Tensor, Tensor, Tensor, Tensor] | None = None  # k and v, and views of them (`_tables`)
    _known_numbers: tuple[ref[Tensor], int, int] | None = None  # what is written in `position` for tokens still to come

    def __init__(
        self,
        spec: Spec,
        capacities: Sequence[int],
        columns: dict[str, torch.dtype] | None = None,
        lose: bool = True,
    ) -> None:
        super().__init__(spec, torch.tensor(list(capacities), dtype=torch.int64))
        self.columns = Columns()
        self.position = torch.zeros(self._places, dtype=self.position_dtype, device=spec.device)
        for name, dtype in (columns or {}).items():
            setattr(self.columns, name, torch.zeros(self._places, dtype=dtype, device=spec.device))
        self._open(lose)

    def _open(self, lose: bool) -> None:
        """Allocate the memory of keys and values. lose: True if tokens may leave the slots."""
        spec, total = self.spec, self._places
        self.k = torch.zeros(total, spec.d, dtype=spec.dtype, device=spec.device)
        turns = spec.rotation is not None and (lose or spec.tied)
        self.bare = torch.zeros_like(self.k) if turns else None
        self.v = self.k if spec.tied else torch.zeros(total, spec.dv, dtype=spec.dtype, device=spec.device)
        self._tie()

    @property
    def _own(self) -> tuple[str, ...]:
        """Return the names of the attributes that are tensors with one entry per token; policy columns are left out.

        If a token's value is its key (`spec.tied`), "k" stands for both.
        """
        own = ("k", "position") if self.spec.tied else ("k", "v", "position")
        return own if self.bare is None else (*own, "bare")

    def _columns(self) -> dict[str, Tensor]:
        return self.columns.tensors()

    def _arrays(self) -> list[tuple[Memory, str, Tensor]]:
        return super()._arrays() + [(self.columns, name, tensor) for name, tensor in self._columns().items()]

    # ---- reading -------------------------------------------------------------------------------------------

    def view(self, rows: Tensor | None = None, width: int | None = None) -> View:
        """Return the first `width` slots of `rows` as a `View`.

        rows None: all rows. width None: as many slots as the fullest row holds tokens. Tensors are copied only if
        capacities differ or `rows` is given.
        """
        held = self.held if rows is None else self.held[rows]
        counts = held.tolist()
        if width is None:
            width = max(counts, default=0)
        live = None
        if min(counts, default=width) < width:
            live = torch.arange(width) < held.unsqueeze(1)
            live = sent(live, self.position.device)
        return self._viewed(rows, width, live)

    def newest(self, q: Tensor, held: int | None = None) -> Tensor:
        """Return attention outputs (rows, g, 1, dv) of one token's queries q (rows, g, 1, d), which see all tokens.

        All rows must hold equally many tokens and have the same capacity. held: this number of tokens; None: as
        counted.
        """
        held = self.level if held is None else held
        if held is None:
            return self.view().newest(q, self.spec)
        if not self.plain:
            return self._viewed(None, held, None).newest(q, self.spec)
        k, v = (table.narrow(1, 0, held) for table in self._tables())
        return attend_newest(q, k, v, self.spec.scale, self.spec.softcap)

    def _viewed(self, rows: Tensor | None, width: int, live: Tensor | None) -> View:
        """Return the first `width` slots of `rows` (None: all) as a `View` with the mask `live`."""
        k, v = (self.numbers(name, rows, width) for name in ("k", "v"))
        return View(k, v, live, lambda: self.positions(rows, width))

    def numbers(self, name: str, rows: Tensor | None, width: int) -> Tensor:
        """Return the keys ("k"), values ("v") or unrotated keys ("bare") in the first `width` slots of each of `rows`.

        The result is (r, width, d), or (r, width, dv) for values. rows None: all rows.
        """
        return self.across(getattr(self, name), rows, width)

    def positions(self, rows: Tensor | None, width: int) -> Tensor:
        """Return the arrival indices, int64, of the tokens in the first `width` slots of each of `rows`: (r, width).

        rows None: all rows.
        """
        return self.across(self.position, rows, width)

    def arrived(self, place: Tensor) -> Tensor:
        """Return the arrival indices, int64, of the tokens at the places `place` (...), int64."""
        return self.position[place].long()

    def guarantee(self) -> Guarantee | None:
        """Return a bound on the error of attention over these slots that comes from how they keep numbers, or None.

        The answers are compared with attention over the same tokens as they were given. These slots keep all numbers
        as given, and state nothing.
        """
        return None

    @property
    def longest(self) -> int:
        """Return the most tokens that a stream may have, so that the last one's arrival index can be stored."""
        return torch.iinfo(self.position_dtype).max

    def keys(self, place: Tensor) -> Tensor:
        """Copy the keys at the places `place` (...), int64: return (..., d)."""
        return self.k[place]

    def values(self, place: Tensor) -> Tensor:
        """Copy the values at the places `place` (...), int64: return (..., dv)."""
        return self.v[place]

    @property
    def token_bytes(self) -> float:
        """Return the bytes of one held token's key and value."""
        return self.spec.token_bytes

    def across(self, x: Tensor, rows: Tensor | None, width: int) -> Tensor:
        """Return the first `width` entries of each of `rows` (None: all) in a per-slot tensor x: (r, width, ...).

        x has one entry for each slot of all rows: (slots of all rows, ...).
        """
        if self.stride:
            table = self._table(x, 0, min(width, self.stride))
            return table if rows is None else table[sent(rows, x.device)]
        return x[self._index(rows, width)]

    def at(self, slot: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return the places (r, m, c) of chosen slots: c slots of the row for each of its m queries.

        rows  (r,) rows of the slots; None: all
        slot  (r, m, c), int64; a slot beyond the arena is replaced by the arena's last place
        """
        offset = sent(self.offset if rows is None else self.offset[rows], slot.device).view(-1, 1, 1)
        return (offset + slot).clamp_max(self._places - 1)

    def column(self, name: str, rows: Tensor | None, width: int) -> Tensor:
        return self.across(getattr(self.columns, name), rows, width)

    def _index(self, rows: Tensor | None, width: int) -> Tensor:
        return self.places(rows, width).squeeze(1)

    # ---- writing -------------------------------------------------------------------------------------------

    def push(self, k: Tensor, v: Tensor, position: Tensor, take: Tensor, bare: Tensor | None = None) -> None:
        """Append to each row r its first take[r] tokens of k (rows, a, d), v (rows, a, dv) and position (rows, a).

        bare (rows, a, d): the keys before they were rotated; used only if the spec has a rotation.
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
            slot, index = sent(slot[wanted], self.position.device), sent_index(wanted, self.position.device)
            for name in self._own:
                getattr(self, name)[slot] = given[name].flatten(0, 1)[index]
        self.held = self.held + take

    def put(self, k: Tensor, v: Tensor, position: int, bare: Tensor | None = None) -> None:
        """Append one token, which arrived at `position`, to every row: k (rows, 1, d), v (rows, 1, dv).

        All rows must hold equally many tokens, have the same capacity, and have a free slot. bare (rows, 1, d): the
        keys before they were rotated; used only if the spec has a rotation.
        """
        at = self.level
        assert at is not None
        self.write(at, k, v, bare)
        self.number_from(at, position)
        self.count_one()

    def write(self, at: int, k: Tensor, v: Tensor, bare: Tensor | None = None) -> None:
        """Write one token's key and value to slot `at` of every row, as `put` does; count nothing."""
        keys, values = self._tables()
        keys.narrow(1, at, 1).copy_(k)
        if self.bare is not None:
            self._table(self.bare, at, at + 1).copy_(k if bare is None else bare)
        if not self.spec.tied:
            values.narrow(1, at, 1).copy_(v)

    def count_one(self) -> None:
        """Count one token more in every row, whose key, value and position are written already."""
        at = self.level
        assert at is not None
        self.held = self.held + 1
        self._known_level = ref(self.held), at + 1

    def number_from(self, at: int, position: int) -> None:
        """Write `position` to slot `at` of every row, and to the slots behind it the positions of tokens still to come.

        So most tokens find theirs written. A slot without a token may hold any number. Slots keep what was written
        there as long as tokens arrive one after another: every eviction lowers the slot of the next token, and not its
        position, so their difference, which is compared, never comes back. A pool lends these slots the tensors of one
        request after another, so it is also compared in which tensor it was written.
        """
        ahead = position - at
        known = self._known_numbers
        if known is not None and known[0]() is self.position and known[1] == ahead and at < known[2]:
            return
        stop = min(at + _NUMBERED, self.stride)
        arrived = torch.arange(at + ahead, stop + ahead, device=self.position.device)
        self._table(self.position, at, stop).copy_(arrived)
        self._known_numbers = ref(self.position), ahead, stop

    def _lay_out(self, capacity: Tensor) -> None:
        super()._lay_out(capacity)
        self._known_tables = self._known_numbers = None

    def _tables(self) -> tuple[Tensor, Tensor]:
        """View the slots of all rows: keys (rows, slots, d) and values (rows, slots, dv); capacities must be equal."""
        known = self._known_tables
        if known is None or known[0] is not self.k or known[1] is not self.v:
            keys, values = (self._table(x, 0, self.stride) for x in (self.k, self.v))
            known = self._known_tables = self.k, self.v, keys, values
        return known[2], known[3]

    def put_column(self, name: str, rows: Tensor | None, values: Tensor) -> None:
        """Write a policy's numbers per slot, values (r, width), to the column `name` for `rows` (None: all).

        Entries of slots without a token are left unchanged.
        """
        store, level = getattr(self.columns, name), self.level if rows is None else None
        if level is not None:
            self.across(store, None, level).copy_(values[:, :level])
            return
        held = self.held if rows is None else self.held[rows]
        live = sent_index(torch.arange(values.shape[1]) < held.unsqueeze(1), store.device)
        store[self._index(rows, values.shape[1]).flatten()[live]] = values.flatten()[live].to(store.dtype)

    def evict(self, leaving: Tensor, count: Tensor | None = None) -> None:
        """Drop the tokens in the slots marked by the bool mask `leaving` (rows, width); marked slots must hold tokens.

        Remaining tokens from the end of a row move into the freed slots further front, so a row stays packed. The
        number of moved tokens is at most the number of dropped tokens.
        count: (rows,) number of slots that are marked in each row, on the CPU. None: it is read from the mask
        """
        count = leaving.sum(1).cpu() if count is None else count
        most = int(count.max())
        if not most:
            return
        before, held = self.held, self.held - count
        self._pack(leaving, held, most)
        span = torch.arange(leaving.shape[1])
        row, slot = ((span >= held.unsqueeze(1)) & (span < before.unsqueeze(1))).nonzero(as_tuple=True)
        freed = sent(self.offset[row] + slot, self.position.device)
        for store in self._columns().values():
            store.index_fill_(0, freed, 0)
        self.held = held
        if self.bare is not None:
            fewer = held < before
            self._turn(None if bool(fewer.all()) else fewer.nonzero().squeeze(1))

    def empty(self, rows: Tensor) -> None:
        """Drop all tokens of `rows` (r,), as `evict` does when every slot is marked; no policy's column may be kept."""
        assert not self._columns()
        self.held = self.held.index_fill(0, rows, 0)

    def _pack(self, leaving: Tensor, held: Tensor, most: int) -> None:
        """Move tokens that stay, from the end of their row, into the slots marked by `leaving` (rows, width).

        held: (rows,) tokens of each row that stay, on the CPU. most: largest number of marked slots in a row.
        """
        device = self.position.device
        leaving = sent(leaving, device)
        end, before, offset = (sent(x, device).unsqueeze(1) for x in (held, self.held, self.offset))
        slot = torch.arange(leaving.shape[1], device=device)
        beyond = slot >= end
        target = first_marked(leaving & ~beyond, most)
        source = first_marked(~leaving & beyond & (slot < before), most)
        last = (before - 1).clamp_min(0)  # it moves to itself where fewer tokens move: it is free, or the row keeps all
        target, source = ((offset + torch.where(x < len(slot), x, last)).flatten() for x in (target, source))
        for _, _, store in self._arrays():
            store.index_copy_(0, target, store.index_select(0, source))

    def _turn(self, rows: Tensor | None) -> None:
        """Rotate the unrotated keys of `rows` (None: all) to the present ranks of their tokens; store them in `k`.

        Do nothing if unrotated keys are not kept.
        """
        bare, rotation = self.bare, self.spec.rotation
        held = self.held if rows is None else self.held[rows]
        width = int(held.max()) if len(held) else 0
        if bare is None or rotation is None or width == 0:
            return
        live = torch.arange(width) < held.unsqueeze(1)
        position = self.positions(rows, width).masked_fill(~sent(live, bare.device), 1 << 62)
        rank = torch.empty_like(position).scatter_(
            1, position.argsort(1), torch.arange(width, device=bare.device).expand_as(position)
        )
        circle = rotation.circle(rank, self.spec.compute_dtype, below=width)
        turned = rotation.turned(self.across(bare, rows, width), circle)
        if rows is None and self.level is not None:
            self._table(self.k, 0, width).copy_(turned)
        else:
            index = sent_index(live, bare.device)
            self.k[self._index(rows, width).flatten()[index]] = turned.flatten(0, 1)[index]

    def settle(self, seen: Tensor, rows: Tensor | None) -> None:
        """Handle the end of a block of tokens in these rows (None: all), after its evictions.

        seen: (rows,) tokens that each row of the state has seen. A store that codes its tokens does it here; these
        slots keep them as they are, and nothing happens.
        """

    def require_settled(self, fields: dict[str, Any], seen: Tensor) -> None:
        """Raise ValueError if the saved `fields` of slots contradict `seen` (rows,), the tokens that each row has seen.

        Nothing that these slots keep follows from `seen`, so all fields are accepted.
        """

    def find(self, row: Tensor, position: Tensor) -> Tensor:
        """Return a mask (rows, width), bool on the CPU, True for the slots that hold one of e given tokens.

        Token i is given by its row, row[i], and its arrival index in that row, position[i]; both tensors are (e,).
        Tokens that are not held are ignored.
        """
        view = self.view()
        wanted = torch.zeros(self.spec.rows, int(position.max()) + 2, dtype=torch.bool)  # the last column stays False
        wanted[row, position] = True
        found = wanted.gather(1, view.position.cpu().clamp_max(wanted.shape[1] - 1))
        return found if view.live is None else found & view.live.cpu()

    def flat(self, marked: Tensor, count: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return (row, k, v, position) of the tokens in the marked slots: (e,), (e, d), (e, dv), (e,).

        `marked` (rows, width) is a bool mask. The tokens come row by row, in the order of their slots.
        count: (rows,) number of slots that are marked in each row, on the CPU. None: it is read from the mask
        """
        row, index = self._marked(marked, count)
        k, v = self.keys(index).to(self.spec.dtype), self.values(index).to(self.spec.dtype)
        return row, k, v, self.arrived(index)

    def _marked(self, marked: Tensor, count: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the row and the place of each marked slot, (e,) and (e,), as `flat` orders them."""
        device = self.position.device
        count = marked.sum(1).cpu() if count is None else count
        most = int(count.max())
        row, j = (torch.arange(most) < count.unsqueeze(1)).nonzero(as_tuple=True)
        slot = first_marked(sent(marked, device), most).flatten()
        if len(row) < slot.numel():
            slot = slot[sent(row * most + j, device)]
        return sent(row, device), sent(self.offset[row], device) + slot

    # ---- size ----------------------------------------------------------------------------------------------

    def _reserve(self, needed: Tensor) -> None:
        if bool((needed > self.capacity).any()):
            wanted = torch.maximum(needed, grown(self.capacity))
            # Rows of one stride keep one stride, so that views need no copies.
            self.resize(
                wanted.max().expand_as(wanted)
                if self.stride
                else torch.where(needed > self.capacity, wanted, self.capacity)
            )

    def _moved(self) -> None:
        self._tie()

    def _tie(self) -> None:
        if self.spec.tied:
            self.v = self.k if self.bare is None else self.bare

    # ---- as a part of a state ------------------------------------------------------------------------------

    def export(self) -> dict[str, Any]:
        sent = super().export() | {"columns": self._export(self.columns)}
        if self.bare is not None:
            del sent["k"]  # `adopt` rotates it from `bare`
        return sent

    def fields(self) -> dict[str, Any]:
        """Return the allowed dtype, shape and range of the saved tensors with one entry per token: name -> `Field`.

        The tokens are the held ones. The policy's columns are in a nested dictionary, under "columns".
        """
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
        super().adopt(fields)
        self._turn(None)

    def _sent(self, fields: dict[str, Any], owner: Memory, name: str) -> Tensor | None:
        if owner is self.columns:
            return fields["columns"][name]
        return None if name == "k" and self.bare is not None else fields[name]


class Columns(Memory):
    """Store a policy's columns beside the keys and values: tensors (slots of all rows,), one number per slot each."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the columns, column name -> tensor (slots of all rows,)."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}


def require_positions(fields: dict[str, Any], seen: Tensor) -> None:
    """Raise ValueError if the slots of a saved state hold a token twice, or a token that its row has not had.

    fields  name -> saved tensor of the slots: "held" (rows,), the number of held tokens, and "position", the arrival
            indices of all held tokens, row by row
    seen    (rows,) number of tokens that each row has had so far: positions must be below it
    """
    row = torch.arange(len(seen)).repeat_interleave(fields["held"])
    position = fields["position"]
    if bool((position >= seen[row]).any()):
        raise ValueError("a token's position lies beyond the tokens that its row has seen")
    order = torch.argsort(position, stable=True)
    order = order[torch.argsort(row[order], stable=True)]
    again = (position[order][1:] == position[order][:-1]) & (row[order][1:] == row[order][:-1])
    if bool(again.any()):
        raise ValueError("two tokens of a row have the same position")
