"""The policy's interface, declared for its caller `Bounded`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from kvfloor.core.memory import Memory
from kvfloor.core.spec import Spec
from kvfloor.validation import count

GRACE_TOKENS = 16


@dataclass(frozen=True)
class Held:
    """What a policy may look at, for r rows of s slots. Slots that hold no token have arbitrary numbers.

    position  (r, s)  when a slot's token came         seen   (r, 1)  tokens of the row so far
    columns   (r, s)  the policy's numbers per slot    count  (r, 1)  slots 0 .. count - 1 hold a token
    row_ids   (r,)    what randomness is keyed by      budget (r, 1)  tokens per row
    rows      (r,)    their places in the state; None: all of them
    prompt    (r, 1)  tokens before the seal, -1 until then; None unless the policy spares a part of the stream
    memory    what the policy remembers of all rows    shared  tensors fixed by (policy, spec) alone
    """

    position: Tensor
    columns: dict[str, Tensor]
    seen: Tensor
    row_ids: Tensor
    spec: Spec
    count: Tensor
    budget: Tensor
    fetch: Callable[[str], Tensor] = field(repr=False)
    rows: Tensor | None = None
    prompt: Tensor | None = None
    memory: Any = None
    shared: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def k(self) -> Tensor:
        """Keys (r, s, d), fetched when asked for; a copy only if rows are ragged or not all there."""
        return self.fetch("k")

    @property
    def v(self) -> Tensor:
        """Values (r, s, dv), as `k`."""
        return self.fetch("v")

    @property
    def live(self) -> Tensor:
        """Slots that hold a token (r, s)."""
        return torch.arange(self.position.shape[1], device=self.count.device) < self.count

    def part(self, at: slice) -> Held:
        """Return the view of the slots `at` only."""
        if at.start == 0 and at.stop == self.position.shape[1]:
            return self
        return replace(
            self,
            position=self.position[:, at],
            columns={name: column[:, at] for name, column in self.columns.items()},
            count=(self.count - at.start).clamp(0, at.stop - at.start),
            fetch=lambda name: self.fetch(name)[:, at],
        )


@dataclass(frozen=True)
class Queries:
    """The queries of one block, in order: each sees the tokens up to its own position.

    q (r, g, b, d); made (r, b) says which of them were really asked; position (r, b) of the token each came with.
    """

    q: Tensor
    made: Tensor
    position: Tensor

    def last(self) -> tuple[Queries, Tensor]:
        """The last query of each row that was made, and its place (r, 1) among all; every row has made one."""
        order = torch.arange(1, self.made.shape[1] + 1, device=self.made.device)
        place = (self.made * order).amax(1, keepdim=True) - 1
        r, g, _, d = self.q.shape
        q = self.q.gather(2, place.view(r, 1, 1, 1).expand(r, g, 1, d))
        return Queries(q, self.made.gather(1, place), self.position.gather(1, place)), place


class PolicyMemory(Memory, ABC):
    """What a policy remembers of each row beside its columns: tensors with rows as first axis. `spec` says for what."""

    spec: Spec

    def group(self, g: int) -> None:
        """The GQA group has g queries per token: allocate what depends on it. Called once, before the first query."""

    def on_keys(self, rows: Tensor, k: Tensor, position: Tensor, live: Tensor) -> None:
        """The last tokens of `rows` (r,) in order, those met before among them: k (r, b, d), position and live (r, b).

        Called at block ends and at the seal if the policy `wants_keys`; b is the block's length.
        """

    def seal(self) -> None:
        """The prompt is over, and what had to leave has left."""


class Policy(ABC):
    """Frozen configuration of an eviction rule. The lowest priority leaves first; ties let the older one go."""

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    wants_weights: ClassVar[bool] = False  # True: wants the attention that held tokens receive, in `on_weights`
    weights_of: ClassVar[Literal["all", "last"]] = "all"  # the queries of a block whose attention it wants to see
    newest_queries: int | None = None  # of a dense prompt's queries it wants only so many of the newest; None: all
    wants_keys: ClassVar[bool] = False  # True: its memory wants every key once, in `on_keys`
    weighs_values: ClassVar[bool] = False  # True: what leaves depends on values, so answers are not linear in them
    columns: ClassVar[dict[str, torch.dtype]] = {}  # numbers kept per slot, zero for a new token

    @property
    def usual_prefill(self) -> Literal["stream", "dense"]:
        """The `prefill` of a method that does not say."""
        return "stream"

    @property
    def spares(self) -> Literal["nothing", "prompt", "answer"]:
        """What is kept beside the budget: the tokens before the seal, or those after it."""
        return "nothing"

    def protected_first(self) -> int:
        """How many first tokens of a row never leave."""
        return 0

    def protected_last(self, budget: int) -> int:
        """How many newest tokens of a row never leave, under this budget."""
        del budget
        return 0

    def protected(self, held: Held, last: Tensor) -> Tensor:
        """Slots (r, s) that never leave, where last (r, 1) is what `protected_last` says of each row."""
        return (held.position < self.protected_first()) | (held.position >= held.seen - last)

    def open(self, spec: Spec, shared: dict[str, Tensor]) -> PolicyMemory | None:
        """Empty memory, or None if there is none beside the columns; `shared` has what `shared` gave."""
        del spec, shared
        return None

    def shared(self, spec: Spec) -> dict[str, Tensor]:
        """Public tensors, fixed by (policy, spec) alone."""
        del spec
        return {}

    @abstractmethod
    def priority(self, held: Held) -> Tensor:
        """One number per slot (r, s): the smallest leaves first."""

    def wants_queries(self, sealed: bool) -> bool:
        """Whether `on_queries` wants the queries of a block, before or after the seal."""
        del sealed
        return False

    def on_queries(self, held: Held, queries: Queries) -> dict[str, Tensor]:
        """New columns, given a block's queries; they may also enter `held.memory`, at `held.rows`."""
        del held, queries
        return {}

    def on_weights(self, held: Held, weights: Tensor, queries: Queries) -> dict[str, Tensor]:
        """New columns, given the softmax weights (r, g, b, s) over held tokens of a block's queries.

        A query that was not made has weight zero everywhere. `held` may be one of several tiles of slots: a
        slot's numbers may depend on its own weights only.
        """
        del held, weights, queries
        return {}


@dataclass(frozen=True)
class Guarded(Policy):
    """A policy that never gives up its first and its newest tokens.

    sinks   first tokens that never leave; models park attention there
    recent  newest tokens that never leave; 16, or a quarter of a smaller budget than 64, unless given
    The papers' plain rules are sinks=0, recent=0, block=1.
    """

    sinks: int = 4
    recent: int | None = None

    def __post_init__(self) -> None:
        count(self.name, sinks=self.sinks, **({} if self.recent is None else {"recent": self.recent}))

    def protected_first(self) -> int:
        return self.sinks

    def protected_last(self, budget: int) -> int:
        return min(GRACE_TOKENS, budget // 4) if self.recent is None else self.recent
