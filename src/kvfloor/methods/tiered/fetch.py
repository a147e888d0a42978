"""Read coded tokens, and fetch exact ones until the bound on the answer's error is small enough.

In shapes, r are rows, i.e. (batch item, kv head) streams, g query heads per kv head, m queries of each head, s slots of
a row, c fetched tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvfloor.certify.certified import Certified
from kvfloor.certify.glimpse import Glimpse
from kvfloor.certify.rounding import products
from kvfloor.core.partial import Partial
from kvfloor.core.spec import Spec
from kvfloor.logits import capped
from kvfloor.methods.tiered.cold import ExactSlots
from kvfloor.methods.tiered.hot import Hot

_FIRST = 8  # tokens of the first fetch; with each further one twice as many are known


@dataclass(frozen=True)
class CertifiedReader:
    """Answer queries from codes and, where these are unsure, exact tokens.

    hot      the coded tokens
    exact    the same tokens as they were given, in the same slots
    epsilon  the largest bound allowed, relative to the largest value norm that a query sees
    """

    spec: Spec
    hot: Hot
    exact: ExactSlots
    epsilon: float

    def read(self, q: Tensor, hide: Tensor | None, real: Tensor) -> tuple[Certified, Tensor]:
        """Return certified answers (r, g, m) to q (r, g, m, d), and the number of tokens fetched for each (r, m).

        hide  bool (r, m, s), True for tokens that the queries do not see; None: they see all
        real  bool (r, m), False for padding, for which nothing is fetched
        The queries of a group share what they fetch.
        """
        rows, g, m, _ = q.shape
        flat = q.flatten(1, 2)
        hidden = None if hide is None else hide.unsqueeze(1).expand(-1, g, -1, -1).flatten(1, 2)
        glimpse, decoded = self.hot.glimpse(flat, hidden)
        found, share = glimpse.answer()
        fetched = torch.zeros(rows, m, dtype=torch.int64, device=q.device)
        known = (share >= 0).sum(-1).unflatten(1, (g, m)).amax(1)  # (r, m): the tokens that can be fetched
        unsure = ~found.within(self.epsilon).unflatten(1, (g, m)) & real.unsqueeze(1) & (known > 0).unsqueeze(1)
        count = _FIRST
        while bool(unsure.any()):
            at = unsure.any(1).any(1).nonzero().squeeze(1)
            score = share[at].unflatten(1, (g, m)).masked_fill(~unsure[at].unsqueeze(-1), -1.0).amax(1)
            picked, index = score.topk(min(count, score.shape[-1]), -1)
            answer, _ = self._with(glimpse.rows(at), q[at], decoded[at], index, picked >= 0, at).answer()
            found = _replaced(found, answer, at, unsure[at].flatten(1, 2))
            fetched[at] = torch.where(unsure[at].any(1), (picked >= 0).sum(-1), fetched[at])
            unsure = unsure & ~found.within(self.epsilon).unflatten(1, (g, m)) & (known > count).unsqueeze(1)
            count *= 2
        return shaped(self.hot.upright(found), rows, g, m), fetched

    def _with(self, seen: Glimpse, q: Tensor, decoded: Tensor, index: Tensor, real: Tensor, at: Tensor) -> Glimpse:
        """Return what q (r, g, m, d) see once the tokens `index` (r, m, c) of the rows `at` are fetched."""
        dtype, g = self.spec.compute_dtype, q.shape[1]
        k, v = (x.to(dtype) for x in self.exact.pair(self.exact.at(index, at.cpu()), real))
        row = torch.arange(len(at), device=q.device)[:, None, None]
        moved, change = k - decoded[row, index], self.hot.turned(v) - seen.v[row, index]
        asked = (q.to(dtype) * self.spec.scale).transpose(1, 2)

        def times(x: Tensor) -> Tensor:
            return products(asked, x).transpose(1, 2).flatten(1, 2)

        def shared(x: Tensor) -> Tensor:
            return x.unsqueeze(1).expand(-1, g, *x.shape[1:]).flatten(1, 2)

        logits = capped(times(k), self.spec.softcap)
        return seen.fetched(shared(index), shared(real), logits, times(moved), shared(change))


def _replaced(old: Certified, new: Certified, at: Tensor, where: Tensor) -> Certified:
    """Return `old` with the results of the rows `at` replaced by `new`, for the queries marked in `where` (r, m)."""

    def put(x: Tensor, y: Tensor) -> Tensor:
        marked = where.unsqueeze(-1) if x.ndim == 3 else where
        return x.index_copy(0, at, torch.where(marked, y, x[at]))

    return Certified(
        Partial(put(old.partial.mean, new.partial.mean), put(old.partial.log_mass, new.partial.log_mass)),
        *(put(getattr(old, name), getattr(new, name)) for name in ("error", "spread", "largest")),
    )


def shaped(x: Certified, *shape: int) -> Certified:
    """Return the results x as views whose batch axes (all but dv) have the shape `shape`."""
    rest = (getattr(x, name).view(shape) for name in ("error", "spread", "largest"))
    return Certified(x.partial.shaped(*shape), *rest)
