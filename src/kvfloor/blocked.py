"""Blocked: a state that acts at every `block`-th token of a row, whatever the caller's chunking."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from kvfloor.method import Method, Spec
from kvfloor.partial import Partial
from kvfloor.selectors.everything import Everything
from kvfloor.selectors.selector import Selector
from kvfloor.slots import Slots
from kvfloor.state import State


class Blocked(State):
    """New tokens wait in `slots`, exactly readable; `_close` acts once a row's clock reaches a multiple of `block`.

    Each row has its own clock, so rows of different length close at different calls. A variant writes `_close`,
    `_rest` (what is remembered outside the slots) and, if it looks at queries, `_notice`.
    """

    def __init__(self, method: Method, spec: Spec, slots: Slots, block: int) -> None:
        super().__init__(method, spec)
        self.slots = slots
        self.block = block

    # ---- what a variant writes -----------------------------------------------------------------------------

    @abstractmethod
    def _close(self, rows: Tensor | None) -> None:
        """The block of these rows (None: all) is complete."""

    def _rest(self, q: Tensor) -> Partial | None:
        """Attention over what is remembered outside the slots, or None if there is nothing."""
        del q
        return None

    @property
    def _selector(self) -> Selector:
        """Which of the held tokens a query reads."""
        return Everything()

    def _notice(self, q: Tensor, before: Tensor, take: Tensor) -> None:
        """Queries q (rows, g, a, d) were answered; `before` tokens were held when their block-mates arrived."""

    # ---- written once --------------------------------------------------------------------------------------

    @property
    def held(self) -> Tensor:
        return self.slots.held.clone()

    def _append(self, k: Tensor, v: Tensor, take: Tensor) -> None:
        self._feed(k, v, None, take)

    def _step(self, k: Tensor, v: Tensor, q: Tensor, take: Tensor) -> Tensor:
        out = torch.zeros(*q.shape[:3], self.spec.dv, dtype=self.spec.compute_dtype, device=q.device)
        self._feed(k, v, q, take, out)
        return out

    def _feed(self, k: Tensor, v: Tensor, q: Tensor | None, count: Tensor, out: Tensor | None = None) -> None:
        """Cut the packed tokens at each row's block ends; push, answer and close piece by piece."""
        done = torch.zeros_like(count)
        while bool((done < count).any()):
            take = torch.minimum(count - done, self.block - self.seen % self.block)
            a, start = int(take.max()), int(done[0])
            level = bool((done == start).all()) and bool((take == a).all())
            index = slice(start, start + a) if level else (done.unsqueeze(1) + torch.arange(a)).to(k.device)
            before = self.slots.held
            new_k, new_v = _cut(k, index), _cut(v, index)
            if not level:  # what lies beyond a row's own tokens may be anything, NaN too
                beyond = (torch.arange(a) >= take.unsqueeze(1)).unsqueeze(-1).to(k.device)
                new_k, new_v = new_k.masked_fill(beyond, 0), new_v.masked_fill(beyond, 0)
            position = (self.seen.unsqueeze(1) + torch.arange(a)).to(k.device)
            self.slots.push(new_k, new_v, position, take)
            if q is not None and out is not None:
                piece = _cut(q, index)
                mean = self._answer(piece, new_k, new_v, before).mean.view(*piece.shape[:3], -1)
                if level:
                    out[:, :, index] = mean
                else:
                    row, j = (torch.arange(a) < take.unsqueeze(1)).nonzero(as_tuple=True)
                    out[row, :, (done[row] + j)] = mean[row, :, j]
                self._notice(piece, before, take)
            self.seen = self.seen + take
            done = done + take
            full = (self.seen % self.block == 0) & (take > 0)
            if bool(full.any()):
                self._close(None if bool(full.all()) else full.nonzero().squeeze(1))

    def _answer(self, q: Tensor, new_k: Tensor, new_v: Tensor, before: Tensor) -> Partial:
        """Answers to q (rows, g, a, d), whose tokens are the newest: each sees what came up to itself.

        Where everything held is read, the tokens from before (`before` of them per row) and the new ones are two
        partials: neither needs a mask of rows x queries x slots.
        """
        rows, g, a, d = q.shape
        flat = q.reshape(rows, g * a, d)
        if a == 1 or not isinstance(self._selector, Everything):
            part = self._among_all(flat, g, before)
        else:
            later = torch.ones(a, a, dtype=torch.bool, device=q.device).triu(1).repeat(g, 1).unsqueeze(0)
            part = Partial.over(flat, new_k, new_v, self.spec, hide=later)
            past = int(before.max())
            if past > 0:
                view = self.slots.view(width=past)
                gone = torch.arange(past) >= before.unsqueeze(1)  # the rows' own new tokens, or nothing yet
                hide = gone.unsqueeze(1).to(q.device) if bool(gone.any()) else None
                part = Partial.over(flat, view.k, view.v, self.spec, hide=hide).merge(part)
        rest = self._rest(flat)
        return part if rest is None else part.merge(rest)

    def _among_all(self, flat: Tensor, g: int, before: Tensor) -> Partial:
        """One product over all slots, the causal rule as a mask: queries (rows, g*a, d), the selector choosing."""
        m = flat.shape[1]
        view = self.slots.view()
        width, a = view.k.shape[1], m // g
        limit = before.unsqueeze(1) + torch.arange(a)  # last slot each query may see, by row
        if bool((before == before[0]).all()):
            limit = limit[:1]
        hide = None
        if a > 1 or bool((before + a != width).any()):
            hide = (torch.arange(width) > limit.unsqueeze(-1)).to(flat.device)
            if a > 1:
                hide = hide.unsqueeze(1).expand(-1, g, -1, -1).reshape(hide.shape[0], m, width)
        hide = self._selector.hide(flat, view, self.spec, hide)
        return Partial.over(flat, view.k, view.v, self.spec, hide=hide)

    def _read(self, q: Tensor) -> Partial:
        view = self.slots.view()
        hide = None if view.live is None else ~view.live.unsqueeze(1)
        part = Partial.over(q, view.k, view.v, self.spec, hide=self._selector.hide(q, view, self.spec, hide))
        rest = self._rest(q)
        return part if rest is None else part.merge(rest)


def _cut(x: Tensor, index: slice | Tensor) -> Tensor:
    """Tokens `index` of x (rows, [g,] t, d): one slice for all rows, or (rows, a) indices, clamped."""
    if isinstance(index, slice):
        return x[..., index, :]
    index = index.clamp_max(x.shape[-2] - 1)
    if x.ndim == 4:
        index = index.unsqueeze(1).expand(-1, x.shape[1], -1)
    return x.gather(x.ndim - 2, index.unsqueeze(-1).expand(*index.shape, x.shape[-1]))
