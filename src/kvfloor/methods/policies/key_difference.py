"""Key difference (KeyDiff): the keys most like the mean of all held keys leave."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvfloor.core.policy import Guarded, Held


@dataclass(frozen=True)
class KeyDifference(Guarded):
    """Keys that point elsewhere than the others stay, and no query is needed (Park et al. 2025, KeyDiff).

    Law: score(token) = -cos(k, m), where m is the mean of k / ||k|| over the tokens held when the block ends, the
    block's own among them; the lowest score, the key most like the mean, leaves.
    sinks, recent   first and newest tokens that never leave: 4, and 16 or a quarter of a smaller budget than 64;
                    the paper's rule is keydiff(sinks=0,recent=0)
    Cosines are float32 whatever the cache's dtype; a key of length 0 is at right angles to everything.
    """

    name: ClassVar[str] = "keydiff"
    paper: ClassVar[str] = "Park et al. 2025, KeyDiff (arXiv 2504.15364)"

    def priority(self, held: Held) -> Tensor:
        unit = torch.nn.functional.normalize(held.k.to(held.spec.compute_dtype), dim=-1)
        mean = unit.masked_fill(~held.live.unsqueeze(-1), 0.0).sum(1, dtype=torch.float64)
        direction = torch.nn.functional.normalize(mean, dim=-1).to(unit.dtype)
        return -torch.matmul(unit, direction.unsqueeze(-1)).squeeze(-1)
