"""Define `Bounded`, which evicts whole tokens: one eviction loop for every policy, summary and selector.

A policy is a rule that decides which tokens to evict, a summary a compressed form of evicted tokens, and a selector a
rule that picks the held tokens that a query reads. A row is one (batch item, kv head) stream, and a slot the place of
one held token. A priority is a policy's number for a held token; the token of lowest priority is evicted first. A
protected token is one that the policy never evicts, a pinned token one that `State.pin` protects.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from kvfloor.core.budget import Budget, size_bytes, tokens
from kvfloor.core.device import sent
from kvfloor.core.fields import MOST, Field, require_equal
from kvfloor.core.method import Guarantee, Method, Parts, Traits, budget_text, lossy, part_text
from kvfloor.core.policy import Held, Policy
from kvfloor.core.selector import Everything, Indexed, Selector
from kvfloor.core.spec import Spec
from kvfloor.core.state import ANEW
from kvfloor.core.store import Full, Store
from kvfloor.core.summary import Drop, Summary
from kvfloor.core.watching import Watching
from kvfloor.validation import count

DEFAULT_BLOCK = 32


@dataclass(frozen=True)
class Bounded(Method):
    """Keep at most `budget` tokens per row after every `block`-th token, and at most `budget + block - 1` in between.

    policy    the rule that decides which held token is evicted
    summary   the compressed form of evicted tokens; `Drop`, the default, keeps nothing of them
    selector  the rule that picks the held tokens a query reads; `Everything`, the default, reads all
    budget    tokens per row: one number, or one per row. A share ("25%") or bytes ("64MiB") may be given too, but
              must be converted to tokens (`core.budget.resolve`) before a cache is opened
    block     number of a row's tokens between two evictions, which evict about `block` tokens at once; 1: evict after
              every token, as the policies' papers do
    prefill   "stream": the budget holds from the first token; "dense": every token is kept until the seal
              (end of the prompt). None: the policy's default (`usual_prefill`)
    store     how the slots keep their numbers: as they are given (`Full`, the default), or coded in few bits
    """

    name: ClassVar[str] = "bounded"
    policy: Policy
    summary: Summary = field(default_factory=Drop)
    selector: Selector = field(default_factory=Everything)
    budget: Budget | None = None
    block: int = DEFAULT_BLOCK
    prefill: Literal["stream", "dense"] | None = None
    store: Store = field(default_factory=Full)

    def __post_init__(self) -> None:
        for name, part in (("policy", Policy), ("summary", Summary), ("selector", Selector), ("store", Store)):
            if not isinstance(getattr(self, name), part):
                raise TypeError(f"{name} must be a {part.__name__}, got {getattr(self, name)!r}")
        count(self.policy.name, least=1, block=self.block)
        if self.prefill is None:
            object.__setattr__(self, "prefill", self.policy.usual_prefill)
        if self.prefill not in ("stream", "dense"):
            raise ValueError(f"{self.policy.name}: prefill must be stream or dense, got {self.prefill!r}")
        if self.policy.spares == "prompt" and self.prefill == "stream":
            raise ValueError(f"{self.policy.name} keeps the whole prompt, so its prefill is dense, not stream")
        if self.policy.spares != "nothing" and isinstance(self.budget, str) and size_bytes(self.budget) is not None:
            spared = {"prompt": "the whole prompt", "answer": "every token after the prompt"}[self.policy.spares]
            raise ValueError(
                f"{part_text(self.policy)} keeps {spared} beside its budget, so '@{self.budget}' cannot bound its "
                f"bytes: give a number of tokens or a share"
            )
        if not self.store.loses:
            raise ValueError(
                f"{self.store} codes groups of tokens that all stay, but {part_text(self.policy)} drops some of them: "
                f"use a store such as k4v4, or {self.store} with exact"
            )
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
        """Return the smallest budget >= `budget` that leaves at least one token unprotected.

        pinned: number of tokens that `State.pin` protects. The budget is raised step by step, because under a larger
        budget the policy may protect more of the newest tokens.
        """
        first = self.policy.protected_first()
        while (needed := first + self.policy.protected_last(budget) + pinned + 1) > budget:
            budget = needed
        return budget

    @property
    def traits(self) -> Traits:
        constant = self.prefill == "stream" and self.policy.spares == "nothing"
        linear = self.summary.traits.value_linear and not self.policy.weighs_values
        turns = self.summary.traits.turns and not isinstance(self.selector, Indexed)
        traits = replace(self.summary.traits, value_linear=linear, constant_memory=constant, pins=True, turns=turns)
        return traits if self.store.plain else lossy(traits)

    @property
    def parts(self) -> Parts:
        return Parts(self.policy, self.summary, self.selector, self.store)

    @property
    def wants_rotation(self) -> bool:
        return self.policy.wants_rotation

    @property
    def answers_prompt_exactly(self) -> bool:
        """Return True if queries of the prompt attend to all its tokens: none is evicted before the prompt's end."""
        return self.prefill == "dense" and isinstance(self.selector, Everything) and self.store.plain

    @property
    def prompt_queries(self) -> int | None:
        """Return how many of the prompt's newest queries influence which tokens are kept at the prompt's end.

        0: no query does; None: all of the prompt's queries may. The answer is for a dense prefill, which evicts no
        token before the prompt's end.
        """
        policy = self.policy
        if policy.wants_weights or policy.wants_keys or not isinstance(self.summary, Drop):
            return None
        return policy.newest_queries if policy.wants_queries(sealed=False) else 0

    def open(self, spec: Spec) -> BoundedState:
        budgets = tokens(self.budget, spec.rows)
        for budget in budgets:
            self._check_room(budget, pinned=0)
        return BoundedState(self, spec, budgets)

    def capacity(self, n: int, prompt: int | None = None, pinned: int = 0) -> int | None:
        del pinned  # pinned tokens live inside the budget
        if isinstance(self.budget, str) or self.budget is None:
            raise ValueError(f"the capacity of {self} is known once its budget is in tokens")
        if self.policy.spares == "answer":
            return None
        largest = max(self.budget) if isinstance(self.budget, tuple) else self.budget
        if self.policy.spares == "prompt":
            largest += n if prompt is None else prompt
        bounded = min(n, largest + self.block - 1)
        if self.prefill == "stream":
            return bounded
        return max(bounded, n if prompt is None else min(n, prompt))

    def with_budget(self, budget: Budget) -> Bounded:
        return replace(self, budget=budget)

    def with_summary(self, summary: Summary) -> Bounded:
        return replace(self, summary=summary)

    def with_store(self, store: Store) -> Bounded:
        return replace(self, store=store)

    def guarantee(self, spec: Spec) -> Guarantee | None:
        plain = isinstance(self.selector, Everything) and self.store.plain
        return self.summary.guarantee(spec) if plain else None

    def _sized_for(self, epsilon: float, delta: float, spec: Spec) -> Bounded:
        return replace(self, summary=self.summary.sized_for(epsilon, delta, spec))

    def __str__(self) -> str:
        options = [
            f"{name}={value}"
            for name, value, default in (
                ("block", self.block, DEFAULT_BLOCK),
                ("prefill", self.prefill, self.policy.usual_prefill),
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
        if not self.store.plain:
            text += f":{self.store}"
        return text if self.budget is None else f"{text}@{budget_text(self.budget)}"


class BoundedState(Watching):
    """Keep the held tokens in budget + block slots per row, allocated once.

    More slots are added where more tokens are kept: in a dense prefill, which keeps every token until the seal (end of
    the prompt), and for spared tokens. Spared tokens are kept and not counted in the budget: all tokens of the prompt,
    or all after it, as the policy says (`Policy.spares`).
    """

    def __init__(self, method: Bounded, spec: Spec, budgets: list[int]) -> None:
        super().__init__(method, spec, budgets)
        self.pins = torch.zeros(spec.rows, 0, 2, dtype=torch.int64)  # pinned spans [from, to) of positions
        self.on_evict: Callable[[Tensor, Tensor], None] | None = None  # gets row (e,), position (e,) of evicted tokens

    def fields(self) -> dict[str, Any]:
        spec = self.spec
        queries = Field(spec.dtype, (spec.rows, "g", self.block, spec.d), finite=True, optional=True)
        own = {"queries": queries, "pins": Field(torch.int64, (spec.rows, None, 2), least=0, most=MOST)}
        if self.prompt is not None:
            own["prompt"] = Field(torch.int64, (spec.rows,), least=-1, most=MOST)
        return super().fields() | own

    def require_sound(self, fields: dict[str, Any]) -> None:
        super().require_sound(fields)
        require_equal(fields["budget"], self.budget, "tokens of the budget")
        pins, queries, prompt = fields["pins"], fields["queries"], fields["prompt"]
        if bool((pins != pins[:1]).any()) or bool((pins[..., 0] >= pins[..., 1]).any()):
            raise ValueError("a pinned span needs a start below its stop, the same in all rows")
        for budget in self.budget.tolist():
            self.method._check_room(budget, int((pins[0, :, 1] - pins[0, :, 0]).sum()))
        if prompt is not None and bool((prompt > fields["seen"]).any()):
            raise ValueError("the prompt has more tokens than its row has seen")
        if self.memory is not None:
            self.memory.require_fitting(
                fields["memory"], None if queries is None else queries.shape[1], fields["sealed"]
            )

    def _pin(self, start: int, stop: int) -> None:
        pinned = int((self.pins[0, :, 1] - self.pins[0, :, 0]).sum()) + stop - start
        for budget in self.budget.tolist():
            self.method._check_room(budget, pinned)
        view = self.slots.view()
        inside = (view.position >= start) & (view.position < stop)
        inside = inside if view.live is None else inside & view.live
        arrived = (self.seen.clamp(max=stop) - start).clamp_min(0)
        if bool((inside.sum(1).cpu() < arrived).any()):
            raise ValueError(f"some tokens of {start}..{stop} have left already: pin spans before they can be evicted")
        span = torch.tensor([start, stop]).expand(self.spec.rows, 1, 2)
        self.pins = torch.cat([self.pins, span], dim=1)

    def copied(self) -> BoundedState:
        copy = super().copied()
        copy.on_evict = None  # an eviction from the copy is none from this state
        return copy

    def _select_rows(self, index: Tensor) -> None:
        super()._select_rows(index)
        if isinstance(self.method.budget, tuple):  # so that the message names a method which opens for these rows
            self.method = replace(self.method, budget=tuple(self.budget.tolist()))

    def guarantee(self) -> Guarantee | None:
        stated = super().guarantee()
        return stated if stated is None or self.summary is None else self.summary.guarantee(stated)

    @property
    def bytes_read(self) -> int:
        summary = 0 if self.summary is None else self.summary.nbytes
        return self.slot_bytes_read + summary

    @property
    def scores_read(self) -> int:
        summary = 0 if self.summary is None else self.summary.nbytes
        return super().scores_read - (-summary // self.spec.token_bytes)

    # ---- evicting --------------------------------------------------------------------------------------------------

    def _close(self, rows: Tensor | None) -> None:
        rows = torch.arange(self.spec.rows) if rows is None else rows
        self._show_keys(rows)
        self._show_block(rows, self.block)
        if self.sealed or self.method.prefill == "stream":
            self._evict(rows)

    def _require_forgettable(self, row: Tensor, position: Tensor) -> None:
        leaving = self.slots.find(row, position)
        if self.summary is not None and int(leaving.sum()) < torch.unique(torch.stack([row, position]), dim=1).shape[1]:
            raise ValueError(
                f"some of these tokens are in the summary of {self.method}, which cannot give them back: {ANEW}"
            )

    def _forget(self, row: Tensor, position: Tensor) -> None:
        leaving = self.slots.find(row, position)
        if not bool(leaving.any()):
            return
        self._show_open_blocks()  # before the drop, which moves tokens out of the slots they were pushed to
        if self.on_evict is not None:
            gone, _k, _v, when = self.slots.flat(leaving)
            self.on_evict(gone, when)
        self.slots.evict(leaving)
        if self.selection is not None:
            self.selection.evict(self.slots, leaving)

    def _seal(self) -> None:
        every, policy = torch.arange(self.spec.rows), self.method.policy
        self._show_open_blocks()
        if self.prompt is not None:
            self.prompt = self.seen.clone()
        if self.method.prefill == "dense" or policy.spares == "answer":  # bring the prompt to its budget
            self._evict(every)
        if self.method.prefill == "dense":
            self.slots.resize(self._limit() + self.block)
            if self.selection is not None:
                self.selection.resize(self.slots)
        if self.memory is not None:
            self.memory.seal()
        if not self._learns(sealed=True):
            self.queries = None
        super()._seal()

    def _limit(self) -> Tensor:
        """Return the most tokens (rows,) that each row may hold after an eviction: its budget plus its spared tokens.

        Spared tokens are all tokens of the prompt, or all after it, as the policy says (`Policy.spares`); many policies
        spare none.
        """
        if self.prompt is None:
            return self.budget
        spared = self.prompt if self.method.policy.spares == "prompt" else self.seen - self.prompt
        return self.budget + spared.masked_fill(self.prompt < 0, 0)

    def _evict(self, rows: Tensor) -> None:
        """Evict the lowest-priority tokens of each row in `rows` until the row holds at most `_limit` tokens.

        The summary, if there is one, absorbs the evicted tokens.
        """
        excess = (self.slots.held - self._limit()).clamp_min(0)
        count = torch.zeros_like(excess).index_copy_(0, rows, excess[rows])
        due = rows[count[rows] > 0]
        if not len(due):
            return
        width, everyone = int(self.slots.capacity.max()), len(due) == self.spec.rows
        held = self._held(None if everyone else due, width)
        priority = self.method.policy.priority(held).to(torch.float64)
        priority = priority.masked_fill(self._protected(held) | ~held.live, torch.inf)
        leaving = _lowest(priority, held.position, count[due])
        if not everyone:
            some = leaving
            leaving = torch.zeros(self.spec.rows, width, dtype=torch.bool, device=some.device)
            leaving[sent(due, some.device)] = some
        if self.summary is not None or self.on_evict is not None:
            row, k, v, position = self.slots.flat(leaving, count)
            if self.summary is not None:
                self.summary.absorb(row, k, v, position)
            if self.on_evict is not None:
                self.on_evict(row, position)
        self.slots.evict(leaving, count)
        if self.selection is not None:
            self.selection.evict(self.slots, leaving.cpu())

    def _protected(self, held: Held) -> Tensor:
        policy, position, rows = self.method.policy, held.position, held.rows
        budgets, pins = (x if rows is None else x[rows] for x in (self.budget, self.pins))
        last = torch.tensor([policy.protected_last(budget) for budget in budgets.tolist()]).unsqueeze(1)
        safe = policy.protected(held, sent(last, position.device))
        if policy.spares == "prompt" and held.prompt is not None:
            safe = safe | (position < held.prompt)
        for span in sent(pins, position.device).unbind(1):
            safe = safe | ((position >= span[:, :1]) & (position < span[:, 1:]))
        return safe


def _lowest(priority: Tensor, position: Tensor, count: Tensor) -> Tensor:
    """Return a bool mask (r, s) of the slots of lowest priority in each of r rows of s slots.

    priority (r, s) and position (r, s), the arrival index, are those of each slot's token; count (r,), on the CPU, is
    the number of slots to mark in each row, at least 1. Of slots with equal priority, the one with the older token is
    marked first.
    """
    most, n = int(count.max()), sent(count, priority.device).unsqueeze(1)
    last = priority.topk(most, dim=1, largest=False).values.gather(1, n - 1)
    if priority.device.type == "cpu":  # where it costs nothing to look whether any are equal
        lowest = priority <= last
        if bool((lowest.sum(1) == count).all()):
            return lowest
    below, tied = priority < last, priority == last
    n = n - below.sum(1, keepdim=True)
    age = position.masked_fill(~tied, torch.iinfo(torch.int64).max)
    youngest = age.topk(most, dim=1, largest=False).values.gather(1, n - 1)
    return below | (tied & (position <= youngest))
