"""Milestones (RaaS): pages of the answer that no query has needed for longest leave; the prompt stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvfloor.core.policy import Held, Policy, Queries
from kvfloor.validation import count, literals, positives

_NO_PAGE = 1 << 40
_PAGES = 1 << 22  # more pages than a row can hold: a page's time and age are one float64


def _keys_at(k: Tensor, slot: Tensor) -> Tensor:
    """Keys (r, c, d) of the slots (r, c) of k (r, s, d)."""
    return k[torch.arange(k.shape[0], device=k.device).unsqueeze(1), slot]


@dataclass(frozen=True)
class Milestones(Policy):
    """Least recently needed pages leave, needed as a bound on their keys' logits tells (Hu et al. 2025, RaaS).

    Tokens after the prompt form pages of `page`. With low and high the least and largest entry per channel of a
    page's keys, bound = sum_j max(q_j low_j, q_j high_j) is no smaller than any q.k of the page (Quest). A query's
    estimate of a page is softmax(scale bound) over all pages it sees, the largest of its GQA group; where that
    exceeds `alpha` the page's timestamp becomes the query's position. The page with the oldest timestamp leaves,
    among equals the older page, its oldest tokens first, as many as the budget asks for.
    page     tokens per page
    alpha    estimate above which a page counts as needed
    top      instead of alpha: the share of pages, of largest estimates, that counts as needed (the paper runs 0.5)
    prompt   "keep": tokens before the seal never leave and are not counted: a row holds prompt + budget, and prefill
             is dense. "evict": nothing counts as prompt, and the budget holds from the first token on
    sinks    first tokens of the stream that never leave; nor does the page that is being filled
    The decision is one per kv head. Bounds are taken anew from the held keys at each block's end, so nothing but a
    timestamp per token is stored. Without queries the oldest page leaves.
    """

    name: ClassVar[str] = "raas"
    paper: ClassVar[str] = "Hu et al. 2025, RaaS (arXiv 2502.11147)"
    columns: ClassVar[dict[str, torch.dtype]] = {"stamp": torch.int32}

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
        """The page that is being filled, at its fullest."""
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
        time = torch.maximum(held.columns["stamp"].to(torch.int64), held.position)  # a new page is needed by itself
        newest = torch.zeros_like(pages).scatter_reduce(1, index, time, "amax")
        return newest.gather(1, index).to(torch.float64) * _PAGES + index

    # ---- pages -----------------------------------------------------------------------------------------------

    def _start(self, held: Held) -> Tensor:
        """Position (r, 1) of the first token after the prompt."""
        return torch.zeros_like(held.seen) if held.prompt is None else held.prompt.clamp_min(0)

    def _page(self, position: Tensor, held: Held) -> Tensor:
        """The number of the page of each position (r, ...), by age; the prompt's pages and the answer's do not mix."""
        start = self._start(held)
        behind = -(-start // self.page) + (position - start).clamp_min(0) // self.page
        return torch.where(position < start, position // self.page, behind)

    def _held_pages(self, held: Held) -> tuple[Tensor, Tensor, Tensor]:
        """Each slot's place (r, s) among the held pages, the oldest first; those pages' numbers (r, p) and slots.

        The slots are (r, p, page): a page that is not full names its first slot again.
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
        """What each query of q (r, g, b, d) expects each page to weigh, the largest of its group: (r, b, p)."""
        r, g, b, _ = queries.q.shape
        members = _keys_at(held.k, slots.flatten(1)).unflatten(1, slots.shape[1:])
        low, high = members.amin(2).double(), members.amax(2).double()
        q = queries.q.double() * held.spec.scale
        up, down = q.clamp_min(0), q.clamp_max(0)
        bound = torch.matmul(up.flatten(1, 2), high.transpose(1, 2))
        bound = (bound + torch.matmul(down.flatten(1, 2), low.transpose(1, 2))).view(r, g, b, -1)
        own_low, own_high = (x.unsqueeze(1) for x in self._filling(held, queries))
        own = (up * own_high + down * own_low).sum(-1, keepdim=True)
        at = self._page(queries.position, held)[:, None, :, None]
        number = pages[:, None, None, :]
        bound = torch.where(number == at, own, bound)
        if held.spec.softcap is not None:
            bound = torch.tanh(bound / held.spec.softcap) * held.spec.softcap
        return torch.softmax(bound.masked_fill(number > at, -torch.inf), -1).amax(1)

    def _filling(self, held: Held, queries: Queries) -> tuple[Tensor, Tensor]:
        """Least and largest entries (r, b, d) of each query's own page as it was when the query came."""
        r, b = queries.position.shape
        start, first = self._start(held), self._page(queries.position[:, :1], held)
        many = (b - 1) // self.page + 3  # pages that b positions in a row can touch, and one where the prompt ends

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
        """Pages (r, b, p) that a query needs, of those it sees: all up to its own (r, b)."""
        if self.top is None:
            return estimate > self.alpha
        seen = pages.unsqueeze(1) <= own.unsqueeze(-1)
        many = (seen.sum(-1, keepdim=True) * self.top).ceil().to(torch.int64).clamp_min(1)
        least = estimate.sort(-1, descending=True).values.gather(-1, many - 1)
        return seen & (estimate >= least)
