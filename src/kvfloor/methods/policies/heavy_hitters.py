"""Keep the tokens that received the most attention, and the newest tokens (H2O)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvfloor.core.device import sent
from kvfloor.core.policy import Held, Policy, Queries
from kvfloor.core.rowwise import total
from kvfloor.validation import count, literals


@dataclass(frozen=True)
class HeavyHitters(Policy):
    """Evict the token that has received the least attention so far.

    Source: Zhang et al. 2023, H2O, Algorithm 1; as in section 5, half of the budget is for the newest tokens.
    score   "sum":   the paper's running sum of the softmax weights that a held token has received
            "mean":  this sum divided by the number of tokens since the token came, so that age is no advantage
            "decay": a running sum that is multiplied by `decay` at every query, before the query's weight is added
    decay   the factor of score="decay"
    recent  newest tokens that are never evicted; half the budget unless given
    sinks   first tokens that are never evicted; 4 unless given
    group   how the weights from the queries of a GQA group are combined: "mean" or "max"
    decode  "evict": tokens after the prompt are scored and evicted like those of the prompt, as in the paper;
            "keep": they are never evicted, so memory grows with the answer (all tokens after the prompt)
    Scores are float32 whatever the cache's dtype: in bfloat16, a sum of weights would stop growing at 256. With
    prefill=dense (no eviction before the end of the prompt) the scores are the column sums of the prompt's attention
    matrix. Of this matrix, only a part (a block of queries and some of the keys) is in memory at a time.
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
    decode: Literal["evict", "keep"] = "evict"

    def __post_init__(self) -> None:
        count("h2o", sinks=self.sinks, **({} if self.recent is None else {"recent": self.recent}))
        literals(self)
        if not (isinstance(self.decay, float) and 0 < self.decay < 1):
            raise ValueError(f"h2o: decay must lie in (0, 1), got {self.decay!r}")

    @property
    def spares(self) -> Literal["nothing", "prompt", "answer"]:
        return "answer" if self.decode == "keep" else "nothing"

    def protected_first(self) -> int:
        return self.sinks

    def protected_last(self, budget: int) -> int:
        return budget // 2 if self.recent is None else self.recent

    def priority(self, held: Held) -> Tensor:
        score = held.columns["score"]
        if self.score != "mean":
            return score
        return score / (held.seen - held.position).clamp_min(1)

    def on_weights(self, held: Held, weights: Tensor, queries: Queries) -> dict[str, Tensor]:
        score = held.columns["score"]
        if self.group == "mean" and self.score != "decay":
            return {"score": score + (total(weights.flatten(1, 2), 1) / weights.shape[1]).to(torch.float32)}
        joined = total(weights, 1) / weights.shape[1] if self.group == "mean" else weights.amax(1)  # (r, b, s)
        if self.score == "decay":
            made = queries.made.to(torch.int64)  # positions of the block without a query cause no decay
            later = made.sum(1, keepdim=True) - made.cumsum(1)
            fade = torch.tensor([self.decay**i for i in range(made.shape[1] + 1)], dtype=joined.dtype)
            fade = sent(fade, joined.device)
            joined = joined * fade[later].unsqueeze(2)
            score = score * fade[made.sum(1, keepdim=True)]
        return {"score": score + total(joined, 1).to(torch.float32)}
