"""Define evicting caches as the papers write them: one row, token by token, in plain loops. Slow, but easy to read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from kvfloor import Bounded, Spec
from kvfloor.core.policy import Policy
from tests.support import positions


@dataclass
class Token:
    """Hold one token that the row still keeps; `marks` are a rule's own notes on it."""

    position: int
    k: Tensor
    v: Tensor
    marks: dict[str, Any] = field(default_factory=dict)


class Rule:
    """Define a paper's eviction rule: how a query marks the held tokens, and which of them is worth least."""

    def __init__(self, scale: float, sinks: int = 0, recent: int = 0) -> None:
        self.scale, self.sinks, self.recent = scale, sinks, recent
        self.prompt = 0

    def ask(self, held: list[Token], position: int, q: Tensor) -> None:
        """Mark the held tokens by the query q (g, d) of the token at `position`, which attends to all of `held`."""

    def worth(self, held: list[Token], seen: int, budget: int) -> list[float]:
        """Return one number per held token; the token with the smallest is evicted first."""
        raise NotImplementedError

    def safe(self, token: Token, seen: int) -> bool:
        return token.position < self.sinks or token.position >= seen - self.recent

    def meeting(self, held: list[Token], q: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys (held, d) and the newest token's queries (g, d) as they enter their products."""
        return torch.stack([token.k for token in held]), q

    def weights(self, held: list[Token], q: Tensor) -> Tensor:
        """Return the softmax weights (g, held) of the query's heads on the held tokens."""
        keys, q = self.meeting(held, q)
        return torch.softmax(torch.stack([torch.stack([h @ k for k in keys]) for h in q]) * self.scale, 1)


def kept_by(
    rule: Rule,
    budget: int,
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    block: int = 1,
    prompt: int | None = None,
    asked: set[int] | None = None,
    spares: str = "nothing",
    answers: list[Tensor] | None = None,
) -> list[int]:
    """Return the positions that one row holds at the end of a stream: q (g, n, d), k (n, d), v (n, dv).

    prompt  number of first tokens that are all kept until the prompt ends, and evicted from there; None: no prompt
    asked   positions whose query is given to the rule; None: all positions
    spares  "answer": nothing is evicted after the prompt; "prompt": no token of the prompt is evicted, and the budget
            is for the others
    """
    held: list[Token] = []

    def evict(seen: int) -> None:
        room = budget + (rule.prompt if spares == "prompt" else 0)
        if len(held) <= room:
            return
        worth = dict(zip((t.position for t in held), rule.worth(held, seen, budget), strict=True))
        free = [t for t in held if not rule.safe(t, seen) and not (spares == "prompt" and t.position < rule.prompt)]
        leaving = sorted(free, key=lambda t: (worth[t.position], t.position))[: len(held) - room]
        for token in leaving:
            held.remove(token)

    for i in range(len(k)):
        held.append(Token(i, k[i], v[i]))
        if q is not None and (asked is None or i in asked):
            rule.ask(held, i, q[:, i])
            if answers is not None:
                answers.append(rule.weights(held, q[:, i]) @ torch.stack([token.v for token in held]))
        answer = prompt is not None and i >= prompt
        if (i + 1) % block == 0 and (prompt is None or (answer and spares != "answer")):
            evict(i + 1)
        if prompt is not None and i + 1 == prompt:
            rule.prompt = prompt
            if spares != "prompt":
                evict(i + 1)
    return sorted(t.position for t in held)


def run(
    policy: Policy,
    budget: int | tuple[int, ...],
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    scale: float = 0.5,
    block: int = 1,
    prompt: int | None = None,
    cuts: tuple[int, ...] = (),
    seed: int = 0,
    **options: Any,
) -> Any:
    """Return the state of `policy` after this stream: q (rows, g, n, d), k (rows, n, d), v (rows, n, dv)."""
    method = Bounded(policy, budget=budget, block=block, **options)
    spec = Spec(len(k), k.shape[2], v.shape[2], scale=scale, dtype=k.dtype, seed=seed)
    state = method.open(spec)
    edges = sorted({0, k.shape[1], *cuts, *(() if prompt is None else (prompt,))})
    for a, b in pairwise(edges):
        if q is None:
            state.append(k[:, a:b], v[:, a:b])
        else:
            state.step(q[:, :, a:b], k[:, a:b], v[:, a:b])
        if b == prompt:
            state.seal()
    return state


def keeps_alike(
    policy: Policy,
    rule: Callable[[int, int], Rule],
    tokens: tuple[Tensor | None, Tensor, Tensor],
    budget: int | tuple[int, ...] = 12,
    block: int = 1,
    prompt: int | None = None,
    spares: str = "nothing",
    **how: Any,
) -> bool:
    """Return True if `policy` keeps in every row exactly what the rule of rule(row, budget) keeps."""
    q, k, v = tokens
    budgets = budget if isinstance(budget, tuple) else (budget,) * len(k)
    found = positions(run(policy, budget, q, k, v, block=block, prompt=prompt, **how))
    wanted = []
    for row, b in enumerate(budgets):
        asked = None if q is None else q[row]
        wanted.append(kept_by(rule(row, b), b, asked, k[row], v[row], block, prompt, spares=spares))
    return found == wanted
