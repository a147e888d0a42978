"""Key norm (Knorm): the longest keys leave."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvfloor.core.policy import Guarded, Held


@dataclass(frozen=True)
class KeyNorm(Guarded):
    """The key's length decides, and no query is needed (Devoto et al. 2024).

    Law: score(token) = -||k||; the lowest score leaves. In trained decoders short keys tend to receive the attention.
    sinks, recent   first and newest tokens that never leave: 4, and 16 or a quarter of a smaller budget than 64;
                    the paper's rule is knorm(sinks=0,recent=0,block=1)
    Norms are float32 whatever the cache's dtype. A token's score never changes, so any block length keeps the same
    tokens but for what the newest ones are.
    """

    name: ClassVar[str] = "knorm"
    paper: ClassVar[str] = "Devoto et al. 2024 (arXiv 2406.11430)"

    def priority(self, held: Held) -> Tensor:
        return -torch.linalg.vector_norm(held.k.to(held.spec.compute_dtype), dim=-1)
