"""Last query (TOVA): the token that the newest query attends to least leaves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvfloor.core.policy import Guarded, Held, Queries


@dataclass(frozen=True)
class LastQuery(Guarded):
    """The attention of the last query alone decides, averaged over its GQA group (Oren et al. 2024, TOVA).

    Law: after each block, score(token) = mean over the group of softmax(q . k) over held tokens, for the last query
    that was asked in the block; the lowest score leaves. The paper's rule is tova(sinks=0,recent=0,block=1): a
    larger block lets its last query choose all that leave at once.
    sinks, recent   first and newest tokens that never leave: 4, and 16 or a quarter of a smaller budget than 64
    A token that came after the last query has not been judged, and outlives those that were. A stream without any
    query lets the oldest token leave. Scores are float32 whatever the cache's dtype.
    """

    name: ClassVar[str] = "tova"
    paper: ClassVar[str] = "Oren et al. 2024, TOVA (arXiv 2401.06104)"
    wants_weights: ClassVar[bool] = True
    weights_of: ClassVar[Literal["all", "last"]] = "last"
    # The logarithm, so that a new token's 0 stands for all the attention there is.
    columns: ClassVar[dict[str, torch.dtype]] = {"log_weight": torch.float32}

    def priority(self, held: Held) -> Tensor:
        return held.columns["log_weight"]

    def on_weights(self, held: Held, weights: Tensor, queries: Queries) -> dict[str, Tensor]:
        judged = held.position <= queries.position
        log_weight = torch.log(weights.mean((1, 2))).to(torch.float32)
        return {"log_weight": torch.where(judged, log_weight, held.columns["log_weight"])}
