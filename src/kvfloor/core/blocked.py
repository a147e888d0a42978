"""Blocked: a state that acts at every `block`-th token of a row, whatever the caller's chunking."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from kvfloor.core.attend import attend_newest, fused
from kvfloor.core.method import Method
from kvfloor.core.partial import Partial
from kvfloor.core.selector import Chosen, Everything, Indexed, Selector, SelectorState
from kvfloor.core.slots import Slots
from kvfloor.core.spec import Spec
from kvfloor.core.state import State


class Blocked(State):
    """New tokens wait in `slots`, exactly readable; `_close` acts once a row's clock reaches a multiple of `block`.

    Each row has its own clock, so rows of different length close at different calls. A variant writes `_close`,
    `_rest` (what is remembered outside the slots) and, if it looks at queries, `_on_queries`. A selector that keeps an
    index is told of every token that comes; a variant from whose slots tokens leave tells it of those.
    """

    slots: Slots

    def __init__(self, method: Method, spec: Spec, slots: Slots, block: int, in_order: bool = False) -> None:
        super().__init__(method, spec)
        self.slots = slots
        self.block = block
        self.selection: SelectorState | None = None
        if isinstance(self._selector, Indexed):
            self.selection = self._selector.open(spec, slots, self.shared, in_order)

    # ---- what a variant writes -----------------------------------------------------------------------------

    @abstractmethod
    def _close(self, rows: Tensor | None) -> None:
        """The block of these rows (None: all) is complete."""

    def _rest(self, q: Tensor) -> Partial | None:
        """Attention over what is remembered outside the slots, or None if there is nothing."""
        del q
        return None

    def _at_once(self, seen: int, left: int) -> int:
        """Of `left` tokens that come after `seen`, how many may be taken in at once because nothing happens at the
        ends of their blocks; 0: no more than the block's."""
        del seen, left
        return 0

    @property
    def _selector(self) -> Selector:
        """Which of the held tokens a query reads."""
        return Everything()

    @property
    def _plainly_read(self) -> bool:
        """Whether an answer is attention over all slots and nothing else; `_on_query` hears of such ones."""
        return False

    def _on_queries(self, q: Tensor, before: Tensor, take: Tensor) -> None:
        """Queries q (rows, g, a, d) were answered; `before` tokens were held when their block-mates arrived."""

    def _on_query(self, q: Tensor, seen: int) -> None:
        """Take note of one query q (rows, g, 1, d) per row, plainly read; every row had `seen` tokens before it."""

    # ---- written once --------------------------------------------------------------------------------------

    @property
    def held(self) -> Tensor:
        return self.slots.held.clone()

    def _append(self, k: Tensor, v: Tensor, take: Tensor) -> None:
        self._feed(k, v, None, take)

    def _step_partial(self, k: Tensor, v: Tensor, q: Tensor, take: Tensor) -> Partial:
        answers = self._feed(k, v, q, take)
        assert answers is not None
        return answers

    @property
    def _steps_alone(self) -> bool:
        """Rows are in step with room for a token, and all that is held is read."""
        at, seen = self.slots.level, self.seen.tolist()
        return self._plainly_read and at is not None and at < self.slots.stride and min(seen) == max(seen)

    def _step_one(self, k: Tensor, v: Tensor, q: Tensor) -> Tensor:
        seen = self.seen.tolist()[0]
        self.slots.put(k, v, seen)
        view = self.slots.view()
        out = attend_newest(q, view.k, view.v, self.spec.scale, self.spec.softcap)
        self._on_query(q, seen)
        self.seen = self.seen + 1
        if (seen + 1) % self.block == 0:
            self._close(None)
        return out

    def _feed(self, k: Tensor, v: Tensor, q: Tensor | None, count: Tensor) -> Partial | None:
        """Cut the packed tokens at each row's block ends; push, answer and close piece by piece."""
        seen, counts = self.seen.tolist(), count.tolist()  # a list of clocks is compared faster than a small tensor
        if min(counts) == max(counts) and (counts[0] == 1 or min(seen) == max(seen)):
            return self._feed_in_step(k, v, q, count, seen[0])
        out = None
        if q is not None:
            out = Partial.empty(*q.shape[:3], dv=self.spec.dv, dtype=self.spec.compute_dtype, device=q.device)
        done = torch.zeros_like(count)
        while bool((done < count).any()):
            take = torch.minimum(count - done, self.block - self.seen % self.block)
            a = int(take.max())
            index = (done.unsqueeze(1) + torch.arange(a)).to(k.device)
            # What lies beyond a row's own tokens may be anything, NaN too.
            beyond = (torch.arange(a) >= take.unsqueeze(1)).unsqueeze(-1).to(k.device)
            new_k, new_v = (_cut(x, index).masked_fill(beyond, 0) for x in (k, v))
            part = self._take(new_k, new_v, None if q is None else _cut(q, index), take)
            if part is not None and out is not None:
                row, j = (torch.arange(a) < take.unsqueeze(1)).nonzero(as_tuple=True)
                for whole, new in ((out.mean, part.mean), (out.log_mass, part.log_mass)):
                    whole[row, :, (done[row] + j)] = new[row, :, j]
            done = done + take
        return out

    def _feed_in_step(self, k: Tensor, v: Tensor, q: Tensor | None, count: Tensor, seen: int) -> Partial | None:
        """As `_feed` where `count` is one number for rows that all have `seen` so far, or one token each: slices."""
        parts: list[Partial] = []
        t, done = int(count[0]), 0
        # A long piece that is not fused would write all its logits down.
        fits = t > 1 and (q is None or fused(q, k, v, self.spec.softcap))
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
        if t < q.shape[2]:  # what is packed behind the real tokens
            shape = (*q.shape[:2], q.shape[2] - t)
            parts.append(Partial.empty(*shape, dv=self.spec.dv, dtype=self.spec.compute_dtype, device=q.device))
        if len(parts) == 1:
            return parts[0]
        return Partial(torch.cat([x.mean for x in parts], 2), torch.cat([x.log_mass for x in parts], 2))

    def _take(self, k: Tensor, v: Tensor, q: Tensor | None, take: Tensor) -> Partial | None:
        """Push the first take[r] of these tokens, within a block; answer q (rows, g, a, d), if any: (rows, g, a).

        Then the blocks that they complete are closed.
        """
        before = self._push(k, v, take)
        part = None
        if q is not None:
            part = self._answer(q, k, v, before)
            self._on_queries(q, before, take)
        self._advance(take)
        return part

    def _push(self, k: Tensor, v: Tensor, take: Tensor) -> Tensor:
        """Take the first take[r] of these tokens into the slots; tokens held before, per row (rows,)."""
        before = self.slots.held
        position = self.seen.unsqueeze(1)
        if k.shape[1] > 1:
            position = position + torch.arange(k.shape[1])
        self.slots.push(k, v, position.to(k.device), take)
        if self.selection is not None:
            self.selection.append(self.slots, before)
        return before

    def _advance(self, take: Tensor) -> None:
        """These tokens were answered: the clocks go on, and the blocks that are complete now are closed."""
        self.seen = self.seen + take
        ends = [
            seen % self.block == 0 and took > 0 for seen, took in zip(self.seen.tolist(), take.tolist(), strict=True)
        ]
        if any(ends):
            rows = None if all(ends) else torch.tensor(ends).nonzero().squeeze(1)
            self._close(rows)
            if self.selection is not None:
                self.selection.close(self.slots, rows)

    def _answer(self, q: Tensor, new_k: Tensor, new_v: Tensor, before: Tensor) -> Partial:
        """Answers (rows, g, a) to q (rows, g, a, d), whose tokens are the newest: each sees what came up to itself."""
        shape = q.shape[:3]
        rest = self._rest(q.flatten(1, 2))
        part = self._among_slots(q, new_k, new_v, before)
        return part if rest is None else part.merge(rest.shaped(*shape))

    def _among_slots(self, q: Tensor, new_k: Tensor, new_v: Tensor, before: Tensor) -> Partial:
        """As `_answer`, over the slots alone.

        Where everything held is read, the tokens from before (`before` of them per row) and the new ones are two
        partials: neither needs a mask of rows x queries x slots.
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
        gone = torch.arange(past) >= before.unsqueeze(1)  # the rows' own new tokens, or nothing yet
        hide = gone.unsqueeze(1).to(q.device) if bool(gone.any()) else None
        return Partial.over(q.flatten(1, 2), view.k, view.v, self.spec, hide=hide).shaped(*shape).merge(part)

    def _among_all(self, flat: Tensor, g: int, before: Tensor) -> Partial:
        """One product over all slots, the causal rule as a mask: queries (rows, g*a, d), the selector choosing."""
        m = flat.shape[1]
        view = self.slots.view()
        width, a = view.k.shape[1], m // g
        if a == 1:  # the newest token sees all that is held
            hide = None if view.live is None else ~view.live.unsqueeze(1)
        else:
            limit = before.unsqueeze(1) + torch.arange(a)  # last slot each query may see, by row
            if bool((before == before[0]).all()):
                limit = limit[:1]
            hide = (torch.arange(width) > limit.unsqueeze(-1)).to(flat.device)
            hide = hide.unsqueeze(1).expand(-1, g, -1, -1).reshape(hide.shape[0], m, width)
        hide = self._selector.hide(flat, view, self.spec, hide)
        return Partial.over(flat, view.k, view.v, self.spec, hide=hide)

    def _among_chosen(self, q: Tensor, before: Tensor) -> Partial:
        """As `_among_all` for q (rows, g, a, d), the selector choosing by its index."""
        assert self.selection is not None
        arrived = torch.arange(q.shape[2])
        visible = before.unsqueeze(1) + arrived + 1
        real = visible <= self.slots.held.unsqueeze(1)
        position = (self.seen.unsqueeze(1) + arrived).masked_fill(~real, -1)
        if not bool(real.all()):  # beyond a row's own tokens may stand anything, NaN too
            q = q.masked_fill(~real.to(q.device)[:, None, :, None], 0)
        visible = torch.minimum(visible, self.slots.held.unsqueeze(1))
        chosen = self.selection.follow(q, self.slots, visible.to(q.device), position.to(q.device))
        return self._over(q.flatten(1, 2), chosen)

    def _over(self, q: Tensor, chosen: Chosen) -> Partial:
        """Attention of q (rows, m, d) over the slots chosen for each query: fetched where few, masked where many."""
        (rows, m, c), width = chosen.index.shape, int(self.slots.held.max())
        if m * c > width:
            view = self.slots.view()
            return Partial.over(q, view.k, view.v, self.spec, hide=chosen.unread(width))
        index = chosen.index.masked_fill(chosen.dead, 0)
        k, v = (self.slots.fetch(x, index).flatten(0, 1) for x in (self.slots.k, self.slots.v))
        alone = q.reshape(rows * m, 1, self.spec.d)
        part = Partial.over(alone, k, v, self.spec, hide=chosen.dead.flatten(0, 1).unsqueeze(1))
        return Partial(part.mean.view(rows, m, self.spec.dv), part.log_mass.view(rows, m))

    def unread(self, q: Tensor) -> Tensor | None:
        """The slots (rows or 1, m or 1, s) that `read` leaves unread for q (rows, m, d); None if it reads them all."""
        view = self.slots.view()
        if self.selection is not None:
            return self._choose(q).unread(view.k.shape[1])
        return self._selector.hide(q, view, self.spec, None if view.live is None else ~view.live.unsqueeze(1))

    def _choose(self, q: Tensor) -> Chosen:
        assert self.selection is not None
        if q.shape[1] == 0 or not bool(self.slots.held.any()):
            nothing = torch.zeros(*q.shape[:2], 0, dtype=torch.int64, device=q.device)
            return Chosen(nothing, nothing.bool())
        visible = self.slots.held.unsqueeze(1).expand(-1, q.shape[1])
        return self.selection.choose(q, self.slots, visible.to(q.device))

    @property
    def slot_bytes_read(self) -> int:
        """Bytes of index, keys and values in the slots that one query per row touches."""
        if self.selection is not None:
            return self.selection.bytes_read(self.slots.held)
        return self._selector.bytes_read(self.slots.held, self.spec)

    def _seal(self) -> None:
        if self.selection is not None:
            self.selection.seal()

    def _read(self, q: Tensor) -> Partial:
        if self.selection is not None:
            part = self._over(q, self._choose(q))
        else:
            view = self.slots.view()
            part = Partial.over(q, view.k, view.v, self.spec, hide=self.unread(q))
        rest = self._rest(q)
        return part if rest is None else part.merge(rest)


def _cut(x: Tensor, index: Tensor) -> Tensor:
    """Tokens `index` (rows, a), clamped, of x (rows, [g,] t, d)."""
    index = index.clamp_max(x.shape[-2] - 1)
    if x.ndim == 4:
        index = index.unsqueeze(1).expand(-1, x.shape[1], -1)
    return x.gather(x.ndim - 2, index.unsqueeze(-1).expand(*index.shape, x.shape[-1]))
