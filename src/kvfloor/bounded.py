"""Bounded: the method for everything that keeps whole tokens. Policy x summary x selector, one eviction loop."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvfloor.blocked import Blocked
from kvfloor.budget import Budget, tokens
from kvfloor.kernels.attend import weigh
from kvfloor.method import Guarantee, Method, Spec, Traits, count, part_text
from kvfloor.partial import Partial
from kvfloor.policies.policy import Ledger, Policy
from kvfloor.selectors.everything import Everything
from kvfloor.selectors.selector import Selector
from kvfloor.slots import Slots
from kvfloor.summaries.drop import Drop
from kvfloor.summaries.summary import Summary

DEFAULT_BLOCK = 32


@dataclass(frozen=True)
class Bounded(Method):
    """At most `budget` tokens per row after every `block`-th token, `budget + block - 1` in between.

    policy    which held token leaves           summary   what stays of those that left
    selector  which held tokens a query reads   budget    tokens per row (one number, or one per row)
    block     1 is the papers' rule: evict after every token. Larger blocks decide `block` evictions at once.
    prefill   "stream": the budget holds from the first token; "dense": everything is kept until `seal`.
    """

    name: ClassVar[str] = "bounded"
    policy: Policy
    summary: Summary = field(default_factory=Drop)
    selector: Selector = field(default_factory=Everything)
    budget: Budget | None = None
    block: int = DEFAULT_BLOCK
    prefill: Literal["stream", "dense"] = "stream"

    def __post_init__(self) -> None:
        for name, part in (("policy", Policy), ("summary", Summary), ("selector", Selector)):
            if not isinstance(getattr(self, name), part):
                raise TypeError(f"{name} must be a {part.__name__}, got {getattr(self, name)!r}")
        count(self.policy.name, least=1, block=self.block)
        if self.prefill not in ("stream", "dense"):
            raise ValueError(f"{self.policy.name}: prefill must be stream or dense, got {self.prefill!r}")
        if isinstance(self.budget, tuple) and len(self.budget) == 1:  # one number is written and parsed as a number
            object.__setattr__(self, "budget", self.budget[0])
        if self.budget is not None and not isinstance(self.budget, str):
            for tokens_per_row in self.budget if isinstance(self.budget, tuple) else (self.budget,):
                count(self.policy.name, least=1, budget=tokens_per_row)
                self._check_room(tokens_per_row, pinned=0)

    def _check_room(self, budget: int, pinned: int) -> None:
        first, last = self.policy.protected_first(), self.policy.protected_last(budget)
        if first + last + pinned >= budget:
            raise ValueError(
                f"a budget of {budget} tokens is too small for {self.policy.name}: it protects {first} first, {last} "
                f"newest and {pinned} pinned tokens, and needs at least {self._least_budget(budget, pinned)}"
            )

    def _least_budget(self, budget: int, pinned: int) -> int:
        """The smallest budget from here on that leaves room for one free token; `last` may grow with the budget."""
        first = self.policy.protected_first()
        while (needed := first + self.policy.protected_last(budget) + pinned + 1) > budget:
            budget = needed
        return budget

    @property
    def traits(self) -> Traits:
        return replace(self.summary.traits, constant_memory=self.prefill == "stream")

    def open(self, spec: Spec) -> BoundedState:
        budgets = tokens(self.budget, spec.rows)
        for budget in budgets:
            self._check_room(budget, pinned=0)
        return BoundedState(self, spec, budgets)

    def capacity(self, n: int, prompt: int | None = None, pinned: int = 0) -> int | None:
        del pinned  # pinned tokens live inside the budget
        if isinstance(self.budget, str) or self.budget is None:
            raise ValueError(f"the capacity of {self} is known once its budget is in tokens")
        largest = max(self.budget) if isinstance(self.budget, tuple) else self.budget
        bounded = min(n, largest + self.block - 1)
        if self.prefill == "stream":
            return bounded
        return max(bounded, n if prompt is None else min(n, prompt))

    def with_budget(self, budget: Budget) -> Bounded:
        return replace(self, budget=budget)

    def guarantee(self, spec: Spec) -> Guarantee | None:
        return self.summary.guarantee() if isinstance(self.selector, Everything) else None

    def __str__(self) -> str:
        options = [
            f"{name}={value}"
            for name, value, default in (
                ("block", self.block, DEFAULT_BLOCK),
                ("prefill", self.prefill, "stream"),
            )
            if value != default
        ]
        text = part_text(self.policy)
        if options:
            text = f"{text[:-1]},{','.join(options)})" if text.endswith(")") else f"{text}({','.join(options)})"
        if not isinstance(self.summary, Drop):
            text += f"+{part_text(self.summary)}"
        if not isinstance(self.selector, Everything):
            text += f"|{part_text(self.selector)}"
        if isinstance(self.budget, tuple):
            return f"{text}@{':'.join(map(str, self.budget))}"
        return text if self.budget is None else f"{text}@{self.budget}"


class BoundedState(Blocked):
    """Slots of budget + block tokens per row, allocated once; before the seal of a dense prefill they grow.

    A policy that watches attention gets it at block ends, from one product of fixed shape over the block's
    buffered queries: what leaves does not depend on how the stream was cut into calls.
    """

    def __init__(self, method: Bounded, spec: Spec, budgets: list[int]) -> None:
        slots = Slots(spec, [budget + method.block for budget in budgets], method.policy.columns)
        super().__init__(method, spec, slots, method.block)
        self.budget = torch.tensor(budgets, dtype=torch.int64)
        self.summary = method.summary.open(spec)
        self.queries: Tensor | None = None  # (rows, g, block, d) of the open block, if the policy watches
        self.asked = torch.zeros(spec.rows, method.block, dtype=torch.bool)  # which of them were really asked
        self.pins = torch.zeros(spec.rows, 0, 2, dtype=torch.int64)  # pinned spans [from, to) of positions

    @property
    def _plan(self) -> Bounded:
        assert isinstance(self.method, Bounded)
        return self.method

    def pin(self, start: int, stop: int) -> None:
        """Tokens start <= position < stop of every row never leave; call it before they are evicted.

        Raises ValueError if the budget cannot hold all that is protected, or if some are gone already.
        """
        if not 0 <= start < stop:
            raise ValueError(f"a pinned span needs 0 <= start < stop, got {start}..{stop}")
        pinned = int((self.pins[0, :, 1] - self.pins[0, :, 0]).sum()) + stop - start
        for budget in self.budget.tolist():
            self._plan._check_room(budget, pinned)
        view = self.slots.view()
        inside = (view.position >= start) & (view.position < stop)
        inside = inside if view.live is None else inside & view.live
        arrived = (self.seen.clamp(max=stop) - start).clamp_min(0)
        if bool((inside.sum(1).cpu() < arrived).any()):
            raise ValueError(f"some tokens of {start}..{stop} have left already: pin spans before they can be evicted")
        span = torch.tensor([start, stop]).expand(self.spec.rows, 1, 2)
        self.pins = torch.cat([self.pins, span], dim=1)

    def select_rows(self, index: Tensor) -> None:
        super().select_rows(index)
        if isinstance(self._plan.budget, tuple):  # so that the message names a method which opens for these rows
            self.method = replace(self._plan, budget=tuple(self.budget.tolist()))

    @property
    def bytes_read(self) -> int:
        summary = 0 if self.summary is None else self.summary.nbytes
        return self._plan.selector.bytes_read(self.slots.held, self.spec) + summary

    # ---- answering -----------------------------------------------------------------------------------------

    def _step(self, k: Tensor, v: Tensor, q: Tensor, take: Tensor) -> Tensor:
        if self.queries is not None and self.queries.shape[1] != q.shape[1]:
            raise ValueError(f"the GQA group was {self.queries.shape[1]} so far and is {q.shape[1]} now: it is fixed")
        return super()._step(k, v, q, take)

    @property
    def _selector(self) -> Selector:
        return self._plan.selector

    def _rest(self, q: Tensor) -> Partial | None:
        return None if self.summary is None else self.summary.read(q)

    def _notice(self, q: Tensor, before: Tensor, take: Tensor) -> None:
        if not self._plan.policy.observes:
            return
        rows, g, a, d = q.shape
        if self.queries is None:
            self.queries = torch.zeros(rows, g, self.block, d, dtype=q.dtype, device=q.device)
        start = int(self.seen[0]) % self.block
        if bool((self.seen % self.block == start).all()) and bool((take == a).all()):
            self.queries[:, :, start : start + a] = q
            self.asked[:, start : start + a] = True
            return
        row, j = (torch.arange(a) < take.unsqueeze(1)).nonzero(as_tuple=True)
        place = (self.seen % self.block)[row] + j
        self.queries[row, :, place] = q[row, :, j]
        self.asked[row, place] = True

    def _attend(self, q: Tensor) -> Partial:
        rows, g, m, d = q.shape
        flat = q.reshape(rows, g * m, d)
        if self._plan.policy.observes:
            self._learn(torch.arange(rows), flat, g, self.slots.held.unsqueeze(1).expand(-1, m), None)
        return self._read(flat)

    # ---- learning and evicting -----------------------------------------------------------------------------

    def _close(self, rows: Tensor | None) -> None:
        rows = torch.arange(self.spec.rows) if rows is None else rows
        self._watch(rows, self.block)
        if self.sealed or self._plan.prefill == "stream":
            self._evict(rows)

    def _seal(self) -> None:
        every = torch.arange(self.spec.rows)
        for fill in (self.seen % self.block).unique().tolist():
            self._watch(every[(self.seen % self.block) == fill], fill)
        if self._plan.prefill == "dense":
            self._evict(every)
            self.slots.resize(self.budget + self.block)

    def _watch(self, rows: Tensor, fill: int) -> None:
        """Let the policy see what the last `fill` tokens' queries of these rows attended to."""
        rows = rows[self.asked[rows].any(1)]
        if self.queries is None or not len(rows):
            return
        everyone = len(rows) == self.spec.rows
        queries = self.queries if everyone else self.queries[rows.to(self.queries.device)]
        r, g, b, d = queries.shape
        limit = (self.slots.held[rows] - fill).unsqueeze(1) + torch.arange(b)
        self._learn(rows, queries.reshape(r, g * b, d), g, limit + 1, self.asked[rows])
        self.asked[rows] = False

    def _learn(self, rows: Tensor, flat: Tensor, g: int, visible: Tensor, asked: Tensor | None) -> None:
        """Weights of queries (r, g*b, d), which see the first visible (r, b) slots, go to the policy.

        The product is as wide as the arena, not as the fill: its shape, and so its rounding, is the same for
        every chunking and every neighbour row.
        """
        width = int(self.slots.capacity.max())
        every = None if len(rows) == self.spec.rows else rows
        view = self.slots.view(every, width)
        hide = (torch.arange(width) >= visible.unsqueeze(-1)).to(flat.device)
        hide = hide.unsqueeze(1).expand(-1, g, -1, -1).reshape(len(rows), -1, width)
        chosen = self._plan.selector.hide(flat, view, self.spec, hide)
        _, _, weights = weigh(flat, view.k, view.v, self.spec.scale, self.spec.softcap, hide=chosen)
        weights = weights.view(len(rows), g, -1, width)
        if asked is not None:
            weights = weights * asked.to(weights.device)[:, None, :, None]
        learnt = self._plan.policy.observe(self._ledger(every, width), weights)
        for name, values in learnt.items():
            self.slots.put_column(name, every, values)

    def _ledger(self, rows: Tensor | None, width: int) -> Ledger:
        policy, ids = self._plan.policy, self.spec.ids()
        columns = {name: self.slots.column(name, rows, width) for name in policy.columns}
        seen = (self.seen if rows is None else self.seen[rows]).unsqueeze(1).to(ids.device)
        position = self.slots.across(self.slots.position, rows, width)
        return Ledger(position, columns, seen, ids if rows is None else ids[rows.to(ids.device)], self.spec)

    def _evict(self, rows: Tensor) -> None:
        """Bring these rows down to their budget: the lowest priorities leave, the summary absorbs them."""
        excess = torch.zeros_like(self.budget)
        excess[rows] = (self.slots.held - self.budget).clamp_min(0)[rows]
        if not bool((excess > 0).any()):
            return
        width = int(self.slots.held.max())
        ledger = self._ledger(None, width)
        priority = self._plan.policy.priority(ledger).to(torch.float64)
        priority = priority.masked_fill(self._protected(ledger), torch.inf)
        dead = torch.arange(width) >= self.slots.held.unsqueeze(1)
        priority = priority.masked_fill(dead.to(priority.device), torch.inf)
        by_age = torch.argsort(ledger.position, dim=1, stable=True)  # so that ties let the older token go
        order = by_age.gather(1, torch.argsort(priority.gather(1, by_age), dim=1, stable=True))
        rank = torch.empty_like(order).scatter(1, order, torch.arange(width, device=order.device).expand_as(order))
        leaving = rank.cpu() < excess.unsqueeze(1)
        if self.summary is not None:
            self.summary.absorb(*self.slots.flat(leaving))
        self.slots.evict(leaving)

    def _protected(self, ledger: Ledger) -> Tensor:
        policy = self._plan.policy
        last = torch.tensor([policy.protected_last(budget) for budget in self.budget.tolist()]).unsqueeze(1)
        position = ledger.position
        safe = (position < policy.protected_first()) | (position >= ledger.seen - last.to(position.device))
        for span in self.pins.to(position.device).unbind(1):
            safe = safe | ((position >= span[:, :1]) & (position < span[:, 1:]))
        return safe
