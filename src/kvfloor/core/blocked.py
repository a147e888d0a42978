"""Define a state that evicts or compresses after every `block`-th token of a row, however calls split the stream.

A state is a cache method's memory of its streams. A row is one (batch item, kv head) stream; its clock `seen` counts
its tokens. A block is `block` consecutive tokens of a row; a block end comes after the last of them, and the open block
is the tokens since the last block end. A slot is the place of one held token.
A selector picks the held tokens that a query reads; some selectors keep an index of the held keys. A summary is a
compressed form of evicted tokens. A `Partial` is a result of attention: the mean of values and the log-mass
(log-sum-exp of logits).
A token's rank is its index among the held tokens of its row, the oldest at 0. If the spec (the state's sizes and
constants) has a rotation, keys and queries are rotated to ranks: by RoPE with the rank in place of the position in the
stream.
In shapes, r are rows (some rows only, where an argument `rows` selects them), g query heads per kv head, a new tokens,
m queries, s slots, d and dv the widths of a key and a value. take[r] and count[r] are numbers of tokens of row r;
what follows them in the row is padding, whose answers have no meaning: the public calls (`State.step`) replace them.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import Tensor

from kvfloor.core.attend import fused
from kvfloor.core.device import sent
from kvfloor.core.memory import Common, common
from kvfloor.core.partial import Partial
from kvfloor.core.rotation import Circle
from kvfloor.core.selector import Chosen, Everything, Indexed, Selector, SelectorState
from kvfloor.core.slots import Slots, require_positions
from kvfloor.core.spec import Spec
from kvfloor.core.state import M, State, whole

if TYPE_CHECKING:
    from kvfloor.core.graphs import StepGraphs


class Blocked(State[M]):
    """Keep new tokens' keys and values in `slots`, and call `_close` after every `block`-th token of a row.

    A slot is the place of one held token. A row is one (batch item, kv head) stream; its clock `seen` counts its
    tokens. Each row has its own clock, so rows of different length complete their blocks in different calls. A variant
    (subclass) writes `_close`, which evicts or compresses; `_rest`, attention over memory outside the slots; and, if it
    uses queries, `_on_queries`. A selector picks the held tokens that a query reads. If the selector keeps an index of
    the held tokens, this class adds every new token to the index, and the variant must pass the index the tokens that
    it evicts.

    slots     storage of the held tokens
    block     number of tokens of a row from one call of `_close` to the next
    in_order  True if tokens stay in the slots in order of arrival, as none is ever evicted; the index relies on it
    """

    slots: Slots
    _known_clock: Common | None = None  # of `seen`
    _known_graphs: StepGraphs | None = None  # which replay the device's work of decode steps

    def __init__(self, method: M, spec: Spec, slots: Slots, block: int, in_order: bool = False) -> None:
        super().__init__(method, spec)
        self.slots = slots
        self.block = block
        self.selection: SelectorState | None = None
        if isinstance(self._selector, Indexed):
            self.selection = self._selector.open(spec, slots, self.shared, in_order)

    # ---- methods that a variant writes -----------------------------------------------------------------------------

    @abstractmethod
    def _close(self, rows: Tensor | None) -> None:
        """Handle the end of a block in these rows (None: all), for example by evicting tokens."""

    def _rest(self, q: Tensor) -> Partial | None:
        """Return attention of q (rows, m, d) over memory outside the slots, such as a summary: a `Partial` (rows, m).

        None if there is no such memory.
        """
        del q
        return None

    def _at_once(self, seen: int, left: int) -> int:
        """Return how many of a row's next `left` tokens may be appended in one piece that goes past block ends.

        0 (the default) means that no piece may go past a block end. The caller then appends the tokens up to the next
        block end as one piece. A variant returns more only if `_close` would do nothing at the block ends inside the
        piece. seen: number of tokens that the row saw before.
        """
        del seen, left
        return 0

    @property
    def _selector(self) -> Selector:
        """Return the selector, which chooses the held tokens that a query attends to."""
        return Everything()

    @property
    def _plainly_read(self) -> bool:
        """Return True if a query attends to all held tokens and nothing else: no selector, no summary.

        Decode steps of such a state may be computed in a faster way, without masks. After a step of this kind the
        hook `_on_query` is called with its queries, after any other the hook `_on_queries`.
        """
        return False

    def _on_queries(self, q: Tensor, before: Tensor, take: Tensor) -> None:
        """Record queries q (rows, g, a, d) that were just answered; the default does nothing.

        A variant overrides it if its evictions or error bound depend on queries.
        before  (rows,) tokens that a row held before the queries' own tokens were appended
        take    (rows,) a row's real queries are its first take[r]; the rest is padding
        """

    def _on_query(self, q: Tensor, seen: int) -> None:
        """Record the queries q (rows, g, 1, d) of a decode step that just gave every row one token.

        The default does nothing. A variant overrides it if its evictions or error bound depend on queries. seen: number
        of tokens that every row saw before the step. The host counts nothing here, but in `_count_query`.
        """

    def _count_query(self, seen: int) -> None:
        """Note on the host that `_on_query` recorded queries; the default does nothing."""

    # ---- written once --------------------------------------------------------------------------------------

    @property
    def held(self) -> Tensor:
        return self.slots.held.clone()

    def require_sound(self, fields: dict[str, Any]) -> None:
        super().require_sound(fields)
        require_positions(fields["slots"], fields["seen"])
        self.slots.require_settled(fields["slots"], fields["seen"])
        if self.selection is not None:
            self.selection.require_fitting(fields["selection"], fields["slots"])

    def _require_tokens(self, k: Tensor, v: Tensor, take: Tensor) -> None:
        super()._require_tokens(k, v, take)
        if not self.slots.plain and int((self.seen + take).max()) > self.slots.longest:
            raise ValueError(f"{self.method} numbers tokens in 32 bits: a stream ends after {self.slots.longest:,}")

    def _append(self, k: Tensor, v: Tensor, take: Tensor) -> None:
        self._feed(k, v, None, take)

    def _step_partial(self, k: Tensor, v: Tensor, q: Tensor, take: Tensor) -> Partial:
        answers = self._feed(k, v, q, take)
        assert answers is not None
        return answers

    @property
    def _steps_alone(self) -> bool:
        """Return True if a decode step, one new token per row, can be computed in one go, without masks.

        For this every query must attend to all held tokens and nothing else, and all rows must have seen equally many
        tokens, hold equally many, and have a free slot.
        """
        at = self.slots.level
        if at is None or at >= self.slots.stride or not self._plainly_read:
            return False
        seen = self._clock
        return seen is not None and seen < self.slots.longest

    @property
    def _clock(self) -> int | None:
        """Return the number of tokens that every row has seen; None if rows differ."""
        self._known_clock = common(self.seen, self._known_clock)
        return self._known_clock[1]

    def _step_one(self, k: Tensor, v: Tensor, q: Tensor) -> Tensor:
        seen, asked, bare = self._clock, q, k
        assert seen is not None
        if self.spec.rotation is not None:
            at = self.slots.held.tolist()[0]
            circle = self._circle(torch.full((1, 1), at, device=k.device), below=at + 1)
            k, asked = self.spec.rotation.turned(k, circle), self.spec.rotation.turned(q, circle)
        if self._known_graphs is not None and self._graphable:
            out = self._known_graphs.step(self, k, v, q, seen)
        else:
            self.slots.put(k, v, seen, bare)
            out = self.slots.newest(asked)
            self._on_query(q, seen)
            self._count_query(seen)
        self.seen = self.seen + 1
        self._known_clock = ref(self.seen), seen + 1
        if (seen + 1) % self.block == 0:
            self._end(None)
        return out

    @property
    def _graphable(self) -> bool:
        """Return True if a step of one token in every row is the same work at the same addresses in every block."""
        return self.slots.plain and self.spec.rotation is None

    @whole
    def replay_steps(self, graphs: StepGraphs | None) -> None:
        """From now on, capture and replay the device's work of decode steps by `graphs`; None: no longer.

        Steps that `_steps_alone` or `_graphable` rule out run as before, and so does what comes at the end of a block.
        """
        self._known_graphs = graphs

    def _work_one(self, at: int, seen: int, k: Tensor, v: Tensor, q: Tensor) -> Tensor:
        """Do the device's work of `_step_one` for a token that goes to slot `at`, and return its outputs.

        Nothing is counted on the host, and positions are not written. seen: tokens that every row saw before.
        """
        self.slots.write(at, k, v)
        out = self.slots.newest(q, at + 1)
        self._on_query(q, seen)
        return out

    def _feed(self, k: Tensor, v: Tensor, q: Tensor | None, count: Tensor) -> Partial | None:
        """Append the first count[r] of the t tokens of row r; return the answers to their queries q (rows, g, t, d).

        k is (rows, t, d), v (rows, t, dv). The answers are a `Partial` (rows, g, t); None without q. The tokens are
        appended in pieces that do not cross a block end of their row. After each piece `_close` is called for the rows
        whose block is complete.
        """
        seen, counts = self.seen.tolist(), count.tolist()  # comparing lists is faster than comparing small tensors
        if min(counts) == max(counts) and (counts[0] == 1 or min(seen) == max(seen)):
            return self._feed_in_step(k, v, q, count, seen[0])
        out = None
        if q is not None:
            out = Partial.empty(*q.shape[:3], dv=self.spec.dv, dtype=self.spec.compute_dtype, device=q.device)
        done = torch.zeros_like(count)
        while bool((done < count).any()):
            take = torch.minimum(count - done, self.block - self.seen % self.block)
            a = int(take.max())
            index = sent(done.unsqueeze(1) + torch.arange(a), k.device)
            # Padding beyond a row's own tokens may be anything, NaN too.
            beyond = sent((torch.arange(a) >= take.unsqueeze(1)).unsqueeze(-1), k.device)
            new_k, new_v = (_cut(x, index).masked_fill(beyond, 0) for x in (k, v))
            part = self._take(new_k, new_v, None if q is None else _cut(q, index), take)
            if part is not None and out is not None:
                row, j = (torch.arange(a) < take.unsqueeze(1)).nonzero(as_tuple=True)
                for whole, new in ((out.mean, part.mean), (out.log_mass, part.log_mass)):
                    whole[row, :, (done[row] + j)] = new[row, :, j]
            done = done + take
        return out

    def _feed_in_step(self, k: Tensor, v: Tensor, q: Tensor | None, count: Tensor, seen: int) -> Partial | None:
        """Append each row's first tokens, equally many in all rows, and return the answers to their queries.

        q is (rows, g, t, d), k (rows, t, d), v (rows, t, dv). The answers are a `Partial` (rows, g, t); None without q.
        count  (rows,) number of these tokens, the same in every row; the rest is padding, whose answers are empty
        seen   number of tokens that every row saw before. If count is 1 rows may differ, as one token is never cut;
               then `seen` is the number of row 0
        The tokens are cut at block ends by slices, without an index per row, because all rows reach their block ends
        together.
        """
        parts: list[Partial] = []
        t, done = int(count[0]), 0
        # A long piece without the fused kernel would store all its logits.
        fits = t > 1 and self.slots.plain and (q is None or fused(q, k, v, self.spec.softcap))
        while done < t:
            a = min(t - done, (self._at_once(seen, t - done) if fits else 0) or self.block - seen % self.block)
            piece = (k, v, q)
            if a < k.shape[1]:
                cut = slice(done, done + a)
                piece = (k[:, cut], v[:, cut], None if q is None else q[:, :, cut])
            part = self._take(*piece, count if a == t else torch.full_like(count, a))
            if part is not None:
                parts.append(part)
            done, seen = done + a, seen + a
        if q is None:
            return None
        if t < q.shape[2]:  # the padding packed behind the real tokens
            shape = (*q.shape[:2], q.shape[2] - t)
            parts.append(Partial.empty(*shape, dv=self.spec.dv, dtype=self.spec.compute_dtype, device=q.device))
        if len(parts) == 1:
            return parts[0]
        return Partial(torch.cat([x.mean for x in parts], 2), torch.cat([x.log_mass for x in parts], 2))

    def _take(self, k: Tensor, v: Tensor, q: Tensor | None, take: Tensor) -> Partial | None:
        """Append the first take[r] tokens of row r and return the answers to their queries q (rows, g, a, d).

        The answers are a `Partial` (rows, g, a); None without q. k is (rows, a, d), v (rows, a, dv). The tokens of a
        row must lie within one block, unless `_close` would do nothing at the block ends inside them. Afterwards
        `_close` is called for the rows whose block is complete.
        """
        before, asked, bare = self.slots.held, q, k
        if self.spec.rotation is not None:
            place = before.unsqueeze(1) + torch.arange(k.shape[1])
            circle = self._circle(sent(place, k.device), below=int(before.max()) + k.shape[1])
            k = self.spec.rotation.turned(k, circle)
            asked = None if q is None else self._turned(q, place, below=int(before.max()) + k.shape[1])
        self._push(k, v, take, bare)
        part = None
        if q is not None and asked is not None:
            part = self._answer(asked, k, v, before)
            self._on_queries(q, before, take)
        self._advance(take)
        return part

    def _circle(self, place: Tensor, below: int) -> Circle:
        """Return the RoPE cosines and sines of the ranks `place` (...), both (..., pairs) in the compute dtype.

        pairs is the number of pairs of a key's entries that are rotated. All ranks are below `below`.
        """
        assert self.spec.rotation is not None
        return self.spec.rotation.circle(place, self.spec.compute_dtype, below)

    def _turned(self, q: Tensor, place: Tensor, below: int) -> Tensor:
        """Rotate queries q (r, g, a, d) to the ranks `place` (r, a); return q itself if the spec has no rotation.

        All ranks are below `below`.
        """
        if self.spec.rotation is None:
            return q
        return self.spec.rotation.turned(q, self._circle(sent(place.unsqueeze(1), q.device), below))

    def _push(self, k: Tensor, v: Tensor, take: Tensor, bare: Tensor | None = None) -> Tensor:
        """Append the first take[r] tokens of row r to the slots; return the number of tokens held before, (rows,).

        k (rows, a, d) and v (rows, a, dv) are the new tokens' keys and values; `bare` (rows, a, d) the keys before they
        were rotated, which are stored too if the slots keep them.
        """
        before = self.slots.held
        position = self.seen.unsqueeze(1)
        if k.shape[1] > 1:
            position = position + torch.arange(k.shape[1])
        self.slots.push(k, v, sent(position, k.device), take, bare)
        if self.selection is not None:
            self.selection.append(self.slots, before)
        return before

    def _advance(self, take: Tensor) -> None:
        """Advance the clocks `seen` by take (rows,) tokens, and call `_close` for rows whose block is complete now."""
        self.seen = self.seen + take
        ends = [
            seen % self.block == 0 and took > 0 for seen, took in zip(self.seen.tolist(), take.tolist(), strict=True)
        ]
        if any(ends):
            self._end(None if all(ends) else torch.tensor(ends).nonzero().squeeze(1))

    def _end(self, rows: Tensor | None) -> None:
        """Handle the end of a block in these rows (None: all): evict, code what stays, and update the index."""
        self._close(rows)
        self.slots.settle(self.seen, rows)
        if self.selection is not None:
            self.selection.close(self.slots, rows)

    def _answer(self, q: Tensor, new_k: Tensor, new_v: Tensor, before: Tensor) -> Partial:
        """Return causal attention of the newest tokens' queries over all memory, a `Partial` (rows, g, a).

        The memory is the slots and what is outside them, such as a summary.
        q       (rows, g, a, d) queries of the a newest tokens of each row, whose keys new_k (rows, a, d) and values
                new_v (rows, a, dv) are in the slots already, behind the older tokens
        before  (rows,) number of these older tokens
        """
        shape = q.shape[:3]
        rest = self._rest(q.flatten(1, 2))
        part = self._among_slots(q, new_k, new_v, before)
        return part if rest is None else part.merge(rest.shaped(*shape))

    def _among_slots(self, q: Tensor, new_k: Tensor, new_v: Tensor, before: Tensor) -> Partial:
        """Return causal attention of the newest tokens' queries over the slots alone: a `Partial` (rows, g, a).

        q       (rows, g, a, d) queries of the a newest tokens of each row, whose keys new_k (rows, a, d) and values
                new_v (rows, a, dv) are in the slots already, behind the older tokens
        before  (rows,) number of these older tokens
        If there are several new tokens and no selector, attention to the older tokens and to the new ones is computed
        separately and merged, without a mask of rows x queries x slots.
        """
        shape, past = q.shape[:3], int(before.max())
        if self.selection is not None:
            return self._among_chosen(q, before).shaped(*shape)
        if shape[2] == 1 or not isinstance(self._selector, Everything):
            return self._among_all(q.flatten(1, 2), shape[1], before).shaped(*shape)
        part = Partial.causal(q, new_k, new_v, self.spec)
        if past == 0:
            return part
        view = self.slots.view(width=past)
        gone = torch.arange(past) >= before.unsqueeze(1)  # slots of a row's own new tokens, or empty
        hide = sent(gone.unsqueeze(1), q.device) if bool(gone.any()) else None
        return view.over(q.flatten(1, 2), self.spec, hide).shaped(*shape).merge(part)

    def _among_all(self, flat: Tensor, g: int, before: Tensor) -> Partial:
        """Return causal attention over all slots, without those that a selector hides: a `Partial` (rows, g*a).

        `flat` (rows, g*a, d) holds the queries of the a newest tokens of each row. These tokens are in the slots
        already, behind before[r] older tokens in row r. The selector is one that keeps no index.
        """
        m = flat.shape[1]
        view = self.slots.view()
        width, a = view.width, m // g
        if a == 1:  # the newest token sees every held token
            hide = None if view.live is None else ~view.live.unsqueeze(1)
        else:
            limit = before.unsqueeze(1) + torch.arange(a)  # the last slot each query sees, by row
            if bool((before == before[0]).all()):
                limit = limit[:1]
            hide = sent(torch.arange(width) > limit.unsqueeze(-1), flat.device)
            hide = hide.unsqueeze(1).expand(-1, g, -1, -1).reshape(hide.shape[0], m, width)
        hide = self._selector.hide(flat, view, self.spec, hide)
        return view.over(flat, self.spec, hide)

    def _among_chosen(self, q: Tensor, before: Tensor) -> Partial:
        """Return causal attention over the slots that the selector's index chooses: a `Partial` (rows, g*a).

        q (rows, g, a, d) holds the queries of the a newest tokens of each row. These tokens are in the slots already,
        behind before[r] older tokens in row r.
        """
        assert self.selection is not None
        arrived = torch.arange(q.shape[2])
        visible = before.unsqueeze(1) + arrived + 1
        real = visible <= self.slots.held.unsqueeze(1)
        position = (self.seen.unsqueeze(1) + arrived).masked_fill(~real, -1)
        if not bool(real.all()):  # padding may be anything, NaN too
            q = q.masked_fill(~sent(real, q.device)[:, None, :, None], 0)
        visible = torch.minimum(visible, self.slots.held.unsqueeze(1))
        chosen = self.selection.follow(q, self.slots, sent(visible, q.device), sent(position, q.device))
        return self._over(q.flatten(1, 2), chosen)

    def _over(self, q: Tensor, chosen: Chosen) -> Partial:
        """Return attention of q (rows, m, d) over the slots that `chosen` lists for each query: a `Partial` (rows, m).

        Few chosen slots are copied out; if they are many, all slots are read under a mask.
        """
        (rows, m, c), width = chosen.index.shape, int(self.slots.held.max())
        if m * c > width:
            view = self.slots.view()
            return view.over(q, self.spec, chosen.unread(width))
        index = chosen.index.masked_fill(chosen.dead, 0)
        place = self.slots.at(index).flatten(0, 1)
        k, v = self.slots.keys(place), self.slots.values(place)
        alone = q.reshape(rows * m, 1, self.spec.d)
        part = Partial.over(alone, k, v, self.spec, hide=chosen.dead.flatten(0, 1).unsqueeze(1))
        return Partial(part.mean.view(rows, m, self.spec.dv), part.log_mass.view(rows, m))

    def unread(self, q: Tensor) -> Tensor | None:
        """Return a mask, True for the slots that queries q (rows, m, d) do not read; None if they read every slot.

        The queries come without new tokens, and not yet rotated. The mask is bool (rows or 1, m or 1, s) over the s
        slots.
        """
        return self._left_unread(self._newest(q))

    def _newest(self, q: Tensor) -> Tensor:
        """Rotate queries q (rows, m, d), given without new tokens, to the rank of the newest held token of their row.

        Without a rotation in the spec, q is returned unchanged.
        """
        held = self.slots.held
        place = (held - 1).clamp_min(0).unsqueeze(1)
        return self._turned(q.unsqueeze(1), place, below=max(1, int(held.max()))).squeeze(1)

    def _left_unread(self, q: Tensor) -> Tensor | None:
        """Return a mask, True for the slots that queries q (rows, m, d) do not read; None if they read every slot.

        The queries come without new tokens, and are rotated already if the spec has a rotation. The mask is bool (rows
        or 1, m or 1, s) over the s slots.
        """
        view = self.slots.view()
        if self.selection is not None:
            return self._choose(q).unread(view.width)
        return self._selector.hide(q, view, self.spec, None if view.live is None else ~view.live.unsqueeze(1))

    def _choose(self, q: Tensor) -> Chosen:
        assert self.selection is not None
        if q.shape[1] == 0 or not bool(self.slots.held.any()):
            nothing = torch.zeros(*q.shape[:2], 0, dtype=torch.int64, device=q.device)
            return Chosen(nothing, nothing.bool())
        visible = self.slots.held.unsqueeze(1).expand(-1, q.shape[1])
        return self.selection.choose(q, self.slots, sent(visible, q.device))

    @property
    def slot_bytes_read(self) -> int:
        """Return the bytes of keys, values and selector's index that one query per row reads, summed over all rows."""
        if self.selection is not None:
            read = self.selection.bytes_read(self.slots.held)
        else:
            read = self._selector.bytes_read(self.slots.held, self.spec)
        return round(read * self.slots.token_bytes / self.spec.token_bytes)

    @property
    def scores_read(self) -> int:
        if self.selection is None:
            return int(self.slots.held.sum())
        return -(-self.selection.bytes_read(self.slots.held) // self.spec.token_bytes)

    def _seal(self) -> None:
        if self.selection is not None:
            self.selection.seal()

    def _read(self, q: Tensor) -> Partial:
        q = self._newest(q)
        if self.selection is not None:
            part = self._over(q, self._choose(q))
        else:
            view = self.slots.view()
            part = view.over(q, self.spec, self._left_unread(q))
        rest = self._rest(q)
        return part if rest is None else part.merge(rest)


def _cut(x: Tensor, index: Tensor) -> Tensor:
    """Return the tokens of x at the token indices `index` (rows, a).

    x is (rows, t, d) or (rows, g, t, d); the result is (rows, a, d) or (rows, g, a, d). An index beyond the last token
    selects the last token.
    """
    index = index.clamp_max(x.shape[-2] - 1)
    if x.ndim == 4:
        index = index.unsqueeze(1).expand(-1, x.shape[1], -1)
    return x.gather(x.ndim - 2, index.unsqueeze(-1).expand(*index.shape, x.shape[-1]))
