"""Keep the keys and values of all but the newest and the very first tokens in few bits per number.

A row is one (batch item, kv head) stream. A slot holds one token. The slots of all rows lie in flat tensors; a place is
an index into these. A token's position is its index in the stream of its row (arrival index). A code is the small
integer that stands for a number. A group is `group` consecutive tokens of a row, which are coded together once all of
them and `recent` tokens more have come. Until then the group is open, and its tokens are kept as they were given. In
shapes, r are rows, s slots of each row, m queries, d and dv the widths of a key and a value.
"""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvfloor.core.arena import Arena
from kvfloor.core.attend import MOST_SPLIT, has_triton
from kvfloor.core.device import sent
from kvfloor.core.fields import Field, require_equal
from kvfloor.core.memory import Common, Memory, common
from kvfloor.core.method import Guarantee, part_text
from kvfloor.core.partial import Partial
from kvfloor.core.slots import Slots
from kvfloor.core.spec import Spec
from kvfloor.core.store import Store
from kvfloor.methods.stores import fused
from kvfloor.methods.stores.codes import ChannelCodes, SharedCodes, SlotCodes, TokenCodes
from kvfloor.methods.stores.turn import Rotation, matrix, rotated, turned
from kvfloor.methods.stores.uncoded import Uncoded
from kvfloor.validation import count

GROUP = 32
"""Least number of tokens in a group."""

_TEXT = re.compile(r"k([0-9]+)v([0-9]+)")


def on_gpu(q: Tensor) -> bool:
    """Return True if the queries q are on a GPU where triton's kernels run."""
    return q.device.type == "cuda" and has_triton()


class Coding(Store):
    """Define a store that codes keys and values; a variant (subclass) says how, and is a frozen dataclass.

    first: number of a row's first tokens that are never coded.
    """

    first: int

    def newest(self) -> int:
        """Return how many of a row's newest tokens are never coded, beside those of a group that is not complete."""
        return 0

    @abstractmethod
    def least_group(self) -> int:
        """Return the least number of tokens that are coded together."""

    @abstractmethod
    def key_codes(self, spec: Spec, places: int, group: int, lose: bool) -> SlotCodes:
        """Return room for the codes of the keys in `places` slots, of which `group` tokens are coded together.

        lose: True if tokens may leave the slots while others stay.
        """

    @abstractmethod
    def value_codes(self, spec: Spec, places: int) -> SlotCodes:
        """Return room for the codes of the values in `places` slots; not called if the values are the keys."""

    def open(
        self,
        spec: Spec,
        capacities: Sequence[int],
        block: int,
        columns: dict[str, torch.dtype] | None = None,
        lose: bool = True,
    ) -> CodedSlots:
        return CodedSlots(spec, capacities, self, -(-self.least_group() // block) * block, columns, lose)

    def block(self, block: int) -> int:
        del block
        return self.least_group()


@dataclass(frozen=True)
class Coded(Coding):
    """Code keys and values in 2 to 8 bits per number: "k4v3" has 4 bits for keys and 3 for values.

    Values are rotated by a fixed random rotation and coded token by token (EDEN, Vargaftik et al. 2022; TurboQuant,
    Zandieh et al. 2025), with one 16-bit scale per token. In methods that evict tokens, keys are coded in the same way,
    after the mean key of their row's first group is subtracted. In `exact`, which keeps every token, each channel
    (entry of a key) is coded with its range in a group (KIVI, Liu et al. 2024). This has smaller errors, but needs
    groups whose tokens all stay.
    Two kinds of tokens are kept as they are given, because attention often puts much weight on them: those of a row's
    open group, with the `recent` tokens before it; and its `first` tokens, whose keys are unlike all others.
    keys, values  bits per number, 2 to 8
    first         number of a row's first tokens that are never coded
    recent        number of a row's newest tokens that are never coded, beside those of an open group; above 0 only in
                  methods that keep every token
    """

    name: ClassVar[str] = "coded"
    paper: ClassVar[str] = "Vargaftik et al. 2022, EDEN (arXiv 2108.08842); Liu et al. 2024, KIVI (arXiv 2402.02750)"
    keys: int
    values: int
    first: int = 4
    recent: int = 0

    def __post_init__(self) -> None:
        for name in ("keys", "values"):
            bits = getattr(self, name)
            if not isinstance(bits, int) or isinstance(bits, bool) or not 2 <= bits <= 8:
                raise ValueError(f"a store such as k4v4 has 2 to 8 bits per number, got {bits!r} for {name}")
        count("a store", least=0, first=self.first, recent=self.recent)

    @classmethod
    def parsed(cls, text: str, **arguments: Any) -> Coded | None:
        """Return the store that a text such as "k4v3" names; None if it is no such text.

        arguments: further fields of the store, such as `first`.
        """
        found = _TEXT.fullmatch(text)
        return None if found is None else cls(int(found[1]), int(found[2]), **arguments)

    @property
    def loses(self) -> bool:
        return self.recent == 0

    def newest(self) -> int:
        return self.recent

    def least_group(self) -> int:
        return GROUP

    def key_codes(self, spec: Spec, places: int, group: int, lose: bool) -> SlotCodes:
        if lose:
            return TokenCodes(spec, spec.d, self.keys, places, centred=True, unbiased=False)
        return ChannelCodes(spec, spec.d, self.keys, places, group, self.newest() % group)

    def value_codes(self, spec: Spec, places: int) -> SlotCodes:
        return TokenCodes(spec, spec.dv, self.values, places, centred=False, unbiased=True)

    def __str__(self) -> str:
        options = part_text(self, skip=("keys", "values")).removeprefix(self.name)
        return f"k{self.keys}v{self.values}{options}"


@dataclass(frozen=True)
class CodedView:
    """Give access to the first `width` slots of r rows, whose keys and values are decoded when they are read.

    owner  the slots of all rows
    rows   (r,) indices of the r rows; None: all rows
    live   bool (r, width), True for slots that hold a token; None: all do
    """

    owner: CodedSlots = field(repr=False)
    rows: Tensor | None
    width: int
    live: Tensor | None

    @cached_property
    def k(self) -> Tensor:
        """Return the keys (r, width, d) in the dtype of the cache."""
        return self.owner.numbers("k", self.rows, self.width)

    @cached_property
    def v(self) -> Tensor:
        """Return the values (r, width, dv) in the dtype of the cache."""
        return self.owner.numbers("v", self.rows, self.width)

    @cached_property
    def position(self) -> Tensor:
        """Return the tokens' positions (r, width)."""
        return self.owner.positions(self.rows, self.width)

    def over(self, q: Tensor, spec: Spec, hide: Tensor | None = None) -> Partial:
        """Compute attention of q (r, m, d) over these slots: a `Partial` (r, m), i.e. outputs and log-masses.

        hide: bool (r or 1, m or 1, s), True for slots that a query does not see; None: it sees all.
        Keys and values that are coded in rotated form are not rotated back one by one. Instead, queries are rotated,
        and outputs are rotated back. Where `fused.serves` says so, few queries are answered by a kernel that computes
        the same.
        """
        if q.shape[1] <= fused.MOST_QUERIES and fused.serves(self.owner):
            return fused.attention(self, q, spec, hide)
        if hide is None and self.rows is None and q.shape[1] <= MOST_SPLIT and on_gpu(q):
            from kvfloor.methods.stores import fused_triton

            if fused_triton.serves(self.owner):
                return fused_triton.attention(self, q, spec)
        return self.unpacked(q, spec, hide)

    def unpacked(self, q: Tensor, spec: Spec, hide: Tensor | None = None) -> Partial:
        """Do the work of `over` in torch, by unpacking all codes: the definition of this attention."""
        if all(codes.rounded for codes in self.owner.parts):
            return Partial.over(q, self.k, self.k if spec.tied else self.v, spec, hide=hide)
        k, v = self.owner.decoded(self, turn=True, rotate=rotated)
        dtype, device = spec.compute_dtype, str(q.device)
        asked = q.to(dtype)
        if self.owner.key_codes.turns:
            asked = rotated(asked)
        part = Partial.over(asked, k, v, spec, hide=hide)
        codes = self.owner.key_codes if spec.tied else self.owner.value_codes
        if codes is None or not codes.turns:
            return part
        return Partial(part.mean @ matrix(spec.dv, dtype, device), part.log_mass)

    def newest(self, q: Tensor, spec: Spec) -> Tensor:
        """Return attention outputs (r, g, 1, dv) of one token's queries q (r, g, 1, d), which see all slots."""
        return self.over(q.squeeze(2), spec).mean.unsqueeze(2)


class CodedSlots(Slots):
    """Store the held tokens of every row in few bits per number, except its first tokens and those of its open group.

    recent            number of a row's newest tokens that never have codes
    fresh_k, fresh_v  (rows, first + ring, d or dv): the tokens that are kept as they were given. One of a row's first
                      tokens has its position as index, one without a code yet `first` + position % `ring`. Zeros
                      elsewhere
    ordered           True if slot i of each row holds the token at position i, as no token ever left
    position          arrival index of each slot's token; without entries while `ordered` is True, when they are known
    coded             (rows,) number of tokens that came before those without codes
    key_codes         codes of the keys of all slots
    value_codes       codes of the values of all slots; None if the values are the keys (`spec.tied`)
    """

    plain: ClassVar[bool] = False
    position_dtype: ClassVar[torch.dtype] = torch.int32  # half the bytes: beside 4-bit codes, positions count
    recent = 0  # an attribute of the object, with its bytes, only where it is not 0
    _known_arrays: fused.KnownArrays | None = None  # what the kernel reads
    _known_coded: Common | None = None  # of `coded`

    def __init__(
        self,
        spec: Spec,
        capacities: Sequence[int],
        store: Coding,
        group: int,
        columns: dict[str, torch.dtype] | None = None,
        lose: bool = True,
    ) -> None:
        """Open empty slots, capacities[r] in row r.

        group    number of tokens that are coded together
        columns  name -> dtype of the policy's columns (tensors with one number per slot)
        lose     True if tokens may leave the slots while others stay
        """
        self.group, self.first = group, store.first
        if store.newest():
            self.recent = store.newest()
        super().__init__(spec, capacities, columns, lose)
        self.key_codes = store.key_codes(spec, self._places, group, lose)
        self.value_codes = None if spec.tied else store.value_codes(spec, self._places)
        self._reserve_groups()
        fused.serves(self)  # which loads the kernel where there is one: not later, when a step may be timed

    def _open(self, lose: bool) -> None:
        spec = self.spec
        self.bare = None
        fresh = (spec.rows, self.first + self.ring)
        self.fresh_k = torch.zeros(*fresh, spec.d, dtype=spec.dtype, device=spec.device)
        self.fresh_v = self.fresh_k
        if not spec.tied:
            self.fresh_v = torch.zeros(*fresh, spec.dv, dtype=spec.dtype, device=spec.device)
        self.coded = torch.zeros(spec.rows, dtype=torch.int64)
        self.ordered = not lose
        if self.ordered:
            self.position = self.position.new_zeros(0)

    @property
    def ring(self) -> int:
        """Return group + recent, the most tokens of a row that have no codes yet."""
        return self.group + self.recent

    @property
    def lead(self) -> int:
        """Return recent % group, the number of tokens that a row's first group lacks.

        Group i of a row has the tokens at the positions from i * group - lead.
        """
        return self.recent % self.group

    @property
    def parts(self) -> list[SlotCodes]:
        """Return the codes of the keys and, unless these are the values too, those of the values."""
        return [codes for codes in (self.key_codes, self.value_codes) if codes is not None]

    @property
    def _own(self) -> tuple[str, ...]:
        return () if self.ordered else ("position",)

    def _arrays(self) -> list[tuple[Memory, str, Tensor]]:
        codes = [(part, name, getattr(part, name)) for part in self.parts for name in part.own]
        return super()._arrays() + codes

    @property
    def token_bytes(self) -> float:
        return sum(part.token_bytes for part in self.parts)

    # ---- reading ---------------------------------------------------------------------------------------------------

    def _viewed(self, rows: Tensor | None, width: int, live: Tensor | None) -> CodedView:  # type: ignore[override]
        return CodedView(self, rows, width, live)

    def positions(self, rows: Tensor | None, width: int) -> Tensor:
        if self.ordered:
            r = self.spec.rows if rows is None else len(rows)
            return torch.arange(width, device=self.position.device).expand(r, -1)
        return super().positions(rows, width).long()

    def arrived(self, place: Tensor) -> Tensor:
        return self._within(place)[1] if self.ordered else super().arrived(place)

    def _within(self, place: Tensor) -> tuple[Tensor, Tensor]:
        """Return the row of each place (...), on the CPU, and the place's index in its row's stretch."""
        row = torch.bucketize(place.cpu(), self.offset + self.capacity, right=True).clamp_max(self.spec.rows - 1)
        return row, place - self.offset[row].to(place.device)

    def error_bounds(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return upper bounds on |key error|, |value error| and |value| over each row's held tokens: three (rows,).

        An error is the difference between a token's decoded key or value and the one that was given. The bounds follow
        from what is stored, and hold for every input, up to rounding in the compute dtype.
        """
        spec, width = self.spec, int(self.held.max())
        nothing = torch.zeros(spec.rows, dtype=spec.compute_dtype, device=self.position.device)
        longest = self.fresh_v.to(nothing.dtype).square().sum(-1).sqrt().amax(1)
        if width == 0:
            return nothing, nothing, longest
        position = self.positions(None, width)
        live = (torch.arange(width) < self.held.unsqueeze(1)).to(position.device)
        coded = live & ~self._uncoded(position, self.coded.to(position.device).unsqueeze(1))

        def most(part: SlotCodes) -> tuple[Tensor, Tensor]:
            entries = {own: self.across(getattr(part, own), None, width) for own in part.own}
            size, error = (x.masked_fill(~coded, 0).amax(1) for x in part.bounds(entries, self.group_of(position)))
            return size, error

        size, key_error = most(self.key_codes)
        value_error = key_error
        if self.value_codes is not None:
            size, value_error = most(self.value_codes)
        return key_error, value_error, torch.maximum(size, longest)

    def guarantee(self) -> Guarantee | None:
        """Return the bound on the error of attention over these slots, from `error_bounds`; it holds for every query.

        The answers are compared with attention over the same tokens as they were given. If keys err by at most K and
        values by at most E, and values are no longer than V, the error is at most E + scale |q| K V.
        """
        keys, values, longest = (x.double() for x in self.error_bounds())
        epsilon = float((values + keys * longest).max())
        stated = Guarantee(
            epsilon,
            0.0,
            "l2, over max(1, scale |q|_2), up to rounding",
            "every query",
            (),
            "cells of the stored codes; derived in docs/guarantees.md",
        )
        why = "" if epsilon < math.inf else "the codes bound no error"
        if bool((keys >= 2).any()):
            why = f"epsilon = {epsilon:.3g} is vacuous: keys of a row may err by 2 or more"
        return replace(stated, holds=False, why=why) if why else stated

    def numbers(self, name: str, rows: Tensor | None, width: int) -> Tensor:
        alike = self._uncoded_alike(width) if rows is None else None
        return self._decoded(*self._named(name), rows, width, alike=alike).to(self.spec.dtype)

    def decoded(self, view: CodedView, turn: bool, rotate: Rotation = turned) -> tuple[Tensor, Tensor]:
        """Return (keys, values) of a view, (r, s, d) and (r, s, dv), in the compute dtype.

        turn    True: return keys in rotated form if they are coded in that form (`SlotCodes.turns`); values likewise
        rotate  how tokens without a code are rotated
        """
        how: dict[str, Any] = {"turn": turn, "rotate": rotate}
        if view.rows is None:
            how["alike"] = self._uncoded_alike(view.width)
        keys = self._decoded(*self._named("k"), view.rows, view.width, **how)
        return keys, keys if self.spec.tied else self._decoded(*self._named("v"), view.rows, view.width, **how)

    def _decoded(
        self,
        part: SlotCodes,
        fresh: Tensor,
        rows: Tensor | None,
        width: int,
        turn: bool = False,
        coarse: bool = False,
        rotate: Rotation = turned,
        alike: Uncoded | None = None,
    ) -> Tensor:
        """Return the keys or values (r, width, w) in the first slots of `rows` (None: all), in the compute dtype.

        part, fresh  what `_named` returned
        turn         True: return them in rotated form if they are coded in that form
        coarse       True: read only the attributes in `part.coarse`
        rotate       how tokens without a code are rotated
        alike        what `_uncoded_alike` says of these slots; None: not asked
        """
        read, given = part.coarse if coarse else part.own, fresh.to(self.spec.compute_dtype)
        if turn and part.turns:
            given = rotate(given)
        if part.dithered:
            alike = None
        if alike is not None and self.ordered and isinstance(part, SharedCodes):  # no work for an open group
            whole = alike.coded
            x = part.decode({own: self.across(getattr(part, own), None, whole) for own in read}, None, None, turn)
            open_ = x.new_empty(len(x), width - whole, x.shape[2])
            return alike.written(torch.cat((x, open_), 1), given)
        entries = {own: self.across(getattr(part, own), rows, width) for own in read}
        grouped = isinstance(part, SharedCodes) and not self.ordered
        position = self.positions(rows, width) if alike is None or grouped else None
        x = part.decode(entries, rows, self.group_of(position) if grouped and position is not None else None, turn)
        if alike is not None:
            return alike.written(x, given)
        assert position is not None
        if part.dithered:
            x = x + part.shift(entries, rows, position, turn)
        return self._with_fresh(x, given, position, rows)

    def _uncoded_alike(self, width: int) -> Uncoded | None:
        """Return where the uncoded tokens of all held ones are, if rows hold `width` tokens each; None: rows differ."""
        if width == 0 or width != self.level:
            return None
        self._known_coded = common(self.coded, self._known_coded)
        coded, first = self._known_coded[1], self.first
        if coded is None:
            return None
        if self.ordered:
            stretches = self._stretches(0, min(first, width)) + self._stretches(max(coded, first), width)
            return Uncoded(coded, stretches)
        position = self.positions(None, width)
        return Uncoded(coded, [], (self._uncoded(position, coded), self._fresh_index(position)))

    def _stretches(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Return where the uncoded tokens start .. stop - 1 lie in `fresh_k`: (slot, index, number of tokens)."""
        found, first = [], self.first
        while start < stop:
            index, end = (start, first) if start < first else (first + start % self.ring, first + self.ring)
            tokens = min(end - index, stop - start)
            found.append((start, index, tokens))
            start += tokens
        return found

    def coarse_keys(self, rows: Tensor | None, width: int) -> Tensor:
        """Return the keys (r, width, d) in the first slots of `rows` (None: all), in their coarser reading."""
        return self._decoded(*self._named("k"), rows, width, coarse=True)

    def uncoded_values(self, width: int) -> Tensor:
        """Return the values (rows, width, dv) of the tokens in the first slots that have no code; 0 elsewhere.

        They are rotated, if the coded ones are coded in rotated form.
        """
        part, fresh = self._named("v")
        given, position = fresh.to(self.spec.compute_dtype), self.positions(None, width)
        x = given.new_zeros(*position.shape, given.shape[-1])
        return self._with_fresh(x, turned(given) if part.turns else given, position, None)

    def keys(self, place: Tensor, coarse: bool = False) -> Tensor:
        """Return the keys (..., d) at the places `place` (...), in the compute dtype.

        coarse: True: in their coarser reading (`SlotCodes.coarse`).
        """
        return self._at("k", place, coarse)

    def values(self, place: Tensor, coarse: bool = False, turn: bool = False) -> Tensor:
        """Return the values (..., dv) at the places `place` (...), in the compute dtype, as `keys` does.

        turn: True: in rotated form, if they are coded in that form.
        """
        return self._at("v", place, coarse, turn)

    def _at(self, name: str, place: Tensor, coarse: bool = False, turn: bool = False) -> Tensor:
        part, fresh = self._named(name)
        flat = place.flatten()
        row, slot = self._within(flat)
        position = (slot if self.ordered else self.arrived(flat)).unsqueeze(1)
        entries = {own: getattr(part, own)[flat].unsqueeze(1) for own in (part.coarse if coarse else part.own)}
        x = part.decode(entries, row, self.group_of(position), turn)
        if part.dithered:
            x = x + part.shift(entries, row, position, turn)
        given = fresh.to(x.dtype)
        if turn and part.turns:
            given = turned(given)
        return self._with_fresh(x, given, position, row).view(*place.shape, part.width)

    def _named(self, name: str) -> tuple[SlotCodes, Tensor]:
        """Return (codes, fresh) of the keys ("k") or values ("v"); fresh is `fresh_k` or `fresh_v`."""
        if name == "k" or self.spec.tied:
            return self.key_codes, self.fresh_k
        assert name == "v" and self.value_codes is not None
        return self.value_codes, self.fresh_v

    def _with_fresh(self, x: Tensor, fresh: Tensor, position: Tensor, rows: Tensor | None) -> Tensor:
        """Replace, in the decoded x (r, s, w), tokens that have no code by their entries in `fresh`; return x.

        fresh     (rows, first + ring, w), of all rows: `fresh_k` or `fresh_v`, in the dtype of x
        position  (r, s) position of each slot's token
        rows      (r,) indices of the rows of x; None: all rows
        """
        coded = (self.coded if rows is None else self.coded[rows]).to(x.device).unsqueeze(1)
        i, slot = self._uncoded(position, coded).nonzero(as_tuple=True)
        row = i if rows is None else rows.to(x.device)[i]
        x[i, slot] = fresh[row, self._fresh_index(position[i, slot])]
        return x

    def has_code(self, position: Tensor, rows: Tensor | None) -> Tensor:
        """Return a mask (r, s), True for the tokens at the positions (r, s) of `rows` (None: all) that are coded."""
        coded = (self.coded if rows is None else self.coded[rows]).to(position.device).unsqueeze(1)
        return ~self._uncoded(position, coded)

    def group_of(self, position: Tensor) -> Tensor:
        """Return the index, in its row, of the group that a token at each position (...) belongs to."""
        return (position + self.lead) // self.group

    def ready(self, seen: Tensor) -> Tensor:
        """Return the number of tokens that are to have codes, or are before such, in rows that saw `seen` (...)."""
        return (seen - seen % self.group - self.recent).clamp_min(0)

    def _uncoded(self, position: Tensor, coded: Tensor | int) -> Tensor:
        return (position >= coded) | (position < self.first)

    def _fresh_index(self, position: Tensor) -> Tensor:
        first = self.first
        return torch.where(position < first, position, first + position % self.ring)

    # ---- writing ---------------------------------------------------------------------------------------------------

    def push(self, k: Tensor, v: Tensor, position: Tensor, take: Tensor, bare: Tensor | None = None) -> None:
        del bare
        self._reserve(self.held + take)
        wanted = torch.arange(k.shape[1]) < take.unsqueeze(1)
        row, j = wanted.nonzero(as_tuple=True)
        slot = (self.offset + self.held)[row] + j
        row, j, slot = (x.to(k.device) for x in (row, j, slot))
        arrived = position.expand(self.spec.rows, -1)[row, j]
        if not self.ordered:
            self.position[slot] = arrived.to(self.position_dtype)
        at = self._fresh_index(arrived)
        self.fresh_k[row, at] = k[row, j]
        if not self.spec.tied:
            self.fresh_v[row, at] = v[row, j]
        self.held = self.held + take

    def put(self, k: Tensor, v: Tensor, position: int, bare: Tensor | None = None) -> None:
        del bare
        at = self.level
        assert at is not None
        if not self.ordered:
            self.number_from(at, position)
        index = position if position < self.first else self.first + position % self.ring
        self.fresh_k.narrow(1, index, 1).copy_(k)
        if not self.spec.tied:
            self.fresh_v.narrow(1, index, 1).copy_(v)
        self.count_one()

    def _lay_out(self, capacity: Tensor) -> None:
        super()._lay_out(capacity)
        self._known_arrays = None

    def evict(self, leaving: Tensor, count: Tensor | None = None) -> None:
        count = leaving.sum(1).cpu() if count is None else count
        self._number()
        row, place = self._marked(leaving, count)
        position = self.arrived(place)
        gone = self._uncoded(position, sent(self.coded, row.device)[row])
        rows, width = self.fresh_k.shape[:2]
        nowhere = rows * width
        index = torch.where(gone, row * width + self._fresh_index(position), nowhere)
        freed = torch.zeros(nowhere + 1, dtype=torch.bool, device=row.device).index_fill_(0, index, True)
        freed = freed[:nowhere].view(rows, width, 1)
        self.fresh_k.masked_fill_(freed, 0)
        self.fresh_v.masked_fill_(freed, 0)
        super().evict(leaving, count)

    def _number(self) -> None:
        """Keep each token's arrival index from now on, as its slot will no longer tell it."""
        if not self.ordered:
            return
        place = torch.arange(self._places, device=self.position.device)
        self.move("position", self.arrived(place).to(self.position_dtype))
        self.ordered = False

    def due(self, seen: Tensor, rows: Tensor | None) -> Tensor:
        """Return the rows, of `rows` (None: all), whose next group is complete and followed by `recent` tokens.

        seen: (rows,) number of tokens that each row has seen.
        """
        due = (seen % self.group == 0) & (self.ready(seen) > self.coded)
        if rows is not None:
            asked = torch.zeros_like(due)
            asked[rows] = True
            due = due & asked
        return due.nonzero().squeeze(1)

    def waiting(self, at: Tensor, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the held tokens of the next group to code in the rows `at` (r,), without the first tokens of a row.

        They are three tensors with an entry for each: the index of its row in `at`, its slot, its index in the group.
        seen: (rows,) number of tokens that each row has seen.
        """
        device = self.position.device
        start, stop = (x[at].to(device).unsqueeze(1) for x in (self.coded, self.ready(seen)))
        width = int(self.held[at].max())
        position = self.positions(at, width)
        held = (torch.arange(width) < self.held[at].unsqueeze(1)).to(device)
        among = (position >= start.clamp_min(self.first)) & (position < stop)
        i, slot = (held & among).nonzero(as_tuple=True)
        return i, slot, (position[i, slot] + self.lead) % self.group

    def settle(self, seen: Tensor, rows: Tensor | None) -> None:
        """Code the open groups that are complete, in these rows (None: all), but for the newest `recent` tokens.

        seen: (rows,) number of tokens that each row has seen.
        """
        at = self.due(seen, rows)
        if not len(at):
            return
        device, first, dtype = self.position.device, self.first, self.spec.compute_dtype
        ready = self.ready(seen)[at]
        group, here = (ready + self.lead) // self.group - 1, at.to(device)
        i, slot, from_group = self.waiting(at, seen)
        place = self.offset.to(device)[here[i]] + slot
        real = torch.zeros(len(at), self.group, dtype=torch.bool, device=device)
        real[i, from_group] = True  # neither the first tokens nor those that are gone
        begin = ready.to(device).unsqueeze(1) - self.group
        here, kept = here.unsqueeze(1), first + (begin + torch.arange(self.group, device=device)) % self.ring
        for part, fresh in ((self.key_codes, self.fresh_k), (self.value_codes, self.fresh_v)):
            if part is not None:
                entries = part.encode(at, group, fresh[here, kept].to(dtype), real)
                for name, coded in entries.items():
                    getattr(part, name)[place] = coded[i, from_group]
        self.fresh_k[here, kept] = 0
        self.fresh_v[here, kept] = 0
        self.coded = self.coded.index_copy(0, at, ready)

    def require_settled(self, fields: dict[str, Any], seen: Tensor) -> None:
        require_equal(fields["coded"], self.ready(seen), "coded tokens")

    # ---- size and rows ---------------------------------------------------------------------------------------------

    def resize(self, capacity: Tensor) -> None:
        super().resize(capacity)
        self._reserve_groups()

    def _reserve_groups(self) -> None:
        """Allocate what the tokens of one group share for as many groups as the longest row has slots for.

        So the bytes follow from the capacities, in a restored state too.
        """
        for part in self.parts:
            part.reserve((int(self.ready(self.capacity).max()) + self.lead) // self.group)

    def _turn(self, rows: Tensor | None) -> None:
        """Do nothing: this store is never used with keys that are rotated to ranks by RoPE (`Traits.turns`)."""

    def _moved(self) -> None:
        """Do nothing: no attribute aliases a flat tensor."""

    def select_rows(self, index: Tensor) -> None:
        super().select_rows(index)
        for part in self.parts:
            part.select_rows(index)
        self.coded = self.coded[index]
        here = index.to(self.fresh_k.device)
        self.fresh_k = self.fresh_k[here]
        self.fresh_v = self.fresh_k if self.spec.tied else self.fresh_v[here]

    # ---- as a part of a state --------------------------------------------------------------------------------------

    def export(self) -> dict[str, Any]:
        position = self.arrived(self.live()).to(self.position_dtype)
        sent = super().export() | {"position": position, "ordered": self.ordered}
        sent |= {"coded": self.coded, "fresh_k": self.fresh_k}
        if not self.spec.tied:
            sent["fresh_v"] = self.fresh_v
        groups = (int(self.coded.max()) + self.lead) // self.group
        for name, part in (("key_codes", self.key_codes), ("value_codes", self.value_codes)):
            sent[name] = None if part is None else part.sent(groups) | self._export(part)
        return sent

    def fields(self) -> dict[str, Any]:
        rows, _, d = self.fresh_k.shape
        fresh = {"fresh_k": Field(self.spec.dtype, (rows, self.fresh_k.shape[1], d), finite=True)}
        if not self.spec.tied:
            fresh["fresh_v"] = Field(self.spec.dtype, (rows, *self.fresh_v.shape[1:]), finite=True)
        columns = {name: Field(column.dtype, ("tokens",)) for name, column in self._columns().items()}
        coded = {"position": Field(torch.int32, ("tokens",), least=0), "columns": columns}
        return coded | fresh | {"ordered": Field(bool)}

    def require_sound(self, fields: dict[str, Any]) -> None:
        super().require_sound(fields)
        if fields["ordered"] and not self.ordered:
            raise ValueError("slots that lose tokens say that slot i of each row holds the token at position i")
        if fields["ordered"]:
            order = torch.cat([torch.arange(n, dtype=self.position_dtype) for n in fields["held"].tolist()])
            require_equal(fields["position"], order, "positions")
        for name, part in (("key_codes", self.key_codes), ("value_codes", self.value_codes)):
            if isinstance(part, SharedCodes):
                groups = min(fields[name][own].shape[1] for own in part.shared)
                if (int(fields["coded"].max()) + self.lead) // self.group > groups:
                    raise ValueError(f"ranges of {groups} groups, where {fields['coded'].tolist()} tokens are coded")

    def adopt(self, fields: dict[str, Any]) -> None:
        self.ordered = fields["ordered"]
        Arena.adopt(self, fields)
        for name, part in (("key_codes", self.key_codes), ("value_codes", self.value_codes)):
            if part is not None:
                part.adopt({key: value for key, value in fields[name].items() if key not in part.own})
        self._reserve_groups()
        self.coded = fields["coded"]
        self.fresh_k = fields["fresh_k"].to(self.fresh_k.device)
        self.fresh_v = self.fresh_k if self.spec.tied else fields["fresh_v"].to(self.fresh_v.device)

    def _sent(self, fields: dict[str, Any], owner: Memory, name: str) -> Tensor | None:
        for part_name, part in (("key_codes", self.key_codes), ("value_codes", self.value_codes)):
            if owner is part:
                return fields[part_name][name]
        return super()._sent(fields, owner, name)
