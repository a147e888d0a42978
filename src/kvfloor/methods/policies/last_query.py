"""Evict the tokens that the newest query attends to least (TOVA)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvfloor.core.policy import Guarded, Held, Queries
from kvfloor.core.rowwise import row_by_row, total


@dataclass(frozen=True)
class LastQuery(Guarded):
    """Evict the tokens that the last query of each block attends to least.

    A block is the new tokens between two evictions: 32 by default (`block`).
    Law (Oren et al. 2024, TOVA): after each block, score(token) = mean over the GQA group of softmax(q . k) over held
    tokens, where q is the last query of the block. The tokens of lowest score are evicted until the budget is met: up
    to `block` tokens at once, all chosen by this one query. The paper's rule is tova(sinks=0,recent=0,block=1): once
    the budget is full, each new token evicts one. The authors' code averages over all query heads of a layer, and
    evicts the same token in all its kv heads. Here each kv head decides for itself.
    sinks   first tokens that are never evicted: 4 by default
    recent  newest tokens that are never evicted; by default 16, or a quarter of a budget below 64 tokens
    A token that came after the last query has no score yet; it is evicted only once no token with a score is left. In a
    stream without queries the oldest token is evicted. Scores are float32 whatever the cache's dtype.
    """

    name: ClassVar[str] = "tova"
    paper: ClassVar[str] = "Oren et al. 2024, TOVA (arXiv 2401.06104)"
    wants_weights: ClassVar[bool] = True
    weights_of: ClassVar[Literal["all", "last"]] = "last"
    # Stored as a logarithm: the initial 0 of a new token is the largest possible weight, 1.
    columns: ClassVar[dict[str, torch.dtype]] = {"log_weight": torch.float32}

    def priority(self, held: Held) -> Tensor:
        return held.columns["log_weight"]

    def on_weights(self, held: Held, weights: Tensor, queries: Queries) -> dict[str, Tensor]:
        judged = held.position <= queries.position
        mean = total(weights.flatten(1, 2), 1) / (weights.shape[1] * weights.shape[2])
        log_weight = row_by_row(torch.log, mean, held=held.filled).to(torch.float32)
        return {"log_weight": torch.where(judged, log_weight, held.columns["log_weight"])}
