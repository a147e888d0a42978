"""Keep every token until a finished span of them is compacted to a few weighted ones (Attention Matching).

A row is one (batch item, kv head) stream, a slot the place of one held token. A token's position is its index in its
row's stream. A compacted token is one that was kept of a compacted span: its value was changed, and its log-weight is
added to its logits, so that it counts for the tokens that left.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvfloor.core.blocked import Blocked
from kvfloor.core.fields import MOST, Field
from kvfloor.core.method import Guarantee, Method, Traits
from kvfloor.core.spec import Spec
from kvfloor.core.state import ANEW, whole
from kvfloor.methods.compaction.matching import Kept, match
from kvfloor.methods.compaction.references import ReferenceQueries
from kvfloor.methods.compaction.weighted import LOG_WEIGHT, WeightedSlots
from kvfloor.validation import count, within

Span = slice | tuple[int, int] | None

_FIRST_SLOTS = 16
_QUERIES_AT_ONCE = 256  # bounds the mask and the logits of a long chunk


def ends_of(span: Span) -> tuple[int, int | None]:
    """Return (start, stop) of a span of positions; stop None: up to the newest token.

    span: (start, stop), a slice without a step, or None for all tokens. Raises ValueError for anything else, for
    negative positions and for a span without tokens.
    """
    start, stop = (span.start, span.stop) if isinstance(span, slice) else (0, None) if span is None else (-1, -1)
    if isinstance(span, (tuple, list)) and len(span) == 2:
        start, stop = span
    start = 0 if start is None else start
    numbers = [x for x in (start, stop) if x is not None]
    fits = all(isinstance(x, int) and not isinstance(x, bool) and x >= 0 for x in numbers)
    if not fits or (isinstance(span, slice) and span.step is not None) or (stop is not None and stop <= start):
        raise ValueError(
            f"a span to compact is (start, stop) or a slice of token positions with 0 <= start < stop, or None for all "
            f"tokens, got {span!r}"
        )
    return start, stop


@dataclass(frozen=True)
class Compact(Method):
    """Keep all keys and values until `compact` shrinks a span of tokens to a few weighted ones.

    queries  most queries per row that are kept as a sample of the queries to come, at least 1. They are dropped when a
             span is compacted
    A query attends exactly to all tokens until then. Afterwards it attends to the kept tokens of each span, whose
    log-weights and values were fitted so that mass and outputs on the sampled queries are those of the whole span.
    """

    name: ClassVar[str] = "compact"
    paper: ClassVar[str] = "arXiv 2602.16284 (Attention Matching)"
    wants_rotation: ClassVar[bool] = True
    queries: int = 512

    def __post_init__(self) -> None:
        count(self.name, least=1, queries=self.queries)

    @property
    def traits(self) -> Traits:
        return Traits(normalised=False, constant_memory=False)

    def open(self, spec: Spec) -> CompactState:
        return CompactState(self, spec)

    def capacity(self, n: int, prompt: int | None = None, pinned: int = 0) -> int | None:
        del n, prompt, pinned
        return None

    def guarantee(self, spec: Spec) -> Guarantee | None:
        del spec
        until = ("no span was compacted",)
        return Guarantee(0.0, 0.0, "max norm, up to rounding", "every query", until, "the definition of attention")


class CompactState(Blocked[Compact]):
    """Keep every token in slots until `compact` is called; a column of the slots has the tokens' log-weights.

    references  sample of the queries seen since the last compaction
    compacted   (rows, spans, 2) start and stop of each compacted span; a row too short for a span has stop <= start
    """

    slots: WeightedSlots

    def __init__(self, method: Compact, spec: Spec) -> None:
        if spec.tied:
            raise ValueError(
                f"{method} fits the values of tokens apart from their keys, and here a token's value is its key: take "
                f"another method, such as 'h2o@512'"
            )
        slots = WeightedSlots(spec, [_FIRST_SLOTS] * spec.rows)
        super().__init__(method, spec, slots, _QUERIES_AT_ONCE)
        self.references = ReferenceQueries(spec, method.queries)
        self.compacted = torch.zeros(spec.rows, 0, 2, dtype=torch.int64)

    @property
    def _plainly_read(self) -> bool:
        return True

    def _close(self, rows: Tensor | None) -> None:
        """Do nothing at the end of a block in these rows: tokens leave in `compact` and `forget` only."""

    def _at_once(self, seen: int, left: int) -> int:
        del seen
        return left

    def _on_queries(self, q: Tensor, before: Tensor, take: Tensor) -> None:
        del before
        self.references.record(q, self.seen, take)

    def _on_query(self, q: Tensor, seen: int) -> None:
        self.references.record_one(q, seen)

    def _require_group(self, g: int, attending: bool = False) -> None:
        held = self.references.group
        if not attending and held is not None and held != g:
            raise ValueError(f"the GQA group was {held} so far and is {g} now: it is fixed")

    @property
    def bytes_read(self) -> int:
        return round(int(self.slots.held.sum()) * (self.slots.token_bytes + self.spec.compute_dtype.itemsize))

    def guarantee(self) -> Guarantee | None:
        stated = self.method.guarantee(self.spec)
        if stated is None or not self.slots.weighted:
            return stated
        return replace(stated, holds=False, why=f"compacted spans: {self.compacted.shape[1]}")

    # ---- compacting ------------------------------------------------------------------------------------------------

    @whole
    def require_compactable(self, span: Span = None, to: float = 0.05) -> None:
        """Raise ValueError if `compact` with these arguments would; the call changes nothing."""
        self._wanted(span, to)

    @whole
    def compact(self, span: Span = None, to: float = 0.05) -> None:
        """Keep only a share of a span's tokens in every row, with log-weights and values fitted to the whole span.

        span  positions (start, stop), or a slice of them; None: all tokens. A row that has seen fewer than `stop`
              tokens compacts those that it has
        to    share of the span's tokens that stays, above 0 and at most 1, rounded up to whole tokens. Of a span that
              was compacted before, this share of its original tokens stays
        The fit is on the sample of queries seen since the last compaction, which is dropped afterwards. Raises
        ValueError, the state unchanged, for a span or share out of its domain, and if a row has seen no queries since.
        """
        start, stop, room = self._wanted(span, to)
        inside = self._inside(start, stop)
        kept = {int(row): self._fitted(int(row), inside[row], int(room[row])) for row in self._due(inside, room)}
        if not kept:
            return
        self._underway = "compact"
        self._replace(inside, kept)
        self.slots.resize(self.slots.held.amax().clamp_min(_FIRST_SLOTS).expand(self.spec.rows))
        self.references.restart(self.seen)
        self._note(start, stop, list(kept))

    def _note(self, start: int, stop: int, rows: list[int]) -> None:
        """Add a span to `compacted` for these rows, and leave out the earlier spans inside it."""
        span = torch.zeros(self.spec.rows, 1, 2, dtype=torch.int64)
        span[rows, 0, 0], span[rows, 0, 1] = start, self.seen[rows].clamp_max(stop)
        begin, end = self.compacted.unbind(-1)
        covered = (begin >= span[..., 0]) & (end <= span[..., 1]) | (begin >= end)
        self.compacted = torch.cat([self.compacted[:, ~covered.all(0)], span], 1)

    def _wanted(self, span: Span, to: float) -> tuple[int, int, Tensor]:
        """Check the arguments of `compact`; return start, stop, and the most tokens (rows,) that stay of the span."""
        if isinstance(to, bool):
            raise ValueError(f"to, the share of a span's tokens that stays, must lie in (0, 1], got {to!r}")
        to = within("to, the share of a span's tokens that stays,", to, 0.0, 1.0, low_open=True)
        start, end = ends_of(span)
        longest = int(self.seen.max())
        stop = longest if end is None else end
        if not start < stop <= longest:
            raise ValueError(f"the span {span!r} must lie within the {longest} tokens that the longest row has seen")
        length = (self.seen.clamp_max(stop) - start).clamp_min(0)
        room = torch.tensor([math.ceil(to * n - 1e-9) for n in length.tolist()])
        due = self._due(self._inside(start, stop), room)
        asked = (self.references.position >= 0).any(1)
        if not bool(asked[due].all()):
            raise ValueError(
                "some rows have seen no queries since their last compaction, and the fit is on such queries: feed "
                "tokens with their queries (step) first"
            )
        return start, stop, room

    def _inside(self, start: int, stop: int) -> Tensor:
        """Return a mask (rows, width), bool on the CPU, True for the slots of tokens start <= position < stop."""
        view = self.slots.view()
        inside = (view.position >= start) & (view.position < stop)
        return (inside if view.live is None else inside & view.live).cpu()

    def _due(self, inside: Tensor, room: Tensor) -> Tensor:
        """Return the rows that hold more tokens in the mask `inside` (rows, width) than room (rows,)."""
        return (inside.sum(1) > room).nonzero().squeeze(1)

    def _fitted(self, row: int, inside: Tensor, room: int) -> Kept:
        """Fit `room` tokens of a row to its slots in the mask `inside` (width,); the indices are slots of the row."""
        spec, slots = self.spec, self.slots
        slot = inside.nonzero().squeeze(1)
        begin, is_run = int(slots.offset[row]), int(slot[-1] - slot[0]) + 1 == len(slot)
        place = slice(begin + int(slot[0]), begin + int(slot[-1]) + 1) if is_run else (begin + slot).to(spec.device)
        k, v, log_weight = (x[place].unsqueeze(0) for x in (slots.k, slots.v, getattr(slots.columns, LOG_WEIGHT)))
        kept = match(k, v, log_weight, self.references.of(row, int(self.seen[row])), room, spec)
        return replace(kept, index=slot[kept.index.cpu()])

    def _replace(self, inside: Tensor, kept: dict[int, Kept]) -> None:
        """Write the kept tokens of some rows, {row: `Kept`}, and drop these rows' other tokens in the mask `inside`."""
        slots, leaving = self.slots, inside.clone()
        leaving[[row for row in range(self.spec.rows) if row not in kept]] = False
        for row, fit in kept.items():
            leaving[row, fit.index] = False
            place = (slots.offset[row] + fit.index).to(self.spec.device)
            slots.v[place] = fit.value.to(self.spec.dtype)
            getattr(slots.columns, LOG_WEIGHT)[place] = fit.log_weight.to(self.spec.compute_dtype)
        slots.weighted = True
        slots.evict(leaving)

    # ---- forgetting ------------------------------------------------------------------------------------------------

    def _require_forgettable(self, row: Tensor, position: Tensor) -> None:
        spans = self.compacted[row]
        if bool(((position.unsqueeze(1) >= spans[..., 0]) & (position.unsqueeze(1) < spans[..., 1])).any()):
            raise ValueError(f"some of these tokens are in a compacted span, whose tokens stand for each other: {ANEW}")

    def _forget(self, row: Tensor, position: Tensor) -> None:
        self.slots.evict(self.slots.find(row, position))

    # ---- as a part of a state --------------------------------------------------------------------------------------

    def fields(self) -> dict[str, Any]:
        return super().fields() | {"compacted": Field(torch.int64, (self.spec.rows, None, 2), least=0, most=MOST)}

    def require_sound(self, fields: dict[str, Any]) -> None:
        super().require_sound(fields)
        self.references.require_fitting(fields["references"], fields["seen"])
        log_weight = fields["slots"]["columns"][LOG_WEIGHT]
        if not bool(torch.isfinite(log_weight).all()):
            raise ValueError("log-weights have NaN or infinite entries")
        if bool((fields["compacted"][..., 1] > fields["seen"].unsqueeze(1)).any()):
            raise ValueError("a compacted span ends beyond the tokens that its row has seen")
        if bool(log_weight.any()) and not fields["compacted"].shape[1]:
            raise ValueError("tokens have log-weights, and no span was compacted")
