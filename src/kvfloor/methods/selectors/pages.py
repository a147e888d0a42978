"""Read the pages of tokens with the largest upper bounds on their logits (Quest).

In this file a row is one (batch item, kv head) stream, and a slot the place of one held token. A page is `page`
neighbouring slots; a page's box is the least and largest entry per channel of its keys. The logit bound of a page is
the largest logit that a query could have with any vector in the box, so no key of the page has a larger one. `Slots`
is the store of all held keys and values, by row and slot. In shapes, r are rows, m queries per row, d the width of a
key; an argument `rows` (r,) has the indices of these rows (None: all).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvfloor.core.fields import require_equal
from kvfloor.core.selector import Chosen, Indexed, SelectorState
from kvfloor.core.slots import Slots
from kvfloor.core.spec import Spec
from kvfloor.core.stretches import Stretches
from kvfloor.logits import capped
from kvfloor.validation import count


@dataclass(frozen=True)
class Pages(Indexed):
    """Read the tokens of the `pages` full pages of largest logit bound, and of the newest page, which is still filling.

    Law (Tang et al. 2024, Quest): with low and high the least and largest entry per channel of a page's keys, no key
    of the page has a larger q.k than sum_j max(q_j low_j, q_j high_j). Of pages with equal bounds the newer one is
    preferred.
    pages   pages read beside the newest one
    page    tokens per page: page i is the slots page*i .. page*(i+1) - 1. Under an eviction policy an emptied slot is
            filled by another token, and the box of its page is recomputed
    """

    name: ClassVar[str] = "pages"
    paper: ClassVar[str] = "Tang et al. 2024, Quest (arXiv 2406.10774)"
    pages: int = 8
    page: int = 16

    def __post_init__(self) -> None:
        count("pages", least=1, pages=self.pages, page=self.page)

    def open(self, spec: Spec, slots: Slots, shared: dict[str, Tensor], in_order: bool) -> PagesState:
        del shared, in_order
        return PagesState(spec, slots, self)


class PagesState(SelectorState):
    """Hold the box of every full page: the least and largest entry per channel of its keys, in the keys' dtype."""

    def __init__(self, spec: Spec, slots: Slots, method: Pages) -> None:
        self.spec = spec
        self.method = method  # frozen: no part of the memory
        box = ((spec.d,), spec.dtype)
        self.boxes = Stretches(spec, self._room(slots), {"low": box, "high": box})

    def _room(self, slots: Slots) -> Tensor:
        return slots.capacity // self.method.page

    # ---- keeping up ----------------------------------------------------------------------------------------

    def append(self, slots: Slots, before: Tensor) -> None:
        self._fit(slots)
        full = slots.held // self.method.page
        most = int(full.max())
        self.boxes.held = full
        page = torch.arange(most)
        self._take(slots, (page >= (before // self.method.page).unsqueeze(1)) & (page < full.unsqueeze(1)))

    def evict(self, slots: Slots, leaving: Tensor) -> None:
        full = slots.held // self.method.page
        self.boxes.held = full
        most = int(full.max())
        row, slot = leaving.cpu().nonzero(as_tuple=True)
        touched = torch.zeros(self.spec.rows, -(-leaving.shape[1] // self.method.page), dtype=torch.bool)
        touched[row, slot // self.method.page] = True
        self._take(slots, touched[:, :most] & (torch.arange(most) < full.unsqueeze(1)))

    def require_fitting(self, fields: dict[str, Any], slots: dict[str, Any]) -> None:
        page = self.method.page
        require_equal(fields["boxes"]["capacity"], slots["capacity"] // page, "room for pages")
        require_equal(fields["boxes"]["held"], slots["held"] // page, "full pages")

    def resize(self, slots: Slots) -> None:
        self._fit(slots)

    def _fit(self, slots: Slots) -> None:
        room = self._room(slots)
        if not torch.equal(room, self.boxes.capacity):
            self.boxes.resize(room)

    def _take(self, slots: Slots, wanted: Tensor) -> None:
        """Compute and store the boxes of the full pages for which the mask wanted (rows, pages) is True."""
        row, page = wanted.nonzero(as_tuple=True)
        if not len(row):
            return
        first = slots.offset[row] + page * self.method.page
        place = first.unsqueeze(1) + torch.arange(self.method.page)
        keys = slots.keys(place.to(slots.position.device)).to(self.spec.dtype)
        place = self.boxes.places(None, wanted.shape[1])[row.to(keys.device), 0, page.to(keys.device)]
        self.boxes.low[place], self.boxes.high[place] = keys.amin(1), keys.amax(1)  # type: ignore[attr-defined]

    # ---- choosing ------------------------------------------------------------------------------------------

    def choose(self, q: Tensor, slots: Slots, visible: Tensor, rows: Tensor | None = None) -> Chosen:
        del slots
        device = q.device
        visible = visible.to(device)
        newest = (visible - 1).clamp_min(0) // self.method.page
        bound = self.bounds(q, newest, rows)
        # From the last page to the first: among equal bounds a stable order keeps the newer page.
        best = bound.flip(-1).argsort(dim=-1, descending=True, stable=True)[..., : self.method.pages]
        best = bound.shape[-1] - 1 - best
        dead = bound.gather(-1, best) == -torch.inf
        page = torch.cat([best, newest.expand(q.shape[:2]).unsqueeze(-1)], -1)
        dead = torch.cat([dead, dead.new_zeros(*dead.shape[:2], 1)], -1)
        index = (page.unsqueeze(-1) * self.method.page + torch.arange(self.method.page, device=device)).flatten(2)
        dead = dead.unsqueeze(-1).expand(-1, -1, -1, self.method.page).flatten(2) | (index >= visible.unsqueeze(-1))
        return Chosen(index, dead)

    def unread_logit(self, q: Tensor, visible: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return two upper bounds on the unread tokens' logits: on the largest one, and on their log-sum-exp.

        Both are (r, m), float64, one per query of q (r, m, d). visible (r, m) is the number of slots, from the first
        on, that a query sees. The unread tokens are those in pages that the query sees and does not read, because their
        logit bounds are too low. The results are -inf where every token is read. Logits are meant after scale and
        softcap, without rounding errors.
        """
        newest = ((visible - 1).clamp_min(0) // self.method.page).to(q.device)
        bound = self.bounds(q, newest, rows)
        if self.spec.softcap is not None:
            bound = capped(bound, self.spec.softcap)
            page = torch.arange(bound.shape[-1], device=q.device)
            bound = bound.masked_fill(page >= newest.unsqueeze(-1), -torch.inf)
        unread = bound.sort(-1, descending=True).values[..., self.method.pages :]
        if unread.shape[-1] == 0:
            nothing = bound.new_full(bound.shape[:2], -torch.inf)
            return nothing, nothing
        return unread[..., 0], torch.logsumexp(unread, -1) + torch.tensor(self.method.page, dtype=bound.dtype).log()

    def bounds(self, q: Tensor, newest: Tensor, rows: Tensor | None) -> Tensor:
        """Return upper bounds (r, m, pages), float64, on scale q.k over each page's keys k, for queries q (r, m, d).

        newest (r, m) is the page of the newest token that a query sees. This page, which has no box yet, and later
        pages have the bound -inf.
        """
        most = int(newest.max()) if newest.numel() else 0
        low, high = (self.boxes.across(name, rows, most)[:, 0].double() for name in ("low", "high"))
        q = q.double() * self.spec.scale
        bound = q.clamp_min(0) @ high.transpose(1, 2) + q.clamp_max(0) @ low.transpose(1, 2)
        return bound.masked_fill(torch.arange(most, device=q.device) >= newest.unsqueeze(-1), -torch.inf)

    def bytes_read(self, held: Tensor) -> int:
        number = self.spec.dtype.itemsize
        full = (held - 1).clamp_min(0) // self.method.page
        index = 2 * int(full.sum()) * self.spec.d
        tokens = full.clamp_max(self.method.pages) * self.method.page + held - full * self.method.page
        return (index + int(tokens.sum()) * (self.spec.d + self.spec.dv)) * number
