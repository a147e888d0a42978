"""Read exactly the tokens of largest logit, found by visiting pages in order of their logit bounds (best-first).

In this file a row is one (batch item, kv head) stream, and a slot the place of one held token. A page is `page`
neighbouring slots; a page's box is the least and largest entry per channel of its keys. The logit bound of a page is
the largest logit that a query could have with any vector in the box, so no key of the page has a larger one. `Slots`
is the store of all held keys and values, by row and slot. `Chosen` is the slots that each query reads, with a mask that
is True for padding entries. In shapes, r are rows, m queries per row, c candidate tokens per query, d the width of a
key; an argument `rows` (r,) has the indices of these rows (None: all).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvfloor.core.selector import Chosen, Indexed, SelectorState
from kvfloor.core.slots import Slots
from kvfloor.core.spec import Spec
from kvfloor.methods.selectors.pages import Pages, PagesState
from kvfloor.validation import count


@dataclass(frozen=True)
class BestFirst(Indexed):
    """Read the k tokens of largest logit, found by branch and bound over pages of tokens.

    They are the tokens that the selector `top_k` finds by reading every key, except where logits are equal.
    Law: a query's logit bound on a page is at least the logit of each token in the page. To visit a page is to compute
    the logits of its tokens. The newest page is visited first, then the other pages from the largest bound down, until
    the next bound is below the k-th largest logit found so far. Then no token of an unvisited page can be among the k,
    whatever the keys are. So a token of large logit among tokens of small logit is never missed, unlike with the
    selector `hip`, which halves intervals of the stream. If the keys of a page are similar to each other, its bound is
    tight, and few pages are visited; if they are not, nearly all pages are visited. Of tokens with equal logits the
    newer one is preferred.
    k      tokens read per query
    page   tokens per page
    """

    name: ClassVar[str] = "best_first"
    paper: ClassVar[str] = "Land and Doig 1960 (branch and bound), over the boxes of Tang et al. 2024, Quest"
    k: int = 64
    page: int = 16

    def __post_init__(self) -> None:
        count("best_first", least=1, k=self.k, page=self.page)

    def open(self, spec: Spec, slots: Slots, shared: dict[str, Tensor], in_order: bool) -> BestFirstState:
        del shared, in_order
        return BestFirstState(spec, slots, self)


class BestFirstState(SelectorState):
    """Hold the box of every full page: the least and largest entry per channel of its keys.

    The newest page, which is still filling, has no box. Choosing tokens for queries changes none of the boxes.
    """

    def __init__(self, spec: Spec, slots: Slots, method: BestFirst) -> None:
        self.spec = spec
        self.method = method  # frozen: no part of the memory
        self.pages = PagesState(spec, slots, Pages(pages=1, page=method.page))

    def append(self, slots: Slots, before: Tensor) -> None:
        self.pages.append(slots, before)

    def evict(self, slots: Slots, leaving: Tensor) -> None:
        self.pages.evict(slots, leaving)

    def require_fitting(self, fields: dict[str, Any], slots: dict[str, Any]) -> None:
        self.pages.require_fitting(fields["pages"], slots)

    def resize(self, slots: Slots) -> None:
        self.pages.resize(slots)

    def choose(self, q: Tensor, slots: Slots, visible: Tensor, rows: Tensor | None = None) -> Chosen:
        return self.search(q, slots, visible, rows)[0]

    def search(self, q: Tensor, slots: Slots, visible: Tensor, rows: Tensor | None = None) -> tuple[Chosen, Tensor]:
        """Return the slots that each query of q (r, m, d) reads, and the number (r, m), int64, of pages that it visits.

        To visit a page is to compute the logits of its tokens. The slots are those of the k largest logits, or of all
        visible tokens if these are fewer. visible (r, m) is the number of slots, from the row's first on, that a query
        sees.
        """
        (r, m, _), k, size, device = q.shape, self.method.k, self.method.page, q.device
        visible = visible.to(device).expand(r, m)
        newest = (visible - 1).clamp_min(0) // size
        bound, page = self._in_order(q, newest, rows)
        offset = (slots.offset if rows is None else slots.offset[rows]).to(device)
        asked = q.double().flatten(0, 1) * self.spec.scale
        of = torch.arange(r, device=device).repeat_interleave(m)
        best = torch.full((r * m, k), -torch.inf, dtype=torch.float64, device=device)
        slot = torch.full((r * m, k), -1, dtype=torch.int64, device=device)
        looked = torch.zeros(r * m, dtype=torch.int64, device=device)
        active, at, stride = torch.arange(r * m, device=device), 0, -(-k // size)
        while len(active) and at < page.shape[1]:
            here = page[active, at : at + stride]
            new = (here.unsqueeze(2) * size + torch.arange(size, device=device)).flatten(1)
            alive = (here >= 0).repeat_interleave(size, 1) & (new < visible.flatten()[active].unsqueeze(1))
            place = (offset[of[active]].unsqueeze(1) + new.clamp_min(0)).clamp_max(int(slots.capacity.sum()) - 1)
            keys = slots.keys(place).double()
            logit = torch.einsum("acd,ad->ac", keys, asked[active]).masked_fill(~alive, -torch.inf)
            best[active], slot[active] = _largest(
                torch.cat([best[active], logit], 1), torch.cat([slot[active], new], 1), k
            )
            looked[active] += (here >= 0).sum(1)
            at, stride = at + stride, 2 * stride
            if at < page.shape[1]:
                active = active[(page[active, at] >= 0) & (bound[active, at] >= best[active, -1])]
        found = best > -torch.inf
        chosen = Chosen(slot.clamp_min(0).view(r, m, k), ~found.view(r, m, k))
        return chosen, looked.view(r, m)

    def _in_order(self, q: Tensor, newest: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return logit bounds and numbers of the pages in the order in which each query visits them, (r*m, pages) each.

        The queries are q (r, m, d), row by row. newest (r, m) is the page of the newest token that a query sees. This
        page comes first, with the bound inf; the other pages that the query sees follow from the largest bound down.
        Further entries have the bound -inf and the number -1.
        """
        bound = self.pages.bounds(q, newest, rows).flip(-1)
        order = bound.argsort(dim=-1, descending=True, stable=True)
        bound = bound.gather(-1, order)
        page = (bound.shape[-1] - 1 - order).masked_fill(bound == -torch.inf, -1)
        bound = torch.nn.functional.pad(bound, (1, 0), value=torch.inf)
        page = torch.cat([newest.unsqueeze(-1), page], -1)
        return bound.flatten(0, 1), page.flatten(0, 1)

    def bytes_read(self, held: Tensor) -> int:
        """Return the bytes that one query per row reads in the worst case, summed over the rows.

        held (rows,) is the number of tokens that each row holds. In the worst case every page is visited: all boxes,
        all keys and the k best values are read.
        """
        full = (held - 1).clamp_min(0) // self.method.page
        numbers = int((2 * full + held).sum()) * self.spec.d + int(held.clamp_max(self.method.k).sum()) * self.spec.dv
        return numbers * self.spec.dtype.itemsize


def _largest(logit: Tensor, slot: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest logits of each query, and the slots of these logits: (queries, k) each.

    logit and slot are (queries, c), for c candidate tokens per query. Of equal logits the one in the higher slot, i.e.
    of the newer token, is preferred.
    """
    by_age = slot.argsort(dim=1, descending=True, stable=True)
    logit, slot = logit.gather(1, by_age), slot.gather(1, by_age)
    best = logit.argsort(dim=1, descending=True, stable=True)[:, :k]
    return logit.gather(1, best), slot.gather(1, best)
