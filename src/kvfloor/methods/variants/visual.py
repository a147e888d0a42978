"""Visual autoregression: an image is predicted scale by scale, a whole scale of queries at once.

Scale k is a map of h_k x h_k tokens. Its queries see all earlier scales and all of their own (block-wise causal), and
any Method keeps the past. Law and setting: Cao, Li, Ke, Liang, Shi and Song 2025 (arXiv 2503.14881).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from kvfloor.core.bounded import BoundedState
from kvfloor.core.partial import Partial
from kvfloor.core.state import State
from kvfloor.validation import whole, within


def tokens_in(sides: Sequence[int]) -> int:
    """Tokens of a pyramid with maps of these sides: the sum of their squares."""
    return sum(whole("side", side) ** 2 for side in sides)


def scale_budgets(sides: Sequence[int], total: int, share: float = 0.5) -> list[int]:
    """Tokens of each scale to keep under a budget of `total`: coarse scales whole, the finer ones in proportion.

    Scales count as coarse, in order, while all of them take at most `share` of the budget; what is left goes to the
    others by their tokens, rounded down, and the odd ones one each from the finest on. A budget with room for all keeps
    all.
    """
    total = whole("total", total)
    share = within("share", share, 0.0, 1.0)
    sizes = [whole("side", side) ** 2 for side in sides]
    if sum(sizes) <= total:
        return sizes
    coarse = _coarse(sizes, total, share)
    left, rest = total - sum(sizes[:coarse]), sum(sizes[coarse:])
    budgets = sizes[:coarse] + [left * size // rest for size in sizes[coarse:]]
    for i in range(total - sum(budgets)):
        budgets[-1 - i] += 1
    return budgets


def keep_coarse(state: State, sides: Sequence[int], share: float = 0.5) -> int:
    """Pin the coarse scales of a pyramid that is yet to come: none of their tokens leaves. Returns how many scales.

    They are those that `scale_budgets` keeps whole under the state's (smallest) budget; which tokens of the finer
    scales stay is the policy's choice, and for `random` their `scale_budgets` are what stays in expectation. Raises
    ValueError for a state that cannot pin, has seen tokens, or whose policy protects too much besides.
    """
    if not isinstance(state, BoundedState):
        raise ValueError(f"{state.method} has no budget to share out over scales: give an eviction policy")
    if bool(state.seen.any()):
        raise ValueError("coarse scales are pinned before the first token, this state has seen some")
    sizes = [whole("side", side) ** 2 for side in sides]
    coarse = _coarse(sizes, int(state.budget.min()), within("share", share, 0.0, 1.0))
    if coarse:
        state.pin(0, sum(sizes[:coarse]))
    return coarse


def _coarse(sizes: Sequence[int], total: int, share: float) -> int:
    """How many of the first scales together take at most `share` of the budget."""
    return sum(taken <= share * total for taken in accumulate(sizes))


class NextScale:
    """A state of any method, driven a scale at a time.

    `step` answers a scale from the remembered past and from the scale itself, and only then lets the state take the
    scale in: every token is readable by its own scale, whatever the budget. The new scale's tokens are alive during
    the call only, as the tokens of any forward pass are.
    """

    def __init__(self, state: State) -> None:
        self.state = state

    def step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Answers (rows, g, t, dv) to the scale's queries q (rows, g, t, d) with its tokens k, v (rows, t, ...).

        A policy that watches attention sees these queries ask the past. Raises what `State.append` raises, with the
        state as it was.
        """
        spec = self.state.spec
        if q.ndim != 4:
            raise ValueError(f"q must have shape (rows={spec.rows}, g, t, {spec.d}), got {tuple(q.shape)}")
        rows, g, t, d = q.shape
        if k.ndim != 3 or v.ndim != 3 or k.shape[1] != t or v.shape[1] != t:
            raise ValueError(
                f"a scale of {t} queries needs as many keys and values, got {k.shape[1:]} and {v.shape[1:]}"
            )
        flat = q.reshape(rows, g * t, d)
        past = self.state.read(flat)
        self.state.append(k, v)
        if self._watches:
            self.state.attend(q)
        return past.merge(Partial.over(flat, k, v, spec)).mean.view(rows, g, t, spec.dv).to(spec.dtype)

    @property
    def _watches(self) -> bool:
        return isinstance(self.state, BoundedState) and self.state.learns_from_queries


def scale_by_scale(sides: Sequence[int], x: Tensor) -> list[Tensor]:
    """Cut tokens (..., t, width) of a whole pyramid into its scales; ValueError unless t is `tokens_in(sides)`."""
    sizes = [side**2 for side in sides]
    if sum(sizes) != x.shape[-2]:
        raise ValueError(f"scales {tuple(sides)} have {sum(sizes)} tokens, got {x.shape[-2]}")
    return list(torch.split(x, sizes, dim=-2))
