"""Keep the prompt tokens that the last queries of the prompt attended to (SnapKV).

In this file a row is one (batch item, kv head) stream, and a slot the place of one held token. The seal is the end of
the prompt. The window is the last `window` tokens of the prompt, whose queries vote: a token's vote is the attention
weight that it receives from these queries. In shapes, r are rows, s slots, w queries of the window, g query heads per
kv head, d the width of a key. `Held` is what a policy may read about the held tokens of a call's rows, among it their
keys and positions. A state is the memory of a method; a `Spec` has its sizes and constants.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from kvfloor.core.device import sent
from kvfloor.core.fields import MOST, Field
from kvfloor.core.policy import Held, Policy, PolicyMemory, Queries
from kvfloor.core.rowwise import total
from kvfloor.core.spec import Spec
from kvfloor.core.tiles import weights_by_tile
from kvfloor.validation import count, literals


@dataclass(frozen=True)
class Observation(Policy):
    """Evict the tokens that receive the least attention from the last queries of the prompt.

    Law (Li et al. 2024, SnapKV): the last `window` prompt queries vote once, at the seal (end of the prompt).
    vote(token) = sum over the window's queries of softmax(q . k) over all visible tokens. For each token outside the
    window, the votes at the `kernel` positions centred on the token are pooled, except those in the window. The pooled
    votes are averaged over the GQA group. The window's own tokens stay, and the tokens with the highest pooled votes,
    until the budget is used up.
    window   queries that vote, and newest tokens that stay: 32 (half of a budget below 64)
    kernel   positions that are pooled, an odd number; 1 pools nothing
    pool     "max" or "avg" of the votes of the held tokens around a token. In an average, each of the `kernel`
             positions without a vote counts as 0, as in the paper's code: positions outside the prompt, in the window,
             and of evicted tokens
    decode   "keep": tokens after the prompt are never evicted, so memory grows with the answer (all tokens after the
             prompt); "evict": each block of the answer is compressed like the prompt, by the last `window` queries so
             far
    sinks    first tokens that are never evicted; none by default, as in the paper
    By default nothing is evicted before the seal (`prefill=dense`); with `prefill=stream` each block of the prompt,
    i.e. the new tokens between two evictions, is compressed in turn. A prompt within the budget stays whole. Tokens
    appended without queries add no votes; without any vote the oldest tokens are evicted, as by the policy `window`.
    Votes are float32 whatever the cache's dtype, and are computed for one tile of keys at a time.
    """

    name: ClassVar[str] = "snapkv"
    paper: ClassVar[str] = "Li et al. 2024, SnapKV (arXiv 2404.14469)"

    window: int = 32
    kernel: int = 7
    pool: Literal["max", "avg"] = "max"
    decode: Literal["keep", "evict"] = "keep"
    sinks: int = 0

    def __post_init__(self) -> None:
        count("snapkv", least=1, window=self.window, kernel=self.kernel)
        count("snapkv", sinks=self.sinks)
        if self.kernel % 2 == 0:
            raise ValueError(f"snapkv: kernel must be odd, so that it has a middle, got {self.kernel}")
        literals(self)

    @property
    def usual_prefill(self) -> Literal["stream", "dense"]:
        return "dense"

    @property
    def spares(self) -> Literal["nothing", "prompt", "answer"]:
        return "answer" if self.decode == "keep" else "nothing"

    def protected_first(self) -> int:
        return self.sinks

    def protected_last(self, budget: int) -> int:
        return min(self.window, budget // 2)

    def open(self, spec: Spec, shared: dict[str, Tensor]) -> LastQueries:
        del shared
        return LastQueries(spec, self.window, for_good=self.decode == "evict")

    @property
    def newest_queries(self) -> int:
        return self.window

    def wants_queries(self, sealed: bool) -> bool:
        return not sealed or self.decode == "evict"

    def on_queries(self, held: Held, queries: Queries) -> dict[str, Tensor]:
        held.memory.take(held.rows, queries)
        return {}

    def priority(self, held: Held) -> Tensor:
        memory: LastQueries = held.memory
        if memory.q is None:
            return torch.zeros(held.position.shape, device=held.position.device)
        rows = slice(None) if held.rows is None else sent(held.rows, memory.q.device)
        window = (held.budget // 2).clamp_max(self.window)
        q, position = memory.q[rows], memory.position[rows]
        place = torch.arange(self.window, 0, -1, device=position.device)
        position = position.masked_fill(place > window, -1)  # no visible token, so no vote
        votes = self._votes(held.turned(q, position), position, held)
        return total(self._pooled(votes, held, held.seen - window), 1) / votes.shape[1]

    def _votes(self, q: Tensor, position: Tensor, held: Held) -> Tensor:
        """Return the attention weight (r, g, s) that each slot receives, summed over the w queries q (r, g, w, d).

        position (r, w) is the position of each query's own token; a query sees the tokens up to that token.
        """
        r, g, w, d = q.shape
        k, hide = held.k, self._later(position, g, held)
        votes = torch.zeros(r, g, k.shape[1], dtype=held.spec.compute_dtype, device=k.device)
        law = (held.spec.scale, held.spec.softcap)
        fill = held.filled
        for at, weights in weights_by_tile(q.reshape(r, g * w, d), k, *law, hide, held=fill):
            votes[:, :, at] = total(weights.view(r, g, w, -1), 2)
        return votes

    @staticmethod
    def _later(position: Tensor, g: int, held: Held) -> Callable[[slice], Tensor]:
        live = held.live

        def hide(at: slice) -> Tensor:
            later = held.position[:, at].unsqueeze(1) > position.unsqueeze(-1)
            return (later | ~live[:, at].unsqueeze(1)).repeat(1, g, 1)

        return hide

    def _pooled(self, votes: Tensor, held: Held, stop: Tensor) -> Tensor:
        """Return the pooled votes (r, g, s): for each slot, the maximum or mean of its own and the nearby votes.

        Nearby votes are those of held tokens at most kernel // 2 positions away. Only tokens before position `stop`
        (r, 1) take part. A mean is the sum of these votes divided by `kernel`.
        """
        reach = self.kernel // 2
        voted = held.live & (held.position < stop)
        position = held.position.masked_fill(~voted, 1 << 62)
        position, order = position.sort(1)  # sorted, so that tokens close in position are close in this order
        votes = votes.gather(2, order.unsqueeze(1).expand_as(votes))
        pooled = votes
        for shift in range(1, min(reach, position.shape[1] - 1) + 1):
            close = (position[:, shift:] - position[:, :-shift] <= reach) & (position[:, shift:] < 1 << 62)
            for to, of in ((slice(shift, None), slice(None, -shift)), (slice(None, -shift), slice(shift, None))):
                joined = pooled.clone()
                if self.pool == "max":
                    joined[..., to] = torch.where(
                        close.unsqueeze(1), torch.maximum(pooled[..., to], votes[..., of]), pooled[..., to]
                    )
                else:
                    joined[..., to] += votes[..., of] * close.unsqueeze(1)
                pooled = joined
        if self.pool == "avg":
            pooled = pooled / self.kernel
        return torch.empty_like(pooled).scatter(2, order.unsqueeze(1).expand_as(pooled), pooled)


class LastQueries(PolicyMemory):
    """Hold the last `window` queries of each row, q (rows, g, window, d), the newest last, and their positions.

    position (rows, window) is the index in the stream of the token that each query came with; -1 for an entry without
    a query. The queries are held as given, before any rotation (RoPE) that the state itself applies.
    for_good   True: the queries are held after the seal (end of the prompt) too, because blocks of the answer are
               compressed like the prompt; False: they are dropped at the seal
    """

    def __init__(self, spec: Spec, window: int, for_good: bool) -> None:
        self.spec = spec
        self.window, self.for_good = window, for_good
        self.q: Tensor | None = None
        self.position = torch.full((spec.rows, window), -1, dtype=torch.int64, device=spec.device)

    def group(self, g: int) -> None:
        spec = self.spec
        self.q = torch.zeros(spec.rows, g, self.window, spec.d, dtype=spec.dtype, device=spec.device)

    def take(self, rows: Tensor | None, queries: Queries) -> None:
        assert self.q is not None
        mine = slice(None) if rows is None else sent(rows, self.q.device)
        q = torch.cat([self.q[mine], queries.as_they_came], 2)
        position = torch.cat([self.position[mine], queries.position.masked_fill(~queries.made, -1)], 1)
        newest = torch.argsort((position >= 0).to(torch.int8), dim=1, stable=True)[:, -self.window :]
        self.position[mine] = position.gather(1, newest)
        index = newest[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3])
        self.q[mine] = q.gather(2, index)

    def fields(self) -> dict[str, Any]:
        spec = self.spec
        q = Field(spec.dtype, (spec.rows, "g", self.window, spec.d), finite=True, optional=True)
        return {"q": q, "position": Field(torch.int64, (spec.rows, None), least=-1, most=MOST)}

    def require_fitting(self, fields: dict[str, Any], g: int | None, sealed: bool) -> None:
        given_up, q = sealed and not self.for_good, fields["q"]
        found, kept = None if q is None else q.shape[1], fields["position"].shape[1]
        if found != (None if given_up else g) or kept != (0 if given_up else self.window):
            raise ValueError(f"{kept} queries of a group of {found} are remembered, the group is {g}, sealed: {sealed}")

    def seal(self) -> None:
        if not self.for_good:
            self.q = None
            self.position = self.position[:, :0].clone()
