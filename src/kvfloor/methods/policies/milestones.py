"""Evict the pages (runs of tokens) of the answer that queries needed least recently, and keep the prompt (RaaS).

In this file a row is one (batch item, kv head) stream, and a slot the place of one held token. The seal is the end of
the prompt, and the answer is all tokens after the seal. A page is `page` consecutive tokens of the answer; the newest
page is being filled. Pages are numbered from 0, the oldest page of the stream. For each query, the policy estimates the
attention weight of every page. The query needs a page if this estimate exceeds `alpha` or, if `top` is given, is among
the largest of the query's estimates. A page's timestamp is the position of the last query that needed the page. A
query's own token is the token that came with the query; its own page is the page of that token. In shapes, r are rows,
s slots, b query tokens, p pages, g query heads per kv head, d the width of a key. `Held` is what a policy may read
about the held tokens of a call's rows, among it their keys and positions; `Queries` is the queries of one block of new
tokens, with their positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvfloor.core.policy import Held, Policy, Queries
from kvfloor.core.rowwise import row_by_row, total
from kvfloor.logits import capped
from kvfloor.validation import count, literals, positives

_NO_PAGE = 1 << 40
_PAGES = 1 << 22  # more pages than a row can hold: one int64 holds a page's timestamp and age


def _keys_at(k: Tensor, slot: Tensor) -> Tensor:
    """Return the keys (r, c, d) in c slots per row, given by `slot` (r, c), from the keys k (r, s, d) of all slots."""
    return k[torch.arange(k.shape[0], device=k.device).unsqueeze(1), slot]


@dataclass(frozen=True)
class Milestones(Policy):
    """Evict the page of the answer that queries needed least recently, judged by upper bounds on its logits.

    Law (Hu et al. 2025, RaaS): tokens after the prompt form pages of `page` tokens. Let low and high be the least and
    the largest entry per channel of a page's keys. Then bound = sum_j max(q_j low_j, q_j high_j) is no smaller than any
    q.k of the page (Quest). A query's estimate for a page is softmax(scale bound) over all pages that the query sees;
    the queries of a GQA group share the largest of their estimates. If this estimate exceeds `alpha`, the page's
    timestamp becomes the query's position. The page with the oldest timestamp is evicted; of several such pages, the
    oldest. The oldest tokens of a page are evicted first, as many as the budget requires.
    page     tokens per page
    alpha    estimate above which a page counts as needed
    top      instead of alpha: this share of the pages counts as needed, largest estimates first (the paper uses 0.5)
    prompt   "keep": tokens before the seal (end of the prompt) are never evicted and not counted: a row holds prompt +
             budget, and nothing is evicted before the seal. "evict": no token counts as prompt, and the budget applies
             from the first token on
    sinks    first tokens of the stream that are never evicted; the page being filled is never evicted either
    Each row (kv head) has timestamps and evictions of its own. Bounds are recomputed from the held keys at the end of
    each block (the new tokens between two evictions), so only a timestamp per token is stored. Without queries the
    oldest page is evicted.
    """

    name: ClassVar[str] = "raas"
    paper: ClassVar[str] = "Hu et al. 2025, RaaS (arXiv 2502.11147)"
    columns: ClassVar[dict[str, torch.dtype]] = {"stamp": torch.int64}

    page: int = 16
    alpha: float = 1e-4
    top: float | None = None
    prompt: Literal["keep", "evict"] = "keep"
    sinks: int = 4

    def __post_init__(self) -> None:
        count("raas", least=1, page=self.page)
        count("raas", sinks=self.sinks)
        positives("raas", alpha=self.alpha)
        if self.top is not None and not (isinstance(self.top, (int, float)) and 0 < self.top <= 1):
            raise ValueError(f"raas: top must be a share of the pages in (0, 1], got {self.top!r}")
        literals(self)

    @property
    def usual_prefill(self) -> Literal["stream", "dense"]:
        return "dense" if self.prompt == "keep" else "stream"

    @property
    def spares(self) -> Literal["nothing", "prompt", "answer"]:
        return "prompt" if self.prompt == "keep" else "nothing"

    def protected_first(self) -> int:
        return self.sinks

    def protected_last(self, budget: int) -> int:
        """Return `page`, the greatest number of newest tokens that can be protected from eviction.

        Protected are the tokens of the page that is being filled. The budget does not matter.
        """
        del budget
        return self.page

    def protected(self, held: Held, last: Tensor) -> Tensor:
        del last
        filling = self._page(held.seen - 1, held)
        return (held.position < self.sinks) | (self._page(held.position, held) == filling)

    def wants_queries(self, sealed: bool) -> bool:
        return sealed or self.prompt == "evict"

    def on_queries(self, held: Held, queries: Queries) -> dict[str, Tensor]:
        index, pages, slots = self._held_pages(held)
        needed = self._needed(self._estimate(held, queries, pages, slots), pages, self._page(queries.position, held))
        when = queries.position.masked_fill(~queries.made, -1)
        stamp = torch.where(needed, when.unsqueeze(-1), torch.full_like(when, -1).unsqueeze(-1)).amax(1)
        return {"stamp": torch.maximum(held.columns["stamp"].to(torch.int64), stamp.gather(1, index))}

    def priority(self, held: Held) -> Tensor:
        index, pages, _ = self._held_pages(held)
        time = torch.maximum(held.columns["stamp"].to(torch.int64), held.position)  # a new page counts as needed
        newest = torch.zeros_like(pages).scatter_reduce(1, index, time, "amax")
        age = torch.arange(pages.shape[1], device=pages.device)
        rank = (newest * _PAGES + age).argsort(1).argsort(1)  # whole numbers, as float64 would round late positions
        return rank.gather(1, index).to(torch.float64)

    # ---- pages -----------------------------------------------------------------------------------------------

    def _start(self, held: Held) -> Tensor:
        """Return the position (r, 1) of the first token after the prompt; 0 if no token counts as prompt."""
        return torch.zeros_like(held.seen) if held.prompt is None else held.prompt.clamp_min(0)

    def _page(self, position: Tensor, held: Held) -> Tensor:
        """Return the page number (r, ...), from 0, of each position (r, ...) in the stream.

        The prompt is cut into pages too, and its pages have the first numbers. The answer starts a new page, so no page
        has tokens of both.
        """
        start = self._start(held)
        behind = -(-start // self.page) + (position - start).clamp_min(0) // self.page
        return torch.where(position < start, position // self.page, behind)

    def _held_pages(self, held: Held) -> tuple[Tensor, Tensor, Tensor]:
        """Return the p pages with at least one held token, oldest first, as three tensors (index, number, slots).

        index   (r, s) for each slot, the index 0 .. p - 1 of its token's page
        number  (r, p) number of each page in the stream; `_NO_PAGE` where a row has fewer than p pages
        slots   (r, p, page) slots of each page's tokens; if fewer than `page` tokens are held, the slot of the first
                one is repeated
        """
        page = self._page(held.position, held).masked_fill(~held.live, _NO_PAGE)
        page, order = page.sort(1)
        fresh = torch.cat([torch.ones_like(page[:, :1], dtype=torch.bool), page[:, 1:] != page[:, :-1]], 1)
        place = fresh.cumsum(1) - 1
        r, many = page.shape[0], int(place.max()) + 1
        pages = page.new_full((r, many), _NO_PAGE).scatter(1, place, page)
        rank = torch.arange(page.shape[1], device=page.device)
        first = torch.where(fresh, rank, torch.zeros_like(place)).cummax(1).values
        cell = (place * self.page + rank - first).masked_fill(page == _NO_PAGE, many * self.page)
        slots = page.new_full((r, many * self.page + 1), -1).scatter(1, cell, order)[:, :-1].view(r, many, self.page)
        slots = torch.where(slots < 0, slots[..., :1], slots).clamp_min(0)
        return torch.empty_like(place).scatter(1, order, place), pages, slots

    # ---- estimates -------------------------------------------------------------------------------------------

    def _estimate(self, held: Held, queries: Queries, pages: Tensor, slots: Tensor) -> Tensor:
        """Return the estimated attention weight (r, b, p) that each of b query tokens gives to each page.

        It is the largest estimate among the token's g queries. `pages` (r, p) are the numbers of the pages, and `slots`
        (r, p, page) the slots of the pages' tokens, both from `_held_pages`.
        """
        _, g, b, _ = queries.q.shape
        members = _keys_at(held.k, slots.flatten(1)).unflatten(1, slots.shape[1:])
        low, high = members.amin(2).double(), members.amax(2).double()
        q = queries.q.double() * held.spec.scale
        up, down = q.clamp_min(0), q.clamp_max(0)
        own_low, own_high = (x.unsqueeze(1) for x in self._filling(held, queries))
        own = total(up * own_high + down * own_low).unsqueeze(-1)
        at, cap = self._page(queries.position, held)[:, None, :, None], held.spec.softcap

        def shares(high: Tensor, low: Tensor, number: Tensor, *asked: Tensor) -> Tensor:
            up, down, own, at = asked
            bound = torch.matmul(up.flatten(1, 2), high.transpose(1, 2))
            bound = (bound + torch.matmul(down.flatten(1, 2), low.transpose(1, 2))).view(1, g, b, -1)
            number = number[:, None, None, :]
            bound = capped(torch.where(number == at, own, bound), cap)
            return torch.softmax(bound.masked_fill(number > at, -torch.inf), -1).amax(1)

        many = (pages != _NO_PAGE).sum(1).tolist()
        return row_by_row(shares, high, low, pages, beside=(up, down, own, at), held=many)

    def _filling(self, held: Held, queries: Queries) -> tuple[Tensor, Tensor]:
        """Return the least and the largest entry per channel, (r, b, d) each, of the keys in each query's own page.

        Tokens of the page that came after the query's own token are left out.
        """
        r, b = queries.position.shape
        start, first = self._start(held), self._page(queries.position[:, :1], held)
        many = (b - 1) // self.page + 3  # pages that b consecutive positions can touch, plus one at the prompt's end

        def cell(position: Tensor) -> Tensor:
            offset = torch.where(position < start, position, position - start) % self.page
            page = self._page(position, held) - first
            return torch.where((page >= 0) & (page < many), page * self.page + offset, many * self.page)

        nowhere, order = many * self.page, torch.arange(held.position.shape[1], device=start.device)
        cells = cell(held.position).masked_fill(~held.live, nowhere)
        slot = cells.new_full((r, nowhere + 1), -1).scatter(1, cells, order.expand_as(cells))[:, :-1]
        grid = _keys_at(held.k, slot.clamp_min(0)).unflatten(1, (many, self.page))
        empty = (slot < 0).view(r, many, self.page, 1)
        mine = cell(queries.position).clamp_max(nowhere - 1)
        low = grid.masked_fill(empty, torch.inf).cummin(2).values.flatten(1, 2)
        high = grid.masked_fill(empty, -torch.inf).cummax(2).values.flatten(1, 2)
        return _keys_at(low, mine).double(), _keys_at(high, mine).double()

    def _needed(self, estimate: Tensor, pages: Tensor, own: Tensor) -> Tensor:
        """Return a mask (r, b, p) of the pages that each query needs.

        estimate (r, b, p) is the estimated attention weight of each page, pages (r, p) are the numbers of the pages,
        and own (r, b) is the number of the page of the query's own token. Pages later than the query's own are never
        needed.
        """
        if self.top is None:
            return estimate > self.alpha
        seen = pages.unsqueeze(1) <= own.unsqueeze(-1)
        many = (seen.sum(-1, keepdim=True) * self.top).ceil().to(torch.int64).clamp_min(1)
        least = estimate.sort(-1, descending=True).values.gather(-1, many - 1)
        return seen & (estimate >= least)
