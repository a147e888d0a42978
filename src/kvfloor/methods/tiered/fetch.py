"""Read coded tokens, and fetch exact ones until the bound on the answer's error is small enough.

In shapes, r are rows, i.e. (batch item, kv head) streams, g query heads per kv head, m queries of each head, s slots of
a row, c fetched tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvfloor.certify.certified import Certified
from kvfloor.certify.chance import FIRST
from kvfloor.certify.glimpse import Glimpse
from kvfloor.certify.rounding import products
from kvfloor.core.partial import Partial
from kvfloor.core.spec import Spec
from kvfloor.logits import capped
from kvfloor.methods.stores.fused import MOST_QUERIES
from kvfloor.methods.tiered import kernel
from kvfloor.methods.tiered.cold import ExactSlots
from kvfloor.methods.tiered.hot import Hot


@dataclass(frozen=True)
class CertifiedReader:
    """Answer queries from codes and, where these are unsure, exact tokens.

    hot      the coded tokens
    exact    the same tokens as they were given, in the same slots
    epsilon  the largest bound allowed, relative to the largest value norm that a query sees
    delta    the largest probability with which a bound may fail; 0: it always holds
    """

    spec: Spec
    hot: Hot
    exact: ExactSlots
    epsilon: float
    delta: float = 0.0

    def read(self, q: Tensor, hide: Tensor | None, real: Tensor | None) -> tuple[Certified, Tensor]:
        """Return certified answers (r, g, m) to q (r, g, m, d), and the number of tokens fetched for each (r, m).

        hide  bool (r, m, s), True for tokens that the queries do not see; None: they see all that their row holds
        real  bool (r, m), False for padding, for which nothing is fetched; None: there is none
        The queries of a group share what they fetch. Where `kernel.serves` says so, a kernel answers few queries, and
        torch only the rows of those that it leaves unsure.
        """
        rows, g, m, _ = q.shape
        if not 0 < g * m <= MOST_QUERIES or not kernel.serves(self.hot):
            found, fetched = self._read(q, hide, real, None)
            return shaped(found, rows, g, m), fetched
        found, fetched, at = self._kernel(q, hide, real)
        if len(at):
            hide, real = (None if x is None else x[at] for x in (hide, real))
            answer, some = self._read(q[at], hide, real, at)
            found = replaced(found, answer, at, torch.ones(len(at), g * m, dtype=torch.bool))
            fetched[at] += some
        return shaped(found, rows, g, m), fetched

    def _kernel(self, q: Tensor, hide: Tensor | None, real: Tensor | None) -> tuple[Certified, Tensor, Tensor]:
        """Return the kernel's answers (r, g m), how many tokens it fetched (r, m), and the rows left unsure."""
        rows, g, m, _ = q.shape
        hidden = None if hide is None else for_heads(hide, g)
        fetched = torch.zeros(rows, m, dtype=torch.int64)
        padding = torch.zeros(rows, m, dtype=torch.bool) if real is None else ~real
        skip = padding.clone()
        near = kernel.Near.reached(self.exact, padding, fetched)
        with kernel.RefinedReading(self.hot, q.flatten(1, 2), hidden, self.epsilon, near) as reading:
            if reading.settled:
                return reading.found(), fetched, fetched.new_empty(0)
            while True:
                row, position = reading.unsure(skip)
                if not len(row):
                    return reading.found(), fetched, reading.unsure(padding)[0].unique()
                token, many = reading.wanted(row, position, m)
                skip[row, position] = many == 0
                place = self.exact.at(token.unsqueeze(1), row).squeeze(1)
                k, v = self.exact.pair(place, torch.arange(token.shape[1]) < many.unsqueeze(1))
                reading.refine(row, position, m, (token, many, k, v))
                fetched[row, position] += many

    def _unsure(self, found: Certified, g: int, real: Tensor | None) -> Tensor:
        """Return a mask (r, g, m), True for queries that are not padding and whose bound is above epsilon."""
        unsure = ~found.within(self.epsilon).unflatten(1, (g, -1))
        return unsure if real is None else unsure & real.unsqueeze(1)

    def _read(
        self, q: Tensor, hide: Tensor | None, real: Tensor | None, asked: Tensor | None
    ) -> tuple[Certified, Tensor]:
        """Do the work of `read` in torch, for the rows `asked` (None: all): answers (r, g m), tokens fetched (r, m)."""
        rows, g, m, _ = q.shape
        if real is None:
            real = torch.ones(rows, m, dtype=torch.bool, device=q.device)
        every = torch.arange(rows) if asked is None else asked.cpu()
        live = self.hot.codes.view(asked, int(self.hot.codes.held.max())).live
        if live is not None:
            gone = ~live.unsqueeze(1)
            hide = gone.expand(-1, m, -1) if hide is None else hide | gone
        hidden = None if hide is None else for_heads(hide, g)
        glimpse, decoded = self.hot.glimpse(q.flatten(1, 2), hidden, asked)
        found, share = glimpse.answer(self.delta)
        fetched = torch.zeros(rows, m, dtype=torch.int64, device=q.device)
        known = (share >= 0).sum(-1).unflatten(1, (g, m)).amax(1)  # (r, m): the tokens that can be fetched
        unsure = self._unsure(found, g, real) & (known > 0).unsqueeze(1)
        count = FIRST
        while bool(unsure.any()):
            at = unsure.any(1).any(1).nonzero().squeeze(1)
            score = share[at].unflatten(1, (g, m)).masked_fill(~unsure[at].unsqueeze(-1), -1.0).amax(1)
            picked, index = score.topk(min(count, score.shape[-1]), -1)
            place = self.exact.at(index, every[at.cpu()])
            answer, _ = self._with(glimpse.rows(at), q[at], decoded[at], index, place, picked >= 0).answer(self.delta)
            found = replaced(found, answer, at, unsure[at].flatten(1, 2))
            fetched[at] = torch.where(unsure[at].any(1), (picked >= 0).sum(-1), fetched[at])
            unsure = unsure & self._unsure(found, g, real) & (known > count).unsqueeze(1)
            count *= 2
        return self.hot.upright(found), fetched

    def _with(self, seen: Glimpse, q: Tensor, decoded: Tensor, index: Tensor, place: Tensor, real: Tensor) -> Glimpse:
        """Return what q (r, g, m, d) see once the tokens `index` (r, m, c), at the places `place`, are fetched."""
        dtype, g = self.spec.compute_dtype, q.shape[1]
        k, v = (x.to(dtype) for x in self.exact.pair(place, real))
        row = torch.arange(len(q), device=q.device)[:, None, None]
        moved, change = k - decoded[row, index], self.hot.turned(v) - seen.v[row, index]
        asked = (q.to(dtype) * self.spec.scale).transpose(1, 2)

        def times(x: Tensor) -> Tensor:
            return products(asked, x).transpose(1, 2).flatten(1, 2)

        logits = capped(times(k), self.spec.softcap)
        return seen.fetched(for_heads(index, g), for_heads(real, g), logits, times(moved), for_heads(change, g))


def for_heads(x: Tensor, g: int) -> Tensor:
    """Repeat what the heads of a group share, x (r, m, ...), for each of g heads: return (r, g m, ...)."""
    return x.unsqueeze(1).expand(-1, g, *x.shape[1:]).flatten(1, 2)


def replaced(old: Certified, new: Certified, at: Tensor, where: Tensor) -> Certified:
    """Return `old` with the results of the rows `at` replaced by `new`, for the queries marked in `where` (r, ...)."""

    def put(x: Tensor, y: Tensor) -> Tensor:
        marked = where.unsqueeze(-1) if x.ndim > where.ndim else where
        return x.index_copy(0, at, torch.where(marked, y, x[at]))

    error, spread, largest = (put(getattr(old, name), getattr(new, name)) for name in ("error", "spread", "largest"))
    chance = None if old.chance is None or new.chance is None else put(old.chance, new.chance)
    return Certified(
        Partial(put(old.partial.mean, new.partial.mean), put(old.partial.log_mass, new.partial.log_mass)),
        *(error, spread, largest),
        chance=chance,
        delta=0.0 if chance is None else old.delta,
    )


def shaped(x: Certified, *shape: int) -> Certified:
    """Return the results x as views whose batch axes (all but dv) have the shape `shape`."""
    rest = (getattr(x, name).view(shape) for name in ("error", "spread", "largest"))
    chance = None if x.chance is None else x.chance.view(shape)
    return Certified(x.partial.shaped(*shape), *rest, chance=chance, delta=x.delta)
