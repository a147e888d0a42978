"""Evict the tokens with the longest keys (Knorm)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvfloor.core.policy import Guarded, Held
from kvfloor.core.rowwise import length


@dataclass(frozen=True)
class KeyNorm(Guarded):
    """Evict the token with the longest key, without looking at queries.

    Law (Devoto et al. 2024): score(token) = -||k||; the token of lowest score is evicted. In trained decoders, tokens
    with short keys tend to receive most of the attention.
    sinks   first tokens that are never evicted: 4 by default
    recent  newest tokens that are never evicted; by default 16, or a quarter of a budget below 64 tokens
    block   new tokens between two evictions. A token's score never changes, so the block length matters only because
            the newest tokens are protected
    The paper's rule is knorm(sinks=0,recent=0,block=1).
    Norms are float32 whatever the cache's dtype.
    """

    name: ClassVar[str] = "knorm"
    paper: ClassVar[str] = "Devoto et al. 2024 (arXiv 2406.11430)"

    def priority(self, held: Held) -> Tensor:
        return -length(held.k.to(held.spec.compute_dtype))
