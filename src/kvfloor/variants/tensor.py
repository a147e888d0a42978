"""Tensor attention: every pair of tokens is a key and a value; a token brings two of each.

    score(j1, j2) = scale * sum_l q_l K1[j1, l] K2[j2, l]         value(j1, j2) = V1[j1] * V2[j2], entry by entry
    answer(q)     = softmax over all n^2 pairs of the scores, applied to the values

Law: Alman and Song 2023 (arXiv 2310.04064), D^-1 exp(Q (K1 (x) K2)^T) (V1 (x) V2) with (x) the column-wise Kronecker
(Khatri-Rao) product. With K2 = V2 = 1 it is standard attention on (K1, V1).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from kvfloor.bounded import Bounded
from kvfloor.budget import Budget
from kvfloor.exact import Exact
from kvfloor.method import Method, Spec, Traits
from kvfloor.partial import Partial
from kvfloor.registry import parse
from kvfloor.selectors.everything import Everything
from kvfloor.slots import Slots
from kvfloor.state import State
from kvfloor.summaries.drop import Drop

_LOGITS_AT_ONCE = 2**22


@dataclass(frozen=True)
class TensorAttention(Method):
    """Tensor attention over the tokens that `store` keeps: exact with the exact store, else over the kept pairs.

    store   a method that keeps whole tokens: exact, or an eviction policy that drops the rest. It is given each
            token's two keys side by side (width 2d), two values likewise (2dv), and never sees a query.
    A state takes k (rows, t, 2d) = [k1, k2] and v (rows, t, 2dv) = [v1, v2], queries of width d, and answers with
    width dv. The n^2 products are never held: 2n(d + dv) numbers at rest, a block of pairs at a time in `read`.
    Raises ValueError for a store that does not keep whole tokens.
    """

    name: ClassVar[str] = "tensor"
    paper: ClassVar[str] = "Alman and Song 2023 (arXiv 2310.04064)"
    store: Method | str = field(default_factory=Exact)

    def __post_init__(self) -> None:
        store = parse(self.store) if isinstance(self.store, str) else self.store
        object.__setattr__(self, "store", store)
        keeps = isinstance(store, Exact) or (isinstance(store, Bounded) and isinstance(store.summary, Drop))
        if not keeps or not isinstance(getattr(store, "selector", None), Everything):
            raise ValueError(
                f"tensor: the store must keep whole tokens and read them all (exact, or an eviction policy such as "
                f"window@64), got {store}"
            )

    @property
    def kept(self) -> Method:
        """The store, as a method."""
        assert isinstance(self.store, Method)
        return self.store

    @property
    def budget(self) -> Budget | None:
        return getattr(self.kept, "budget", None)

    @property
    def traits(self) -> Traits:
        return Traits(
            reference="tensor", normalised=False, value_linear=False,
            constant_memory=self.kept.traits.constant_memory,
        )  # fmt: skip

    def open(self, spec: Spec) -> TensorState:
        return TensorState(self, spec)

    def capacity(self, n: int, prompt: int | None = None, pinned: int = 0) -> int | None:
        return self.kept.capacity(n, prompt, pinned)

    def with_budget(self, budget: Budget) -> TensorAttention | None:
        store = self.kept.with_budget(budget)
        return None if store is None else replace(self, store=store)

    def __str__(self) -> str:
        text, at, budget = str(self.kept).partition("@")
        text = repr(text) if ":" in text else text  # module:Class is no word
        name = "tensor" if text == "exact" else f"tensor(store={text})"
        return f"{name}@{budget}" if at else name


class TensorState(State):
    """The store's state on pairs side by side; reading runs over pairs in blocks."""

    def __init__(self, method: TensorAttention, spec: Spec) -> None:
        super().__init__(method, spec)
        self.store = method.kept.open(replace(spec, d=2 * spec.d, dv=2 * spec.dv))

    @property
    def key_width(self) -> int:
        return 2 * self.spec.d

    @property
    def value_width(self) -> int:
        return 2 * self.spec.dv

    @property
    def held(self) -> Tensor:
        return self.store.held

    def select_rows(self, index: Tensor) -> None:
        super().select_rows(index)
        assert isinstance(self.method, TensorAttention)
        self.method = replace(self.method, store=self.store.method)  # budgets per row travel with their rows

    def _append(self, k: Tensor, v: Tensor, take: Tensor) -> None:
        self.store._append(k, v, take)
        self.seen = self.seen + take

    def _seal(self) -> None:
        self.store.seal()

    def _read(self, q: Tensor) -> Partial:
        slots: Slots = self.store.slots  # type: ignore[attr-defined]
        view = slots.view()
        k1, k2 = view.k.chunk(2, dim=-1)
        v1, v2 = view.v.chunk(2, dim=-1)
        (rows, m, _), s = q.shape, view.k.shape[1]
        part = Partial.empty(rows, m, dv=self.spec.dv, dtype=self.spec.compute_dtype, device=q.device)
        hide = None if view.live is None else ~view.live.unsqueeze(1)
        at_once = max(1, _LOGITS_AT_ONCE // max(1, rows * m * s))
        for start in range(0, s, at_once):
            chosen = slice(start, start + at_once)
            dead = None if view.live is None else ~view.live[:, chosen]
            part = part.merge(self._pairs(q, k1[:, chosen], v1[:, chosen], k2, v2, hide, dead))
        return part

    def _pairs(
        self, q: Tensor, k1: Tensor, v1: Tensor, k2: Tensor, v2: Tensor, hide: Tensor | None, dead: Tensor | None
    ) -> Partial:
        """Attention over all pairs of the first keys k1 (rows, b, d) and the second keys k2 (rows, s, d).

        For a fixed first token it is standard attention of the query q * k1[j1] over the second tokens; the first
        tokens are then weighed by the masses of those.
        """
        rows, m, d = q.shape
        dtype = self.spec.compute_dtype
        turned = (q.to(dtype).unsqueeze(2) * k1.to(dtype).unsqueeze(1)).reshape(rows, -1, d)
        second = Partial.over(turned, k2.to(dtype), v2.to(dtype), self.spec, hide=hide)
        mass = second.log_mass.view(rows, m, -1)
        if dead is not None:
            mass = mass.masked_fill(dead.unsqueeze(1), -torch.inf)
        top = mass.logsumexp(-1)
        weight = torch.exp(mass - top.nan_to_num(neginf=0.0).unsqueeze(-1))
        values = v1.to(dtype).unsqueeze(1) * second.mean.view(rows, m, -1, v1.shape[-1])
        return Partial((weight.unsqueeze(-1) * values).sum(2), top)


def products(x1: Tensor, x2: Tensor) -> Tensor:
    """The explicit definition: all n^2 entrywise products (rows, n^2, width) of x1, x2 (rows, n, width), x1-major."""
    return (x1.unsqueeze(2) * x2.unsqueeze(1)).flatten(1, 2)
