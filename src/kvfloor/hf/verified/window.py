"""Keep the newest tokens of a sliding-window layer, and attend to them and to tokens that are not committed yet.

A row is one (batch item, kv head) stream. Committed tokens are those of the prompt and those that were verified.
Drafted tokens are uncommitted: callers hold their keys and values. In shapes, g is the GQA group, u uncommitted tokens
and n queries per row, w the number of committed tokens that a window reaches, d and dv the widths of a key and a value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvfloor.core.partial import Partial
from kvfloor.core.spec import Spec

_QUERIES_AT_ONCE = 256  # bounds the mask and the logits of a prompt


class WindowTokens:
    """Hold the newest w = window - 1 committed tokens of each row, the newest one last.

    spec    sizes, dtype and constants of the layer
    window  number of tokens that a query attends to at most, its own among them
    """

    hot_bytes = 0  # drafting and verifying read the same tokens

    def __init__(self, spec: Spec, window: int) -> None:
        self.spec, self.window = spec, window
        self.k, self.v = (
            torch.zeros(spec.rows, window - 1, width, dtype=spec.dtype, device=spec.device)
            for width in (spec.d, spec.dv)
        )
        self.held = torch.zeros(spec.rows, dtype=torch.int64)  # at most window - 1, at the end of k and v

    @property
    def cold_bytes(self) -> int:
        """Return the bytes of the held keys and values."""
        return self.k.nbytes + self.v.nbytes

    def take(self, q: Tensor, k: Tensor, v: Tensor, present: Tensor | None) -> Partial:
        """Commit a prompt's tokens, and return attention of its queries: a `Partial` (rows, g, n), empty in pads.

        q (rows, g, n, d), k (rows, n, d), v (rows, n, dv). present: bool (rows, n), False for padding; None: no padding
        """
        g = q.shape[1]
        if present is None:
            part = self.attend(q, k, v)
            self.commit(q, k, v, None)
            return part
        k, v = (x.masked_fill(~present.unsqueeze(-1), 0) for x in (k, v))  # padding may be anything, NaN too
        q = q.masked_fill(~present[:, None, :, None], 0)
        order = torch.argsort((~present).to(torch.int8), dim=1, stable=True)  # real tokens first
        k, v = (x.gather(1, order.unsqueeze(-1).expand_as(x)) for x in (k, v))
        q = q.gather(2, order[:, None, :, None].expand_as(q))
        part = self.attend(q, k, v)
        self._shift(k, v, present.sum(1))
        place = order.unsqueeze(1).expand(-1, g, -1)
        mean = torch.zeros_like(part.mean).scatter(2, place.unsqueeze(-1).expand_as(part.mean), part.mean)
        log_mass = torch.zeros_like(part.log_mass).scatter(2, place, part.log_mass)
        pads = ~present.unsqueeze(1)
        return Partial(mean.masked_fill(pads.unsqueeze(-1), 0), log_mass.masked_fill(pads, -torch.inf))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, drafting: bool = False) -> Partial:
        """Return attention of q within the window, over committed and uncommitted tokens: a `Partial` (rows, g, n).

        Nothing changes.
        q         (rows, g, n, d), the queries of the last n uncommitted tokens
        k, v      (rows, u, d) and (rows, u, dv), the uncommitted tokens
        drafting  no difference here: the window is the same for drafting and for verifying
        """
        del drafting
        rows, g, n, d = q.shape
        before, w = k.shape[1] - n, self.window - 1
        keys, values = torch.cat([self.k, k], 1), torch.cat([self.v, v], 1)
        empty = w - self.held  # slots at the front of each row
        parts: list[Partial] = []
        for start in range(0, n, _QUERIES_AT_ONCE):
            stop = min(n, start + _QUERIES_AT_ONCE)
            seen = slice(before + start, w + before + stop)  # from the first slot that the first query sees
            slot = torch.arange(seen.start, seen.stop)
            own = (w + before + torch.arange(start, stop)).unsqueeze(1)
            hide = ((slot > own) | (slot <= own - self.window)).unsqueeze(0)
            if int(empty.max()) > seen.start:
                hide = hide | (slot < empty.unsqueeze(1)).unsqueeze(1)
            hide = hide.to(q.device).repeat(1, g, 1)  # the queries of a group's first head come first
            asked = q[:, :, start:stop].reshape(rows, -1, d)
            part = Partial.over(asked, keys[:, seen], values[:, seen], self.spec, hide=hide)
            parts.append(part.shaped(rows, g, stop - start))
        if len(parts) == 1:
            return parts[0]
        return Partial(torch.cat([x.mean for x in parts], 2), torch.cat([x.log_mass for x in parts], 2))

    def commit(self, q: Tensor, k: Tensor, v: Tensor, present: Tensor | None) -> None:
        """Hold verified tokens k (rows, n, d), v (rows, n, dv), and drop those that leave the window.

        present: bool (rows, n), True for the first tokens of each row and False for the rest, which is not held; None:
        True for all. The queries q are not used.
        """
        del q
        self._shift(k, v, torch.full((k.shape[0],), k.shape[1]) if present is None else present.sum(1))

    def _shift(self, k: Tensor, v: Tensor, take: Tensor) -> None:
        """Hold the first take[r] of the tokens k (rows, n, d), v (rows, n, dv) of each row r."""
        take, w = take.cpu(), self.window - 1
        index = (take.unsqueeze(1) + torch.arange(w)).to(k.device).unsqueeze(-1)
        k, v = (
            torch.cat([held, new], 1).gather(1, index.expand(-1, -1, new.shape[-1]))
            for held, new in ((self.k, k), (self.v, v))
        )
        self.k, self.v, self.held = k, v, (self.held + take).clamp_max(w)

    def seal(self) -> None:
        """Do nothing at the end of the prompt: a window is not compressed."""
