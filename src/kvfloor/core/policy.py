"""Define the interface of an eviction policy, which `Bounded` calls."""

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
    """Hold all that a policy may read about r rows of s slots. Slots without a token have arbitrary numbers.

    position  (r, s)  arrival index of each slot's token    seen   (r, 1)  tokens of the row so far
    columns   (r, s)  the policy's own numbers per slot     count  (r, 1)  slots 0 .. count - 1 hold a token
    row_ids   (r,)    row identities, which key randomness  budget (r, 1)  tokens per row
    rows      (r,)    indices of the rows in the state; None: all rows
    prompt    (r, 1)  tokens before the seal, -1 until then; None unless the policy spares a part of the stream
    memory    the policy's memory of all rows               shared  tensors fixed by (policy, spec) alone
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
        """Return the keys (r, s, d) that queries read.

        They are fetched on access. They are copied only where rows are ragged or not all of the state's.
        """
        return self.fetch("k")

    @property
    def v(self) -> Tensor:
        """Return the values (r, s, dv). They are fetched on access, as `k` is."""
        return self.fetch("v")

    @property
    def live(self) -> Tensor:
        """Return True for each slot that holds a token, (r, s)."""
        return torch.arange(self.position.shape[1], device=self.count.device) < self.count

    def turned(self, q: Tensor, position: Tensor) -> Tensor:
        """Rotate unrotated queries q (r, g, b, d) to the places that their tokens of position (r, b) have now.

        Correct only for tokens behind which no token was evicted, such as the newest tokens, which are never evicted.
        """
        rotation = self.spec.rotation
        if rotation is None:
            return q
        place = (self.count - self.seen + position).clamp_min(0)
        return rotation.turned(q, rotation.circle(place.unsqueeze(1), self.spec.compute_dtype))

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
    """Hold the queries of one block in order. Each query sees the tokens up to its own position.

    q         (r, g, b, d)  the queries; under a rotation they are rotated to their places, as the held keys are
    made      (r, b)        True where a query was really given
    position  (r, b)        position of the token that each query came with
    bare      (r, g, b, d)  the queries before the rotation; None without one
    """

    q: Tensor
    made: Tensor
    position: Tensor
    bare: Tensor | None = None

    @property
    def as_they_came(self) -> Tensor:
        """Return the queries (r, g, b, d) before rotation, for a memory that outlives the tokens' present places."""
        return self.q if self.bare is None else self.bare

    def last(self) -> tuple[Queries, Tensor]:
        """Return the last query that each row made, and its index (r, 1) in the block. Every row must have made one."""
        order = torch.arange(1, self.made.shape[1] + 1, device=self.made.device)
        place = (self.made * order).amax(1, keepdim=True) - 1
        r, g, _, d = self.q.shape
        q = self.q.gather(2, place.view(r, 1, 1, 1).expand(r, g, 1, d))
        bare = None if self.bare is None else self.bare.gather(2, place.view(r, 1, 1, 1).expand(r, g, 1, d))
        return Queries(q, self.made.gather(1, place), self.position.gather(1, place), bare), place


class PolicyMemory(Memory, ABC):
    """Store a policy's memory of each row beside its columns, as tensors with rows as first axis.

    `spec` is the spec of the state that this memory belongs to.
    """

    spec: Spec

    def group(self, g: int) -> None:
        """Allocate all tensors that depend on g, the queries per token of a GQA group.

        Called once, before the first query.
        """

    def on_keys(self, rows: Tensor, k: Tensor, position: Tensor, live: Tensor) -> None:
        """Take in the newest tokens of `rows` (r,) in order: k (r, b, d), position and live (r, b).

        Called at block ends and at the seal if the policy `wants_keys`; b is the block's length.
        Tokens that an earlier call gave may be among them.
        """

    def seal(self) -> None:
        """Handle the end of the prompt, after the evictions that it causes."""

    def require_fitting(self, fields: dict[str, Any], g: int | None, sealed: bool) -> None:
        """Raise ValueError where a message's fields do not fit a GQA group of g queries (None: no query came yet)."""


class Policy(ABC):
    """Define an eviction rule. The token of lowest priority is evicted first; of equal ones the older.

    Subclasses are frozen dataclasses: the rule's configuration.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    wants_weights: ClassVar[bool] = False  # True: `on_weights` gets the attention that held tokens receive
    weights_of: ClassVar[Literal["all", "last"]] = "all"  # the queries of a block whose attention `on_weights` gets
    newest_queries: int | None = None  # newest queries of a dense prompt that `on_queries` needs; None: all
    wants_keys: ClassVar[bool] = False  # True: the memory's `on_keys` gets every key
    weighs_values: ClassVar[bool] = False  # True: evictions depend on values, so answers are not linear in values
    columns: ClassVar[dict[str, torch.dtype]] = {}  # numbers kept per slot, zero for a new token

    @property
    def usual_prefill(self) -> Literal["stream", "dense"]:
        """Return the `prefill` of a method that is given none."""
        return "stream"

    @property
    def spares(self) -> Literal["nothing", "prompt", "answer"]:
        """Return the part of the stream kept beside the budget: the tokens before the seal, or those after it."""
        return "nothing"

    def protected_first(self) -> int:
        """Return the number of first tokens of a row that are never evicted."""
        return 0

    def protected_last(self, budget: int) -> int:
        """Return the number of newest tokens of a row that are never evicted under this budget."""
        del budget
        return 0

    def protected(self, held: Held, last: Tensor) -> Tensor:
        """Return True for each slot (r, s) that is never evicted; last (r, 1) is `protected_last` of each row."""
        return (held.position < self.protected_first()) | (held.position >= held.seen - last)

    def open(self, spec: Spec, shared: dict[str, Tensor]) -> PolicyMemory | None:
        """Return empty memory, or None if columns are all it keeps; `shared` has the tensors of `Policy.shared`."""
        del spec, shared
        return None

    def shared(self, spec: Spec) -> dict[str, Tensor]:
        """Return the policy's public tensors, which are fixed by (policy, spec) alone."""
        del spec
        return {}

    @abstractmethod
    def priority(self, held: Held) -> Tensor:
        """Return one number per slot (r, s): the slot with the smallest is evicted first."""

    def wants_queries(self, sealed: bool) -> bool:
        """Return True if `on_queries` needs the queries of each block, before or after the seal."""
        del sealed
        return False

    def on_queries(self, held: Held, queries: Queries) -> dict[str, Tensor]:
        """Return new columns, given a block's queries. The queries may also enter `held.memory`, at `held.rows`."""
        del held, queries
        return {}

    def on_weights(self, held: Held, weights: Tensor, queries: Queries) -> dict[str, Tensor]:
        """Return new columns, given the softmax weights (r, g, b, s) of a block's queries over the held tokens.

        A query that was not made has weight zero everywhere. `held` may be one of several tiles of slots: a
        slot's numbers may depend on its own weights only.
        """
        del held, weights, queries
        return {}


@dataclass(frozen=True)
class Guarded(Policy):
    """Protect the first tokens (attention sinks) and the newest tokens of each row from eviction.

    sinks   first tokens that are never evicted; models park attention there
    recent  newest tokens that are never evicted; if not given, 16, or a quarter of a budget below 64
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
