"""Read the keys of largest logit among those near the query on Z-order curves of random projections (ZETA).

In this file a row is one (batch item, kv head) stream, and a slot the place of one held token. A curve is a sorted
list of keys. A key's place on the curve is its Morton code, an integer computed from a 3-dimensional projection of the
key; keys that are close mostly have close codes. New keys wait outside the lists until they are merged, i.e. inserted
into the sorted lists of all curves. A candidate is a token whose exact logit is computed. `Slots` is the store of all
held keys and values, by row and slot. In shapes, r are rows, s vectors or m queries per row, c candidates per query, d
the width of a key; an argument `rows` (r,) has the indices of these rows (None: all).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvfloor.core.fields import require_equal
from kvfloor.core.randomness import row_keys, uniform
from kvfloor.core.rowwise import length, total
from kvfloor.core.selector import Chosen, Indexed, SelectorState
from kvfloor.core.slots import Slots
from kvfloor.core.spec import Spec
from kvfloor.core.stretches import Stretches
from kvfloor.methods.selectors.morton import cells, interleave
from kvfloor.validation import count

_DIMS = 3
_BITS = 9  # per coordinate; a shifted one takes a bit more, and 3 x 10 bits fit an int32
_NONE = torch.iinfo(torch.int32).max
_KEY_NUMBERS_AT_ONCE = 2**22


@dataclass(frozen=True)
class ZCurve(Indexed):
    """Read the k tokens of largest logit among those whose keys are near the query along space-filling curves.

    This is ZETA's search (Zeng et al. 2025), on the keys of a model that was not trained for the search.
    The place of a key x on a curve is the Morton code of the grid point of sqrt(d) P x / |x|. P is a 3 x d matrix of
    orthonormal rows, drawn from a fixed seed and independent of the data. The grid is fixed: its lines are quantiles
    of the standard normal. Each of the `curves` curves has its own P and its own shift of the grid, because a single
    curve puts some near neighbours far apart. The candidates are the `window` keys around the query's own place on each
    curve and the keys that are not merged into the curves yet (see `chunk`). The query reads the k candidates of
    largest exact logit. Of candidates with equal logits the newer one is preferred.

    ZETA trains a model to make queries and keys with 3 entries for this search. Here the 3 entries are a random
    projection of a key's d entries. So where d is large and keys have no clusters, most of the k tokens of largest
    logit among all held tokens are missed; the repository's characterize/lib/recall.py measures the share that is read.

    k        tokens read per query
    curves   number of curves, each with its own random projection
    window   number of keys of each curve that are candidates
    chunk    number of new keys that are merged into the curves together. Until then they wait unsorted, and all of
             them are candidates. Under an eviction policy keys are merged at the end of each block (the new tokens
             between two evictions) instead
    """

    name: ClassVar[str] = "zeta"
    paper: ClassVar[str] = "Zeng et al. 2025, ZETA (arXiv 2501.14577), as a search without training"
    k: int = 32
    curves: int = 4
    window: int = 32
    chunk: int = 64

    def __post_init__(self) -> None:
        count("zeta", least=1, k=self.k, curves=self.curves, window=self.window, chunk=self.chunk)

    def open(self, spec: Spec, slots: Slots, shared: dict[str, Tensor], in_order: bool) -> ZCurveState:
        del in_order
        shared["projections"] = projections(spec, self.curves)
        return ZCurveState(spec, slots, self, shared)

    def block(self) -> int:
        return self.chunk


def projections(spec: Spec, curves: int) -> Tensor:
    """Return a random projection with orthonormal rows for each curve: (curves, min(3, d), d), float64.

    spec: sizes and constants of a cache. The projections depend on its seed and its key width d alone.
    """
    dims = min(_DIMS, spec.d)
    key = row_keys(spec.seed, torch.arange(curves), "z-curve projections").view(-1, 1, 1)
    radius, angle = (uniform(key, torch.arange(spec.d * dims).view(spec.d, dims) * 2 + lane) for lane in (0, 1))
    normal = torch.sqrt(-2.0 * torch.log(radius)) * torch.cos(2.0 * math.pi * angle)
    return torch.linalg.qr(normal).Q.transpose(1, 2).contiguous().to(spec.device)


class ZCurveState(SelectorState):
    """Hold, per row and curve, the Morton codes of the merged keys in ascending order, and the slot of each code.

    Keys that arrived after the last merge are not in these lists.
    """

    def __init__(self, spec: Spec, slots: Slots, method: ZCurve, shared: dict[str, Tensor]) -> None:
        self.spec = spec
        self.method = method  # frozen: no part of the memory
        self.shared = shared
        columns = {"code": ((), torch.int32), "slot": ((), torch.int32)}
        self.sorted = Stretches(spec, slots.capacity, columns, lists=method.curves, fill=_NONE)

    # ---- keeping up ----------------------------------------------------------------------------------------

    def append(self, slots: Slots, before: Tensor) -> None:
        del before
        self.resize(slots)

    def resize(self, slots: Slots) -> None:
        if not torch.equal(slots.capacity, self.sorted.capacity):
            self.sorted.resize(slots.capacity)

    def require_fitting(self, fields: dict[str, Any], slots: dict[str, Any]) -> None:
        """Raise ValueError unless the lists of codes in a saved state fit the saved slots.

        The codes of a curve must be in ascending order. If there are n of them, they must belong to the first n slots
        of the row, and n must not exceed the number of held tokens.
        fields  name -> saved value of this state
        slots   name -> saved value of the `Slots`, such as "held", the number of tokens per row
        """
        merged, curves = fields["sorted"], self.method.curves
        require_equal(merged["capacity"], slots["capacity"], "room on the curves")
        if bool((merged["held"] > slots["held"]).any()):
            raise ValueError(f"{merged['held'].tolist()} slots on the curves, {slots['held'].tolist()} are held")
        sizes = merged["held"].repeat_interleave(curves).tolist()
        for code, slot in zip(merged["code"].split(sizes), merged["slot"].split(sizes), strict=True):
            if bool((code[1:] < code[:-1]).any()):
                raise ValueError("codes on a curve are out of order")
            require_equal(slot.sort().values.long(), torch.arange(len(slot)), "slots on a curve")

    def close(self, slots: Slots, rows: Tensor | None) -> None:
        rows = torch.arange(self.spec.rows) if rows is None else rows
        self._merge(slots, rows, self.sorted.held[rows])

    def evict(self, slots: Slots, leaving: Tensor) -> None:
        rows = leaving.any(1).nonzero().squeeze(1)
        self._merge(slots, rows, torch.zeros_like(rows))

    def _merge(self, slots: Slots, rows: Tensor, first: Tensor) -> None:
        """Merge the keys in slots first[r] .. held[r] - 1 of each of `rows` into the sorted lists of every curve.

        held[r] is the number of tokens that row r holds. first (r,) is the number of keys that are in each row's lists
        already and stay there; if it is 0, the lists are built anew from all held keys.
        """
        held, device = slots.held[rows], slots.position.device
        n, c = (int(x.max()) if len(rows) else 0 for x in (first, held - first))
        if c == 0:
            return
        slot = first.unsqueeze(1) + torch.arange(c)
        place = (slots.offset[rows].unsqueeze(1) + slot).clamp_max(int(slots.capacity.sum()) - 1)
        code = self._codes(slots.keys(place.to(device)))
        code = code.masked_fill((slot >= held.unsqueeze(1)).unsqueeze(1).to(device), _NONE)
        code, order = code.sort(dim=-1, stable=True)
        slot = slot.to(device, torch.int32).unsqueeze(1).expand(-1, self.method.curves, -1).gather(2, order)
        gone = (torch.arange(n) >= first.unsqueeze(1)).unsqueeze(1).to(device)
        every = None if len(rows) == self.spec.rows else rows
        old = self.sorted.across("code", every, n).masked_fill(gone, _NONE)
        # An item's place after the merge: its rank in its own list plus the items of the other list before it.
        at = torch.arange(n, device=device) + torch.searchsorted(code, old)
        at = torch.cat([at, torch.arange(c, device=device) + torch.searchsorted(old, code, right=True)], 2)
        for name, before, new in (("code", old, code), ("slot", self.sorted.across("slot", every, n), slot)):
            merged = torch.empty(*new.shape[:2], n + c, dtype=torch.int32, device=device)
            self.sorted.write(name, rows, held, merged.scatter_(2, at, torch.cat([before, new], 2)))
        self.sorted.held = self.sorted.held.index_copy(0, rows, held)

    def _codes(self, x: Tensor) -> Tensor:
        """Return the Morton codes (r, curves, s), int32, of keys or queries x (r, s, d): their places on each curve."""
        x = x.double()
        x = x / length(x).unsqueeze(-1).clamp_min(torch.finfo(x.dtype).tiny)
        # By `total`: codes are part of the state, so a token's code must not depend on the other tokens of its call.
        axes = self.shared["projections"].unsqueeze(1)  # (curves, 1, dims, d)
        many = max(1, _KEY_NUMBERS_AT_ONCE // max(1, axes.numel() * x.shape[0]))
        at = torch.cat([total(part[:, None, :, None] * axes) for part in x.split(many, 1)], 2) * math.sqrt(x.shape[-1])
        shift = torch.arange(self.method.curves, device=x.device) * 2**_BITS // self.method.curves
        return interleave(cells(at, _BITS) + shift.view(-1, 1, 1), _BITS + 1).to(torch.int32)

    # ---- choosing ------------------------------------------------------------------------------------------

    def choose(self, q: Tensor, slots: Slots, visible: Tensor, rows: Tensor | None = None) -> Chosen:
        slot = self._candidates(q, visible, rows)
        # Newest first, for ties; a slot found on several curves counts once.
        slot = slot.masked_fill(slot >= visible.unsqueeze(2), -1).sort(dim=-1, descending=True).values
        again = torch.zeros_like(slot, dtype=torch.bool)
        again[..., 1:] = slot[..., 1:] == slot[..., :-1]
        logit = self._logits(q, slot.clamp_min(0), slots, rows).masked_fill(again | (slot < 0), -torch.inf)
        best = logit.argsort(dim=-1, descending=True, stable=True)[..., : self.method.k]
        return Chosen(slot.gather(2, best).clamp_min(0), logit.gather(2, best) == -torch.inf)

    def _candidates(self, q: Tensor, visible: Tensor, rows: Tensor | None) -> Tensor:
        """Return the slots (r, m, c) of the candidate tokens of queries q (r, m, d); a slot may occur more than once.

        visible (r, m): query j of row i sees slots 0 .. visible[i, j] - 1. The result may contain other slots, which
        the caller must ignore.
        """
        (r, m, _), device, window = q.shape, q.device, self.method.window
        used = (self.sorted.held if rows is None else self.sorted.held[rows]).to(device)
        width = int(self.sorted.capacity.max())
        gone = torch.arange(width, device=device) >= used.view(-1, 1, 1)
        code = self.sorted.across("code", rows, width)
        if rows is not None or bool((self.sorted.capacity != width).any()):
            code = code.masked_fill(gone, _NONE)  # entries gathered beyond a row's stretch belong to another row
        at = torch.searchsorted(code, self._codes(q)) - window // 2
        at = torch.minimum(at, (used - window).view(-1, 1, 1)).clamp_min(0)
        at = (at.unsqueeze(3) + torch.arange(window, device=device)).flatten(2)
        near = self.sorted.across("slot", rows, width).gather(2, at.clamp_max(width - 1)).long()
        near = near.masked_fill(at >= used.view(-1, 1, 1), _NONE)
        near = near.view(r, -1, m, window).transpose(1, 2).flatten(2)
        first = torch.minimum(used.unsqueeze(1), visible - 1).clamp_min(0)
        waiting = torch.arange(int((visible - first).max()), device=device)
        return torch.cat([near, first.unsqueeze(2) + waiting], 2)

    def _logits(self, q: Tensor, slot: Tensor, slots: Slots, rows: Tensor | None) -> Tensor:
        """Return scale q.k, float64 (r, m, c), of queries q (r, m, d) with the keys in slots `slot` (r, m, c)."""
        (r, m, c), logits = slot.shape, []
        q = q.double() * self.spec.scale
        at_once = max(1, _KEY_NUMBERS_AT_ONCE // max(1, r * c * self.spec.d))
        for start in range(0, m, at_once):
            part = slice(start, start + at_once)
            keys = slots.keys(slots.at(slot[:, part], rows)).double()
            logits.append(torch.einsum("rmcd,rmd->rmc", keys, q[:, part]))
        return torch.cat(logits, 1)

    # ---- what it costs -------------------------------------------------------------------------------------

    def bytes_read(self, held: Tensor) -> int:
        """Return the bytes that one query per row reads, summed over the rows.

        held (rows,) is the number of tokens that each row holds. On each curve, the query reads the codes that a binary
        search compares, and the slot numbers of the `window` keys around the place found. It also reads the keys of all
        candidates, and the values of the k candidates of largest logit.
        """
        used, method, number = self.sorted.held, self.method, self.spec.dtype.itemsize
        searched = torch.ceil(torch.log2((used + 1).double())).long()
        index = 4 * method.curves * (searched + used.clamp_max(method.window))
        candidates = torch.minimum(used, torch.tensor(method.curves * method.window)) + held - used
        keys, values = candidates * self.spec.d, candidates.clamp_max(method.k) * self.spec.dv
        return int(index.sum()) + number * int((keys + values).sum())
