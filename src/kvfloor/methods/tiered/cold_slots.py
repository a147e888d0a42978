"""Number exact tokens by slots like `Slots`, while their keys and values are in blocks outside the state's memory.

A row is one (batch item, kv head) stream. A slot is the place of one held token of a row, a place an index into all
slots. A page is `page` consecutive tokens of a row, counted by their positions in its stream. In shapes, r are rows, s
slots of each, e tokens of any rows, d and dv the widths of a key and a value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvfloor.core.arena import Arena
from kvfloor.core.attend import attend_newest
from kvfloor.core.fields import MOST, Field, require_equal, require_room
from kvfloor.core.partial import Partial
from kvfloor.core.slots import Slots
from kvfloor.core.spec import Spec
from kvfloor.methods.tiered.cold_blocks import Blocks

_COPIED = 1 << 14  # tokens that are copied at once to other blocks


@dataclass(frozen=True)
class ColdView:
    """Give access to the first `width` slots of r rows, whose keys and values are fetched when they are read.

    owner  the slots of all rows
    rows   (r,) indices of the r rows; None: all rows
    live   bool (r, width), True for slots that hold a token; None: all do
    """

    owner: ColdSlots = field(repr=False)
    rows: Tensor | None
    width: int
    live: Tensor | None

    @cached_property
    def _both(self) -> tuple[Tensor, Tensor]:
        return self.owner.across_both(self.rows, self.width)

    @property
    def k(self) -> Tensor:
        """Return the keys (r, width, d)."""
        return self._both[0]

    @property
    def v(self) -> Tensor:
        """Return the values (r, width, dv)."""
        return self._both[1]

    @cached_property
    def position(self) -> Tensor:
        """Return the tokens' positions (r, width)."""
        return self.owner.positions(self.rows, self.width)

    def over(self, q: Tensor, spec: Spec, hide: Tensor | None = None) -> Partial:
        """Compute attention of q (r, m, d) over these slots: a `Partial` (r, m), i.e. outputs and log-masses.

        hide: bool (r or 1, m or 1, s), True for slots that a query does not see; None: it sees all.
        """
        return Partial.over(q, self.k, self.v, spec, hide=hide)

    def newest(self, q: Tensor, spec: Spec) -> Tensor:
        """Return attention outputs (r, g, 1, dv) of one token's queries q (r, g, 1, d), which see all s slots."""
        return attend_newest(q, self.k, self.v, spec.scale, spec.softcap)


class ColdSlots(Slots):
    """Keep each row's newest page of tokens in memory, and every complete page in a block outside of it.

    recent_k, recent_v  (rows, page, d or dv): the newest tokens; the one at position p has the index p % page
    pushed              (rows,) tokens that each row was given; on the CPU
    table               (rows, pages) number of the block of each complete page; on the CPU
    ordered             True if slot i of each row holds the token at position i, as no token was ever dropped
    position            arrival index of each slot's token; without entries while `ordered` is True
    cold                the blocks, which copies of these slots share
    Tokens that are dropped stay in their block, as blocks never change. Blocks that no row refers to any more stay
    too, until they would outnumber those that the rows need; then these are copied to blocks of their own.
    """

    plain: ClassVar[bool] = False

    def __init__(self, spec: Spec, capacities: Sequence[int], page: int, cold: Blocks) -> None:
        self.page, self.cold = page, cold
        super().__init__(spec, capacities, lose=False)

    def _open(self, lose: bool) -> None:
        spec = self.spec
        self.bare = None
        self.recent_k = torch.zeros(spec.rows, self.page, spec.d, dtype=spec.dtype, device=spec.device)
        self.recent_v = self.recent_k
        if not spec.tied:
            self.recent_v = torch.zeros(spec.rows, self.page, spec.dv, dtype=spec.dtype, device=spec.device)
        self.pushed = torch.zeros(spec.rows, dtype=torch.int64)
        self.table = torch.zeros(spec.rows, 0, dtype=torch.int64)
        self.ordered = True
        self.position = self.position.new_zeros(0)

    @property
    def _own(self) -> tuple[str, ...]:
        return () if self.ordered else ("position",)

    def _tie(self) -> None:
        """Do nothing: no attribute aliases a flat tensor."""

    @property
    def _pages(self) -> Tensor:
        """Return the number of complete pages of each row (rows,)."""
        return self.pushed // self.page

    # ---- reading ---------------------------------------------------------------------------------------------------

    def _viewed(self, rows: Tensor | None, width: int, live: Tensor | None) -> ColdView:  # type: ignore[override]
        return ColdView(self, rows, width, live)

    def newest(self, q: Tensor) -> Tensor:
        return self.view().newest(q, self.spec)

    def positions(self, rows: Tensor | None, width: int) -> Tensor:
        if self.ordered:
            r = self.spec.rows if rows is None else len(rows)
            return torch.arange(width, device=self.position.device).expand(r, -1)
        return super().positions(rows, width)

    def arrived(self, place: Tensor) -> Tensor:
        return self._within(place)[1].to(place.device) if self.ordered else super().arrived(place)

    def _within(self, place: Tensor) -> tuple[Tensor, Tensor]:
        """Return the row of each place (...), and the place's index in its row's stretch, both on the CPU."""
        place = place.cpu()
        row = torch.bucketize(place, self.offset + self.capacity, right=True).clamp_max(self.spec.rows - 1)
        return row, place - self.offset[row]

    def keys(self, place: Tensor) -> Tensor:
        return self.pair(place)[0]

    def values(self, place: Tensor) -> Tensor:
        return self.pair(place)[1]

    def numbers(self, name: str, rows: Tensor | None, width: int) -> Tensor:
        k, v = self.across_both(rows, width)
        return v if name == "v" else k

    def across_both(self, rows: Tensor | None, width: int) -> tuple[Tensor, Tensor]:
        """Return the keys (r, width, d) and values (r, width, dv) in the first slots of each of `rows` (None: all).

        They are 0 in slots without a token.
        """
        return self.pair(self.places(rows, width).squeeze(1))

    def pair(self, place: Tensor, wanted: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the keys (..., d) and values (..., dv) at the places `place` (...), int64, in one fetch for all rows.

        wanted: bool (...), False for places whose token is not needed; None: all are. Keys and values are 0 there, and
        where no token is held. Raises ColdTierError if tokens cannot be read, and CorruptBlock if they were damaged.
        """
        flat = place.flatten()
        row, slot = self._within(flat)
        real = slot < self.held[row]
        if wanted is not None:
            real = real & wanted.flatten().cpu()
        position = slot if self.ordered else self.position[flat].cpu()
        device, spec = self.recent_k.device, self.spec
        newest = position >= self.pushed[row] - self.page
        k = torch.zeros(len(flat), spec.d, dtype=spec.dtype, device=device)
        v = k if spec.tied else torch.zeros(len(flat), spec.dv, dtype=spec.dtype, device=device)
        here = (real & newest).nonzero().squeeze(1)
        if len(here):
            at, index = row[here].to(device), (position[here] % self.page).to(device)
            self._put(k, v, here, self.recent_k[at, index], self.recent_v[at, index])
        far = (real & ~newest).nonzero().squeeze(1)
        if len(far):
            block = self.table[row[far], position[far] // self.page]
            token, again = (block * self.page + position[far] % self.page).unique(return_inverse=True)
            self._put(k, v, far, *(x[again].to(device) for x in self.cold.read(token)))
        return k.view(*place.shape, spec.d), v.view(*place.shape, v.shape[1])

    def _put(self, k: Tensor, v: Tensor, at: Tensor, new_k: Tensor, new_v: Tensor) -> None:
        at = at.to(k.device)
        k[at] = new_k
        if v is not k:
            v[at] = new_v

    # ---- writing ---------------------------------------------------------------------------------------------------

    def reserve_pages(self, take: Tensor) -> None:
        """Make sure that the pages which take (rows,) further tokens complete can be written, where that can be told.

        Raises ColdTierError, nothing changed, if not.
        """
        self.cold.reserve(int(((self.pushed + take) // self.page - self._pages).sum()))

    def push(self, k: Tensor, v: Tensor, position: Tensor, take: Tensor, bare: Tensor | None = None) -> None:
        self._write_pages(k, v, take)
        a = torch.arange(k.shape[1])
        newest = (a < take.unsqueeze(1)) & (a >= take.unsqueeze(1) - self.page)
        row, j = newest.nonzero(as_tuple=True)
        index = ((self.pushed[row] + j) % self.page).to(k.device)
        row, j = row.to(k.device), j.to(k.device)
        self.recent_k[row, index] = k[row, j]
        if not self.spec.tied:
            self.recent_v[row, index] = v[row, j]
        super().push(k, v, position, take, bare)
        self.pushed = self.pushed + take

    def put(self, k: Tensor, v: Tensor, position: int, bare: Tensor | None = None) -> None:
        at = torch.full((self.spec.rows, 1), position, device=self.position.device)
        self.push(k, v, at, torch.ones_like(self.held), bare)

    def _write_pages(self, k: Tensor, v: Tensor, take: Tensor) -> None:
        """Write the pages that the first take[r] tokens of k (rows, a, d) and v (rows, a, dv) complete."""
        done, pages = self._pages, (self.pushed + take) // self.page
        row, page = _listed(done, pages)
        if not len(row):
            return
        self._tidy()
        position = page.unsqueeze(1) * self.page + torch.arange(self.page)
        j = (position - self.pushed[row].unsqueeze(1)).to(k.device)
        row_there, old = row.to(k.device).unsqueeze(1), (j < 0).unsqueeze(2)

        def paged(recent: Tensor, new: Tensor) -> Tensor:
            return torch.where(old, recent[row_there.squeeze(1)], new[row_there, j.clamp(0, new.shape[1] - 1)])

        keys = paged(self.recent_k, k)
        number = self.cold.write(keys, keys if self.spec.tied else paged(self.recent_v, v))
        self._widen(int(pages.max()))
        self.table[row, page] = number

    def _widen(self, pages: int) -> None:
        """Make the table wide enough for so many pages of a row."""
        if pages > self.table.shape[1]:
            wider = self.table.new_zeros(len(self.table), max(pages, self.table.shape[1] * 5 // 4))
            wider[:, : self.table.shape[1]] = self.table
            self.move("table", wider)

    def _tidy(self) -> None:
        """Copy the blocks that rows refer to, if at least as many others are kept in their place."""
        row, page = _listed(torch.zeros_like(self.pushed), self._pages)
        if self.cold.count <= 2 * len(row):
            return
        used, again = self.table[row, page].unique(return_inverse=True)
        fresh, at_once = self.cold.anew(), max(1, _COPIED // self.page)
        for piece in used.split(at_once) if len(used) else ():
            token = (piece.unsqueeze(1) * self.page + torch.arange(self.page)).flatten()
            fresh.write(*(x.view(len(piece), self.page, -1) for x in self.cold.read(token)))
        table = self.table.clone()
        table[row, page] = again
        self.cold, self.table = fresh, table

    def evict(self, leaving: Tensor, count: Tensor | None = None) -> None:
        if self.ordered:
            at = torch.arange(self._places, device=self.position.device)
            self.move("position", self.arrived(at))
            self.ordered = False
        super().evict(leaving, count)

    def select_rows(self, index: Tensor) -> None:
        super().select_rows(index)
        self.pushed, self.table = self.pushed[index], self.table[index]
        here = index.to(self.recent_k.device)
        self.recent_k = self.recent_k[here]
        self.recent_v = self.recent_k if self.spec.tied else self.recent_v[here]
        self._tidy()

    # ---- as a part of a state --------------------------------------------------------------------------------------

    def export(self) -> dict[str, Any]:
        live = self.live()
        k, v = self.pair(live)
        sent = {"held": self.held, "capacity": self.capacity, "pushed": self.pushed, "columns": {}}
        sent |= {"position": self.arrived(live), "k": k}
        return sent if self.spec.tied else sent | {"v": v}

    def fields(self) -> dict[str, Any]:
        spec = self.spec
        wide = {"k": spec.d} if spec.tied else {"k": spec.d, "v": spec.dv}
        own = {name: Field(spec.dtype, ("tokens", width), finite=True) for name, width in wide.items()}
        return own | {"position": Field(torch.int64, ("tokens",), least=0, most=MOST), "columns": {}}

    def require_given(self, fields: dict[str, Any], seen: Tensor) -> None:
        """Raise ValueError unless saved slots, `fields`, were given as many tokens as their state has seen, (rows,)."""
        require_equal(fields["pushed"], seen, "tokens given to the exact tier")
        width = self.spec.d + self.spec.dv
        require_room(float(seen.double().sum()) * width, self.spec.dtype.itemsize, "the exact tokens")

    def adopt(self, fields: dict[str, Any]) -> None:
        held, position = fields["held"], fields["position"].cpu()
        self.pushed = fields["pushed"]
        order = torch.cat([torch.arange(n) for n in held.tolist()])
        self.ordered = torch.equal(held, self.pushed) and torch.equal(position, order)
        if not self.ordered:
            self.position = self.position.new_zeros(1)
        Arena.adopt(self, fields)
        row = torch.arange(self.spec.rows).repeat_interleave(held)
        k = fields["k"].cpu()
        v = k if self.spec.tied else fields["v"].cpu()
        self._widen(int(self._pages.max()))
        for piece in torch.arange(self.spec.rows).split(max(1, _COPIED // max(1, int(self.pushed.max())))):
            self._adopt_rows(piece, row, position, k, v)
        newest = position >= self.pushed[row] - self.page
        at, index = (x[newest].to(self.recent_k.device) for x in (row, position % self.page))
        self.recent_k[at, index] = k[newest].to(self.recent_k.device)
        if not self.spec.tied:
            self.recent_v[at, index] = v[newest].to(self.recent_v.device)

    def _adopt_rows(self, rows: Tensor, row: Tensor, position: Tensor, k: Tensor, v: Tensor) -> None:
        """Write the complete pages of some adjacent `rows` (r,) to blocks, from the tokens of all rows.

        Token i is of row[i] (e,), at position[i], with the key k[i] and the value v[i]. Dropped tokens are 0.
        """
        pages = self._pages[rows]
        mine = (row >= rows[0]) & (row <= rows[-1])
        mine &= position < self._pages[row] * self.page
        begin = (pages.cumsum(0) - pages)[row[mine] - rows[0]]
        at = begin * self.page + position[mine]

        def paged(x: Tensor) -> Tensor:
            blocks = x.new_zeros(int(pages.sum()) * self.page, x.shape[1])
            blocks[at] = x[mine]
            return blocks.view(-1, self.page, x.shape[1])

        if not int(pages.sum()):
            return
        keys = paged(k)
        number = self.cold.write(keys, keys if self.spec.tied else paged(v))
        of, page = _listed(torch.zeros_like(pages), pages)
        self.table[rows[of], page] = number


class StreamedSlots(ColdSlots):
    """Keep tokens in blocks and read all of them for each query, as `exact` reads its own: for epsilon = 0."""

    plain: ClassVar[bool] = True


def _listed(start: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
    """Return the pairs (row, page), two (b,), of the pages start[r] <= page < stop[r] of each row r, in order."""
    count = stop - start
    row = torch.arange(len(count)).repeat_interleave(count)
    first = (count.cumsum(0) - count)[row]
    return row, torch.arange(len(row)) - first + start[row]
