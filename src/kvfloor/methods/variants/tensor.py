"""Compute tensor attention, in which every pair of tokens forms one key and one value.

Each token j has two keys, K1[j] and K2[j], and two values, V1[j] and V2[j]:

    score(j1, j2) = scale * sum_l q_l K1[j1, l] K2[j2, l]         value(j1, j2) = V1[j1] * V2[j2], entry by entry
    answer(q)     = softmax over all n^2 pairs of the scores, applied to the values

This is the definition of Alman and Song 2023 (arXiv 2310.04064), D^-1 exp(Q (K1 (x) K2)^T) (V1 (x) V2), with (x) the
column-wise Kronecker (Khatri-Rao) product and D the diagonal matrix of the row sums of the exp. With K2 = V2 = 1 it is
standard attention on (K1, V1).
In shapes, rows are (batch item, kv head) streams, m queries per row, d and dv the widths of one key and of one value. A
`Partial` is a result of attention: the mean of values and the log-mass (log-sum-exp of scores). A state is what a
method keeps of a stream of tokens. A `Spec` holds the sizes and constants of a cache, such as `scale`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from kvfloor.core.bounded import Bounded
from kvfloor.core.budget import Budget
from kvfloor.core.exact import Exact
from kvfloor.core.log_masses import log_masses
from kvfloor.core.method import Method, Traits
from kvfloor.core.partial import Partial
from kvfloor.core.selector import Everything
from kvfloor.core.spec import Spec
from kvfloor.core.state import State
from kvfloor.core.summary import Drop
from kvfloor.methods.grammar import parse
from kvfloor.splitting import split_once

_LOGITS_AT_ONCE = 2**22


@dataclass(frozen=True)
class TensorAttention(Method):
    """Compute tensor attention over all pairs of the tokens that `store` keeps.

    The answer is exact if `store` keeps every token.
    store   a method that keeps tokens' own keys and values: exact (all tokens), or an eviction policy without a summary
            of the evicted tokens. A text such as "window@64" is parsed. The store receives a token's two keys
            concatenated into one key of width 2d, and its two values into one value of width 2dv. It receives no
            queries, so policies that use queries have none to judge by
    A state takes keys (rows, t, 2d) and values (rows, t, 2dv) of t tokens, concatenated in this way, and queries of
    width d; it returns answers of width dv. The products of all n^2 pairs are never stored: for n tokens the state
    holds 2n(d + dv) numbers, and a query is answered from the products of one block of pairs at a time.
    Raises ValueError for any other store.
    """

    name: ClassVar[str] = "tensor"
    paper: ClassVar[str] = "Alman and Song 2023 (arXiv 2310.04064)"
    store: Method | str = field(default_factory=Exact)

    def __post_init__(self) -> None:
        store = parse(self.store) if isinstance(self.store, str) else self.store
        object.__setattr__(self, "store", store)
        keeps = isinstance(store, Exact) or (isinstance(store, Bounded) and isinstance(store.summary, Drop))
        if not keeps or not isinstance(store.parts.selector, Everything):
            raise ValueError(
                f"tensor: the store must keep whole tokens and read them all (exact, or an eviction policy such as "
                f"window@64), got {store}"
            )

    @property
    def kept(self) -> Method:
        """Return the argument `store`, the method that keeps the tokens, as a `Method` (never as text)."""
        assert isinstance(self.store, Method)
        return self.store

    @property
    def budget(self) -> Budget | None:
        return self.kept.budget

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
        text, at, budget = split_once(str(self.kept), "@")
        text = repr(text) if ":" in text else text  # module:Class is no word
        name = "tensor" if text == "exact" else f"tensor(store={text})"
        return f"{name}@{budget}" if at else name


class TensorState(State[TensorAttention]):
    """Hold the tokens that tensor attention is over, in the attribute `store`: a state of another method.

    That method is the argument `store` of `TensorAttention`, and decides which tokens are kept. In its state a token's
    key is k1 and k2 concatenated along the width, (..., 2d), and its value is v1 and v2 likewise, (..., 2dv).
    """

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

    def _select_rows(self, index: Tensor) -> None:
        super()._select_rows(index)
        self.method = replace(self.method, store=self.store.method)  # budgets per row follow the selected rows

    def _append(self, k: Tensor, v: Tensor, take: Tensor) -> None:
        self.store._append(k, v, take)
        self.seen = self.seen + take

    def _seal(self) -> None:
        self.store.seal()

    def _read(self, q: Tensor) -> Partial:
        slots = self.store.slots
        assert slots is not None
        view = slots.view()
        weight = None if view.live is None else torch.zeros_like(view.live, dtype=self.spec.compute_dtype)
        if view.live is not None and weight is not None:
            weight = weight.masked_fill(~view.live, -torch.inf)
        one, two = (Points(k, v, weight) for k, v in zip(view.k.chunk(2, -1), view.v.chunk(2, -1), strict=True))
        return over_pairs(q, one, two, self.spec)


@dataclass(frozen=True)
class Points:
    """Hold s points per row, the members of token pairs: keys k (rows, s, d) and values v (rows, s, dv).

    A point is a token with one of its two keys and values, or a sample that represents many tokens. Tensor attention is
    over all pairs (x, y), where x is a point of one `Points` object (first keys and values) and y of another (second
    keys and values). log_weight (rows, s) is the log of the number of tokens that a point represents, -inf for 0; None:
    each represents 1 token.
    """

    k: Tensor
    v: Tensor
    log_weight: Tensor | None = None

    def part(self, at: slice) -> Points:
        """Return the points whose index among the s points of each row is in the slice `at`."""
        weight = None if self.log_weight is None else self.log_weight[:, at]
        return Points(self.k[:, at], self.v[:, at], weight)


def over_pairs(q: Tensor, one: Points, two: Points, spec: Spec) -> Partial:
    """Return the tensor attention of q (rows, m, d) over all pairs (x, y), x a point of `one` and y a point of `two`.

    The weight of a pair is the product of its points' weights. Pairs are computed in blocks of bounded size. Of `spec`,
    the scale, the softcap and the compute dtype are used. Returns a `Partial` (rows, m).
    """
    part = Partial.empty(*q.shape[:2], dv=one.v.shape[-1], dtype=spec.compute_dtype, device=q.device)
    for block in _blocks(q, one, two):
        part = part.merge(_turned(q, block, two, spec))
    return part


def log_masses_over_pairs(q: Tensor, one: Points, two: Points, spec: Spec) -> Tensor:
    """Return the log-masses (rows, m) of `over_pairs`, in the compute dtype; no values are read."""
    dtype = spec.compute_dtype
    mass = torch.full(q.shape[:2], -torch.inf, dtype=dtype, device=q.device)
    for block in _blocks(q, one, two):
        turned, k = _turned_queries(q, block, dtype), two.k.to(dtype)
        second = log_masses(turned, k, spec.scale, spec.softcap, two.log_weight)
        mass = torch.logaddexp(mass, _by_point(second, q, block).logsumexp(-1))
    return mass


def _blocks(q: Tensor, one: Points, two: Points) -> Iterator[Points]:
    """Yield the points of `one` in parts, so small that the logits of their pairs with `two` are of bounded size."""
    rows, m, _ = q.shape
    at_once = max(1, _LOGITS_AT_ONCE // max(1, rows * m * two.k.shape[1]))
    for start in range(0, one.k.shape[1], at_once):
        yield one.part(slice(start, start + at_once))


def _turned_queries(q: Tensor, one: Points, dtype: torch.dtype) -> Tensor:
    """Return q * k1, entry by entry, for every query of q (rows, m, d) and every point of `one`: (rows, m * s, d)."""
    return (q.to(dtype).unsqueeze(2) * one.k.to(dtype).unsqueeze(1)).flatten(1, 2)


def _by_point(second: Tensor, q: Tensor, one: Points) -> Tensor:
    """Return log-masses (rows, m, s) from those of turned queries (rows, m * s), with the weights of the s points."""
    mass = second.view(*q.shape[:2], one.k.shape[1])
    return mass if one.log_weight is None else mass + one.log_weight.to(mass.dtype).unsqueeze(1)


def _turned(q: Tensor, one: Points, two: Points, spec: Spec) -> Partial:
    """Return the tensor attention of q (rows, m, d) over all pairs (x, y), x of `one` and y of `two`, in one block.

    Over the pairs of one point x, with key k1, this is standard attention of the query q * k1 (entry by entry) over the
    points of `two`. The results for all points x are then weighted by their masses (sums of exp of scores). Of `spec`,
    the scale, the softcap and the compute dtype are used. The result is a `Partial` (rows, m).
    """
    dtype = spec.compute_dtype
    second = Partial.over(_turned_queries(q, one, dtype), two.k.to(dtype), two.v.to(dtype), spec, two.log_weight)
    mass = _by_point(second.log_mass, q, one)
    top = mass.logsumexp(-1)
    weight = torch.exp(mass - top.nan_to_num(neginf=0.0).unsqueeze(-1))
    values = one.v.to(dtype).unsqueeze(1) * second.mean.view(*mass.shape, one.v.shape[-1])
    return Partial((weight.unsqueeze(-1) * values).sum(2), top)


def products(x1: Tensor, x2: Tensor) -> Tensor:
    """Return the entrywise products x1[i] * x2[j] of all n^2 pairs of tokens: (rows, n^2, width).

    x1 and x2 are (rows, n, width); the pair (i, j) is at index i * n + j. The products of keys are the keys of tensor
    attention, and the products of values are its values. `TensorAttention` never stores these products.
    """
    return (x1.unsqueeze(2) * x2.unsqueeze(1)).flatten(1, 2)
