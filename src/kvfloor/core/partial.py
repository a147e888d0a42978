"""Define the result of attention over a set of tokens, mean and log-mass, and the merge of two such results.

In shapes, rows are (batch item, kv head) streams, m queries and s tokens per row, g query heads per kv head, a new
tokens, d and dv the widths of a key and a value. A logit is scale q.k, after the softcap if there is one. The spec of a
cache has its sizes and constants, among them scale and softcap.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvfloor.core.attend import attend, attend_causal

if TYPE_CHECKING:
    from kvfloor.core.spec import Spec


@dataclass(frozen=True)
class Partial:
    """Hold the result of attention over a set of tokens: the weighted mean of values, and the log of the softmax mass.

    mean      (..., dv)  zeros where the set is empty
    log_mass  (...)      natural log of the sum of exp(logit); -inf where the set is empty

    Attention over the union of two disjoint sets of tokens is the `merge` of their two results. `merge` is commutative
    and associative, and merging with `empty` changes nothing.
    """

    mean: Tensor
    log_mass: Tensor

    @classmethod
    def empty(cls, *shape: int, dv: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Partial:
        """Return the result of attention over no tokens: mean 0 and log-mass -inf.

        `shape` is the batch shape: all axes but dv.
        """
        return cls(
            torch.zeros(*shape, dv, dtype=dtype, device=device),
            torch.full(shape, -torch.inf, dtype=dtype, device=device),
        )

    @classmethod
    def over(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        spec: Spec,
        log_weight: Tensor | None = None,
        hide: Tensor | None = None,
    ) -> Partial:
        """Compute softmax attention of q (rows, m, d) over k (rows, s, d), v (rows, s, dv): a partial (rows, m).

        Logits have the spec's scale and softcap.
        log_weight  (rows, s), added to the logits: a token of log-weight log(c) counts as c equal tokens; None: 0
        hide        bool (rows or 1, m or 1, s), True for the tokens that a query may not see; None: it sees all
        """
        return cls(*attend(q, k, v, spec.scale, spec.softcap, log_weight, hide))

    @classmethod
    def causal(cls, q: Tensor, k: Tensor, v: Tensor, spec: Spec) -> Partial:
        """Compute causal attention: query i of q (rows, g, a, d) sees keys 0 .. i of k (rows, a, d).

        v is (rows, a, dv). Returns a partial (rows, g, a). Logits have the spec's scale and softcap.
        """
        return cls(*attend_causal(q, k, v, spec.scale, spec.softcap))

    def shaped(self, *shape: int) -> Partial:
        """Return this result as a view whose batch axes (all but dv) have the shape `shape`."""
        return Partial(self.mean.view(*shape, self.mean.shape[-1]), self.log_mass.view(shape))

    def merge(self, other: Partial) -> Partial:
        """Return the exact result over the union of two disjoint sets of tokens: this result's and those of `other`."""
        top = torch.maximum(self.log_mass, other.log_mass)
        shift = torch.where(top == -torch.inf, torch.zeros_like(top), top)
        mine, theirs = torch.exp(self.log_mass - shift), torch.exp(other.log_mass - shift)
        total = mine + theirs
        share = total.clamp_min(1.0).unsqueeze(-1)  # the larger side weighs 1, so a non-empty total is >= 1
        mean = (mine.unsqueeze(-1) * self.mean + theirs.unsqueeze(-1) * other.mean) / share
        return Partial(mean, shift + torch.log(total))
