"""Heavy hitters (H2O): the tokens that received the most attention stay, beside the newest ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvfloor.core.policy import Held, Policy, Queries
from kvfloor.validation import count, literals


@dataclass(frozen=True)
class HeavyHitters(Policy):
    """Accumulated attention decides (Zhang et al. 2023, H2O, Algorithm 1 with the heavy/recent split of section 5).

    score   "sum":   the paper's running sum of softmax weights over held tokens
            "mean":  the sum divided by the number of tokens since, so that age is no advantage
            "decay": a running sum that forgets by `decay` per query
    recent  newest tokens that never leave; half the budget unless given
    sinks   first tokens that never leave; 4 unless given
    group   how the weights of a GQA group's queries join: "mean" or "max"
    Scores are float32 whatever the cache's dtype: bfloat16 sums stall at 256. With prefill=dense they are the column
    sums of the prompt's whole attention matrix, taken a block of rows and a tile of columns at a time.
    """

    name: ClassVar[str] = "h2o"
    paper: ClassVar[str] = "Zhang et al. 2023, H2O (arXiv 2306.14048)"
    wants_weights: ClassVar[bool] = True
    columns: ClassVar[dict[str, torch.dtype]] = {"score": torch.float32}

    score: Literal["sum", "mean", "decay"] = "sum"
    recent: int | None = None
    sinks: int = 4
    decay: float = 0.98
    group: Literal["mean", "max"] = "mean"

    def __post_init__(self) -> None:
        count("h2o", sinks=self.sinks, **({} if self.recent is None else {"recent": self.recent}))
        literals(self)
        if not (isinstance(self.decay, float) and 0 < self.decay < 1):
            raise ValueError(f"h2o: decay must lie in (0, 1), got {self.decay!r}")

    def protected_first(self) -> int:
        return self.sinks

    def protected_last(self, budget: int) -> int:
        return budget // 2 if self.recent is None else self.recent

    def priority(self, held: Held) -> Tensor:
        total = held.columns["score"]
        if self.score != "mean":
            return total
        return total / (held.seen - held.position).clamp_min(1)

    def on_weights(self, held: Held, weights: Tensor, queries: Queries) -> dict[str, Tensor]:
        total = held.columns["score"]
        if self.group == "mean" and self.score != "decay":
            return {"score": total + (weights.sum((1, 2)) / weights.shape[1]).to(torch.float32)}
        joined = weights.mean(1) if self.group == "mean" else weights.amax(1)  # (r, b, s)
        if self.score == "decay":
            made = queries.made.to(joined.dtype)  # places of the block without a query fade nothing
            later = made.sum(1, keepdim=True) - made.cumsum(1)
            joined = joined * (self.decay**later).unsqueeze(2)
            total = total * self.decay ** made.sum(1, keepdim=True)
        return {"score": total + joined.sum(1).to(torch.float32)}
