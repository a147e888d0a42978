"""Cache an image that is made from coarse to fine, one scale of tokens at a time (visual autoregression).

Scale k is a map of h_k x h_k tokens. Its queries attend to all earlier scales and their own scale (block-wise
causal). The earlier scales are in a KV cache, which any method of this library may compress. The definition is that of
Cao, Li, Ke, Liang, Shi and Song 2025 (arXiv 2503.14881).
A side is the number h_k of tokens along an edge of scale k's map. The first, small scales are the coarse ones. A row is
one (batch item, kv head) stream; in shapes, t are tokens of one scale, g query heads per kv head, d and dv the widths
of a key and a value. A `State` is the compressed cache that a method keeps of the tokens; to pin a token is to forbid
the method to evict it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from kvfloor.core.bounded import BoundedState
from kvfloor.core.broken import broken_state
from kvfloor.core.partial import Partial
from kvfloor.core.state import State
from kvfloor.validation import whole, within


def tokens_in(sides: Sequence[int]) -> int:
    """Return the number of tokens of an image whose scales are square maps with these sides: the sum of side^2."""
    return sum(whole("side", side) ** 2 for side in sides)


def scale_budgets(sides: Sequence[int], total: int, share: float = 0.5) -> list[int]:
    """Return the number of tokens to keep of each scale under a budget of `total` tokens per row.

    sides are the sides of the scales' square maps, coarse first. Coarse scales are kept whole: as many of the first
    scales as fit together into the share `share`, from 0 to 1, of the budget. The budget that they leave is divided
    among the other scales in proportion to their numbers of tokens, rounded down. The few tokens that rounding leaves
    over go one each to the finest scales. A budget of as many tokens as the image has, or more, keeps all.
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
    """Pin the tokens of an image's coarse scales against eviction, and return the number of pinned scales.

    sides are the sides of the scales' square maps, coarse first. The coarse scales are as many of the first scales as
    fit together into the share `share`, from 0 to 1, of the state's budget (the smallest one, if rows have different
    budgets). Only tokens of the finer scales can then be evicted, as the eviction policy chooses; random eviction (the
    policy `random`) keeps the same fraction of each finer scale, in expectation. Raises ValueError for a state that
    cannot pin tokens, that has seen tokens, or whose policy protects so many other tokens that the coarse scales do not
    fit.
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
    """Return the number of coarse scales: as many of the first ones as fit together into `share` * `total` tokens.

    sizes are the scales' numbers of tokens, coarse first; total is the budget in tokens per row, share from 0 to 1.
    """
    return sum(taken <= share * total for taken in accumulate(sizes))


class NextScale:
    """Feed the scales of an image to a state (a method's compressed cache), one at a time, and compute their attention.

    The queries of a scale attend to the tokens that the state holds and to all tokens of the scale itself, whatever the
    budget. Only afterwards does the state evict tokens, those of this scale included. So during the call of `step` all
    keys and values of the new scale are in memory, as in any forward pass.
    """

    def __init__(self, state: State) -> None:
        self.state = state
        self._underway = False  # stays True after a step that failed between two calls of the state

    def step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Append a scale's tokens k (rows, t, d), v (rows, t, dv) and return attention (rows, g, t, dv) of its queries.

        q (rows, g, t, d) are the queries; all of them see all t tokens of the scale. An eviction policy that learns
        from queries learns from these. Raises TypeError or ValueError for keys and values that the state cannot append;
        the state is then unchanged.
        """
        spec = self.state.spec
        if q.ndim != 4:
            raise ValueError(f"q must have shape (rows={spec.rows}, g, t, {spec.d}), got {tuple(q.shape)}")
        rows, g, t, d = q.shape
        if k.ndim != 3 or v.ndim != 3 or k.shape[1] != t or v.shape[1] != t:
            raise ValueError(
                f"a scale of {t} queries needs as many keys and values, got {k.shape[1:]} and {v.shape[1:]}"
            )
        if self._underway:
            raise broken_state("a scale's step")
        flat = q.reshape(rows, g * t, d)
        past = self.state.read(flat)
        before = self.state.seen
        self._underway = True
        try:
            self.state.append(k, v)
        except (TypeError, ValueError):
            self._underway = self.state.seen is not before  # else its input was refused
            raise
        if self._watches:
            self.state.attend(q)
        out = past.merge(Partial.over(flat, k, v, spec)).mean.view(rows, g, t, spec.dv).to(spec.dtype)
        self._underway = False
        return out

    @property
    def _watches(self) -> bool:
        return isinstance(self.state, BoundedState) and self.state.learns_from_queries


def scale_by_scale(sides: Sequence[int], x: Tensor) -> list[Tensor]:
    """Split the tokens x (..., t, width) of all scales of an image into a list of one tensor per scale.

    sides are the sides of the scales' square maps, coarse first, as the tokens are. Raises ValueError unless t is the
    number of tokens of all scales.
    """
    sizes = [side**2 for side in sides]
    if sum(sizes) != x.shape[-2]:
        raise ValueError(f"scales {tuple(sides)} have {sum(sizes)} tokens, got {x.shape[-2]}")
    return list(torch.split(x, sizes, dim=-2))
