"""Define the interface of an eviction policy, which the method `Bounded` calls.

`Bounded` keeps at most a budget of tokens per row. A state is a cache of some rows; a row is one (batch item, kv head)
stream, and a slot the place of one held token. A column is a policy's number per slot, e.g. a score. A policy learns by
updating its columns or its memory (further tensors). A block is `block` consecutive tokens of a row; evictions take
place at its end. The seal is the end of the prompt. To spare a part of the stream is to keep it whole and not count it
in the budget.
A token's position is its index in its row's stream; its rank is its index among the tokens that the row holds now, the
oldest at 0. If the spec (the state's sizes and constants) has a rotation, keys and queries are rotated by RoPE with the
rank in place of the position.
In shapes, r are the rows of a call, s slots, b tokens of a block, g query heads per kv head (GQA group), d and dv the
widths of a key and a value.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from kvfloor.core.device import sent
from kvfloor.core.memory import Memory
from kvfloor.core.spec import Spec
from kvfloor.validation import count

GRACE_TOKENS = 16


@dataclass(frozen=True)
class Held:
    """Hold all that a policy may read about the tokens held in r rows of s slots.

    A slot is the place of one held token; slots without a token have arbitrary numbers.

    position  (r, s)  index of each slot's token in its row's stream
    columns   (r, s)  the policy's own numbers per slot, by name
    seen      (r, 1)  tokens of the row so far
    row_ids   (r,)    row ids, which seed random draws
    spec              sizes, dtype and constants of the state
    count     (r, 1)  slots 0 .. count - 1 hold a token
    budget    (r, 1)  tokens per row
    filled            r numbers: `count` on the host, where reading it never waits for a device
    fetch             function of "k" or "v" that returns the keys or values of all slots, (r, s, ...)
    rows      (r,)    indices of the rows in the state; None: all rows
    prompt    (r, 1)  tokens before the seal (end of the prompt), -1 until then; None unless the policy spares the
              prompt or the answer
    memory            the policy's memory of all rows, or None if it has only columns
    shared            tensors fixed by (policy, spec) alone, by name
    """

    position: Tensor
    columns: dict[str, Tensor]
    seen: Tensor
    row_ids: Tensor
    spec: Spec
    count: Tensor
    budget: Tensor
    filled: Sequence[int]
    fetch: Callable[[str], Tensor] = field(repr=False)
    rows: Tensor | None = None
    prompt: Tensor | None = None
    memory: Any = None
    shared: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def k(self) -> Tensor:
        """Return the keys (r, s, d) that queries are multiplied with; if the spec has a rotation, they are rotated.

        The keys are fetched on access. The result is a copy only if rows have different numbers of slots, or if this
        `Held` has not all rows of the state.
        """
        return self.fetch("k")

    @property
    def v(self) -> Tensor:
        """Return the values (r, s, dv) of the slots, fetched on access."""
        return self.fetch("v")

    @property
    def live(self) -> Tensor:
        """Return a mask (r, s), True for each slot that holds a token."""
        return torch.arange(self.position.shape[1], device=self.count.device) < self.count

    def turned(self, q: Tensor, position: Tensor) -> Tensor:
        """Rotate unrotated queries q (r, g, b, d), each to the present rank of the token that it came with.

        position (r, b) is that token's index in the stream. If the spec has no rotation, q is returned as it is.
        The rank is right only if every token after the query's own is still held. So use this method only for the
        queries of the newest tokens, and only if the policy protects these from eviction.
        """
        rotation = self.spec.rotation
        if rotation is None:
            return q
        place = (self.count - self.seen + position).clamp_min(0)
        return rotation.turned(q, rotation.circle(place.unsqueeze(1), self.spec.compute_dtype))

    def part(self, at: slice) -> Held:
        """Return a `Held` with the data of the slots in the slice `at` only."""
        if at.start == 0 and at.stop == self.position.shape[1]:
            return self
        return replace(
            self,
            position=self.position[:, at],
            columns={name: column[:, at] for name, column in self.columns.items()},
            count=(self.count - at.start).clamp(0, at.stop - at.start),
            filled=[min(max(n - at.start, 0), at.stop - at.start) for n in self.filled],
            fetch=lambda name: self.fetch(name)[:, at],
        )


@dataclass(frozen=True)
class Queries:
    """Hold the queries of one block of b tokens in order. Each query sees the tokens up to its own position.

    q         (r, g, b, d)  the queries; if the spec has a rotation they are rotated, as the held keys are
    made      (r, b)        True where a query was given; the other entries of q are arbitrary
    position  (r, b)        position of the token that each query came with
    bare      (r, g, b, d)  the queries before the rotation; None if the spec has no rotation
    given     (r, b)        `made` on the host, where reading it never waits for a device
    """

    q: Tensor
    made: Tensor
    position: Tensor
    bare: Tensor | None = None
    given: Tensor = field(kw_only=True)

    @property
    def as_they_came(self) -> Tensor:
        """Return the queries (r, g, b, d) before rotation: the ones to store if they are read after later evictions.

        An eviction changes ranks, and so the angles that a stored query must be rotated by.
        """
        return self.q if self.bare is None else self.bare

    def last(self) -> tuple[Queries, Tensor]:
        """Return the last given query of each row, as `Queries` with b = 1, and that query's index (r, 1) in the block.

        The index is on the host. Every row must have at least one given query.
        """
        index = (self.given * torch.arange(1, self.given.shape[1] + 1)).amax(1, keepdim=True) - 1
        place = sent(index, self.q.device)
        r, g, _, d = self.q.shape
        q = self.q.gather(2, place.view(r, 1, 1, 1).expand(r, g, 1, d))
        bare = None if self.bare is None else self.bare.gather(2, place.view(r, 1, 1, 1).expand(r, g, 1, d))
        made, given = self.made.gather(1, place), self.given.gather(1, index)
        return Queries(q, made, self.position.gather(1, place), bare, given=given), index


class PolicyMemory(Memory, ABC):
    """Store what a policy remembers of each row beyond its numbers per slot (columns).

    All tensors have rows as first axis. `spec` has the sizes, dtype and constants of the state that this memory belongs
    to.
    """

    spec: Spec

    def group(self, g: int) -> None:
        """Allocate all tensors that depend on g, the number of queries per token and kv head (GQA group).

        Called once, before the first query.
        """

    def on_keys(self, rows: Tensor, k: Tensor, position: Tensor, live: Tensor) -> None:
        """Update the memory with the keys k (r, b, d) of the newest b tokens of the rows `rows` (r,), oldest first.

        position (r, b) is each token's index in its stream; live (r, b) is False where a row has no such token. Called
        at block ends and at the seal (end of the prompt) if the policy `wants_keys`; b is the block's length. Tokens of
        an earlier call may be given again.
        """

    def seal(self) -> None:
        """Update the memory at the end of the prompt, after the evictions that are made there."""

    def require_fitting(self, fields: dict[str, Any], g: int | None, sealed: bool) -> None:
        """Raise ValueError if this memory's saved `fields` do not fit a GQA group of g queries per kv head.

        g None: no query came yet. sealed: True if the saved state had reached the end of the prompt.
        """


class Policy(ABC):
    """Define an eviction rule: the held token of lowest priority is evicted first, of equal ones the older one.

    Subclasses are frozen dataclasses: the rule's configuration.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    wants_weights: ClassVar[bool] = False  # True: `on_weights` gets the attention that held tokens receive
    weights_of: ClassVar[Literal["all", "last"]] = "all"  # the queries of a block whose attention `on_weights` gets
    newest_queries: int | None = None  # newest queries of a dense prompt that `on_queries` needs; None: all
    wants_keys: ClassVar[bool] = False  # True: the memory's `on_keys` gets every key
    wants_rotation: ClassVar[bool] = False  # True: a model's cache looks for the rotation of its keys (`Spec.applied`)
    weighs_values: ClassVar[bool] = False  # True: evictions depend on values, so answers are not linear in values
    columns: ClassVar[dict[str, torch.dtype]] = {}  # numbers kept per slot, zero for a new token

    @property
    def usual_prefill(self) -> Literal["stream", "dense"]:
        """Return when this policy evicts tokens of the prompt: block by block ("stream") or only at its end ("dense").

        The argument `prefill` of `Bounded` overrides this.
        """
        return "stream"

    @property
    def spares(self) -> Literal["nothing", "prompt", "answer"]:
        """Return the part of the stream that is kept whole and not counted in the budget.

        "nothing": no tokens; "prompt": all tokens before the seal (end of the prompt); "answer": all tokens after it.
        """
        return "nothing"

    def protected_first(self) -> int:
        """Return the number of first tokens of a row that are never evicted."""
        return 0

    def protected_last(self, budget: int) -> int:
        """Return the number of newest tokens of a row that are never evicted under this budget."""
        del budget
        return 0

    def protected(self, held: Held, last: Tensor) -> Tensor:
        """Return a mask (r, s), True for slots with a protected token, which is never evicted.

        Protected are a row's first `protected_first` tokens and its last[r] newest tokens. last (r, 1) is the number
        that `protected_last` returns for the row's budget.
        """
        return (held.position < self.protected_first()) | (held.position >= held.seen - last)

    def open(self, spec: Spec, shared: dict[str, Tensor]) -> PolicyMemory | None:
        """Return the policy's empty memory for the rows of `spec`, or None if it keeps only columns (numbers per slot).

        shared: tensors, by name, that are fixed by method and spec alone; those that the policy's method `shared`
        returns are among them.
        """
        del spec, shared
        return None

    def shared(self, spec: Spec) -> dict[str, Tensor]:
        """Return the tensors, by name, that are fixed by policy and spec alone, such as a random projection.

        They do not depend on the stream, so they do not count as memory.
        """
        del spec
        return {}

    @abstractmethod
    def priority(self, held: Held) -> Tensor:
        """Return the priority (r, s) of each slot's token: the token of lowest priority is evicted first."""

    def wants_queries(self, sealed: bool) -> bool:
        """Return True if the policy learns from queries, so that `on_queries` must be given those of each block.

        sealed: False asks about the queries of the prompt, True about those after it.
        """
        del sealed
        return False

    def on_queries(self, held: Held, queries: Queries) -> dict[str, Tensor]:
        """Return new values of the policy's columns, column name -> (r, s), given the queries of a block.

        A policy may also store the queries in its memory `held.memory`, at the rows `held.rows`.
        """
        del held, queries
        return {}

    def on_weights(self, held: Held, weights: Tensor, queries: Queries) -> dict[str, Tensor]:
        """Return new values of the policy's columns, column name -> (r, s), given a block's attention weights.

        weights (r, g, b, s) are the softmax weights of the block's queries over the held tokens; the weights of a query
        that was not given are 0. A call may pass only some of the slots, in both `held` and `weights`; further calls
        pass the others. So a slot's new numbers may depend on the weights of that slot only.
        """
        del held, weights, queries
        return {}


@dataclass(frozen=True)
class Guarded(Policy):
    """Define a policy that protects the first tokens (attention sinks) and the newest tokens of each row from eviction.

    sinks   number of first tokens that are never evicted; trained models give these much attention
    recent  number of newest tokens that are never evicted; None: 16, or a quarter of a budget below 64
    Subclasses add the rule for the other tokens. With sinks=0, recent=0, and an eviction after every token (`block` of
    `Bounded` = 1), a subclass follows the rule of its paper.
    """

    sinks: int = 4
    recent: int | None = None

    def __post_init__(self) -> None:
        count(self.name, sinks=self.sinks, **({} if self.recent is None else {"recent": self.recent}))

    def protected_first(self) -> int:
        return self.sinks

    def protected_last(self, budget: int) -> int:
        return min(GRACE_TOKENS, budget // 4) if self.recent is None else self.recent
