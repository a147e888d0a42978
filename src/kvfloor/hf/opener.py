"""Open the kvfloor state of each compressed layer of a cache, with its share of the budget.

A method is a way to compress a KV cache, such as an eviction policy with a budget. A state is what the method stores
for the rows of one layer; a row is the stream of one (batch item, kv head). A compressed layer is one with attention
over all tokens, whose keys and values are stored by a method.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvfloor.core.budget import least_budget, resolve, with_budget
from kvfloor.core.method import Method
from kvfloor.core.randomness import row_id
from kvfloor.core.rotation import Rotation
from kvfloor.core.spec import Spec
from kvfloor.core.state import State
from kvfloor.hf.allocate import Shares, per_head, spread
from kvfloor.hf.promise import Promise
from kvfloor.hf.ranks import ALONE, Ranks
from kvfloor.methods.mixed.layered import Layered

Budgets = tuple[
    tuple[int, ...], ...
]  # tokens per compressed layer and kv head; one number in a layer is for all its heads


@dataclass(frozen=True)
class Opening:
    """Hold the settings of a cache, from which the state of every compressed layer is opened.

    method     the method; its budget is that of every kv head, unless `budgets` or `shares` is given
    layers     number of compressed layers
    context    length in tokens of which a budget such as "@25%" is a share
    seed       seeds the method's own randomness
    requests   one id per batch item, which seeds that item's randomness together with `seed`; None: 0, 1, 2, ...
    budgets    tokens per compressed layer and kv head, in place of the method's own budget
    shares     multiples of the method's budget, per compressed layer and kv head; None: the same budget for all
    pinned     spans [from, to) of token positions that are never evicted
    rotations  None: the state stores keys as they are given. Otherwise one rotary embedding (RoPE) per compressed
               layer: keys are given unrotated, and the state rotates each by its rank among the held tokens (the oldest
               at 0)
    applied    None, or one rotary embedding per compressed layer, by which the given keys are already rotated; policies
               that predict later queries need it
    ranks      the processes among which each layer's kv heads are divided; all other settings are those of the whole
               model
    promise    what the cache promises about the error of its answers; None: nothing
    Raises ValueError for settings in conflict.
    """

    method: Method
    layers: int
    context: int | None = None
    seed: int = 0
    requests: tuple[int, ...] | None = None
    budgets: Budgets | None = None
    shares: Shares | None = None
    pinned: tuple[tuple[int, int], ...] = ()
    rotations: tuple[Rotation | None, ...] | None = None
    applied: tuple[Rotation | None, ...] | None = None
    ranks: Ranks = ALONE
    promise: Promise | None = None

    def __post_init__(self) -> None:
        for name, table in (("budgets", self.budgets), ("allocate", self.shares)):
            if table is not None and len(table) != self.layers:
                raise ValueError(f"{name} has {len(table)} layers; this model has {self.layers} compressed ones")
        own = self.method.budget
        if isinstance(self.method, Layered):
            self._check_layers(self.method)
        if self.budgets is not None and (own is not None or self.shares is not None):
            raise ValueError(
                f"budgets= says every head's tokens, so {self.method} takes no '@' and there is no allocate="
            )
        if self.shares is not None and (own is None or isinstance(own, tuple)):
            raise ValueError(f"allocate= shares out one budget; give {self.method} one, as in '@512' or '@64MiB'")
        if self.pinned and not self.method.traits.pins:
            raise ValueError(f"pinned spans need a method that keeps whole tokens, not {self.method}")
        for span in self.pinned:
            if len(span) != 2 or not 0 <= span[0] < span[1]:
                raise ValueError(f"a pinned span is [from, to) with 0 <= from < to, got {list(span)}")

    def _check_layers(self, method: Layered) -> None:
        """Raise ValueError if a method with one method per layer has another number of them than this model's."""
        if len(method.methods) != self.layers:
            raise ValueError(
                f"{method} is for {len(method.methods)} layers; this model has {self.layers} compressed ones"
            )
        if self.budgets is not None or self.shares is not None:
            raise ValueError(f"{method} has the budget of every layer: leave budgets= and allocate= out")

    def open(
        self,
        layer: int,
        place: int,
        key: Tensor,
        dv: int,
        g: int,
        scale: float,
        softcap: float | None,
        tied: bool = False,
    ) -> State:
        """Open the empty state of one layer, for the kv heads that this process holds.

        layer, place   index of the layer in the model, and among the compressed layers
        key, dv        a key tensor (B, Hkv, n, d), for its shape, dtype and device; width of a value
        g              query heads per kv head
        scale, softcap the factor on q.k, and the cap on logits or None
        tied           True if each token's value is its key, given as one tensor (latent attention)
        On a sharded model, the state has the same rows as in the unsharded model, but only those of this process's kv
        heads. Each row has the same budget and the same random draws in both.
        Raises ValueError if the number of request ids is not the batch size.
        """
        batch, kv_heads = key.shape[0], key.shape[1] * self.ranks.count
        requests = range(batch) if self.requests is None else self.requests
        if len(requests) != batch:
            raise ValueError(f"{len(requests)} request ids were given for a batch of {batch}; give one per item")
        spec = Spec(
            batch * kv_heads,
            key.shape[-1],
            dv,
            scale,
            softcap,
            key.dtype,
            key.device,
            seed=self.seed,
            row_ids=[row_id(request, layer, head) for request in requests for head in range(kv_heads)],
            places=[(layer, head) for _ in requests for head in range(kv_heads)],
            tied=tied,
            rotation=None if self.rotations is None else self.rotations[place],
            applied=None if self.applied is None else self.applied[place],
        )
        method = self._sized(spec, place, batch, kv_heads, g)
        if self.ranks.count > 1:
            own = own_rows(self.ranks, batch, kv_heads)
            method, spec = _of_rows(method, own), spec.select(own)
        state = method.open(spec)
        for start, stop in self.pinned:
            state.pin(start, stop)
        return state

    def _sized(self, spec: Spec, place: int, batch: int, kv_heads: int, g: int) -> Method:
        """Return the method for the layer with index `place` among the compressed layers, with its budget in tokens.

        The budget is one number, or one per row if the kv heads have different budgets. A row is one (batch item, kv
        head).
        spec             widths and dtype of keys and values, to convert a budget in bytes or percent to tokens
        batch, kv_heads  number of batch items, and of kv heads per item: those of the whole model, also if it is
                         sharded. `spec` and the budgets have one row for each of these heads
        g                query heads per kv head
        """
        if self.budgets is not None:
            return _with(self.method, per_head(self.budgets[place], kv_heads, place), batch)
        method = resolve(self.method.of_layer(place), spec, layers=self.layers, length=self.context, g=g)
        if self.shares is None:
            return method
        budget = method.budget
        assert isinstance(budget, int)
        least = least_budget(method) + sum(stop - start for start, stop in self.pinned)
        table = spread([per_head(line, kv_heads, i) for i, line in enumerate(self.shares)], budget, least)
        return _with(method, table[place], batch)


def _with(method: Method, by_head: Sequence[int], batch: int) -> Method:
    alike = len(set(by_head)) == 1
    return with_budget(method, by_head[0] if alike else tuple(by_head) * batch)


def own_rows(ranks: Ranks, batch: int, kv_heads: int) -> Tensor:
    """Return the indices (r,) of this rank's rows, among the rows of all `kv_heads` kv heads of `batch` batch items."""
    return torch.arange(batch * kv_heads).view(batch, ranks.count, -1)[:, ranks.rank].flatten()


def _of_rows(method: Method, rows: Tensor) -> Method:
    """Return the method with the budgets of the rows at these indices; the same method if it has one budget for all."""
    budget = method.budget
    if not isinstance(budget, tuple):
        return method
    return with_budget(method, tuple(budget[row] for row in rows.tolist()))
