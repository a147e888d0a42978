"""Evict the tokens whose keys are most similar to the mean of all held keys (KeyDiff)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvfloor.core.policy import Guarded, Held
from kvfloor.core.rowwise import row_by_row


@dataclass(frozen=True)
class KeyDifference(Guarded):
    """Evict the token whose key is most similar to the mean key direction, without looking at queries.

    Law (Park et al. 2025, KeyDiff): score(token) = -cos(k, m), where m is the mean of k / ||k|| over all tokens held
    at the end of a block. The token of lowest score is evicted. A block is the new tokens between two evictions.
    sinks   first tokens that are never evicted: 4 by default
    recent  newest tokens that are never evicted; by default 16, or a quarter of a budget below 64 tokens
    The paper's rule is keydiff(sinks=0,recent=0).
    Cosines are float32 whatever the cache's dtype; a key of length 0 has the cosine 0.
    """

    name: ClassVar[str] = "keydiff"
    paper: ClassVar[str] = "Park et al. 2025, KeyDiff (arXiv 2504.15364)"

    def priority(self, held: Held) -> Tensor:
        k = held.k.to(held.spec.compute_dtype)
        return row_by_row(_against_the_mean, k, held=held.filled)


def _against_the_mean(k: Tensor) -> Tensor:
    """Return -cos(k, m), (1, s), for each key k and the mean direction m of all keys.

    k (1, s, d) are the keys of the s tokens that one (batch item, kv head) stream holds. m is the mean of k / ||k||.
    """
    unit = torch.nn.functional.normalize(k, dim=-1)
    direction = torch.nn.functional.normalize(unit.sum(1, dtype=torch.float64), dim=-1).to(unit.dtype)
    return -torch.matmul(unit, direction.unsqueeze(-1)).squeeze(-1)
