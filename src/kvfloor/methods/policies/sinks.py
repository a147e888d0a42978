"""Keep the first few tokens (attention sinks) and the newest tokens of each row, i.e. (batch item, kv head) stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvfloor.core.policy import Held, Policy
from kvfloor.validation import count


@dataclass(frozen=True)
class Sinks(Policy):
    """Evict the oldest token, except a row's first `count` tokens (attention sinks).

    Trained models give the first tokens much attention. In the paper (StreamingLLM), RoPE rotates each key by its rank
    among the tokens in the cache, instead of by its position in the text. Here this is a separate setting that works
    with any policy: `Spec.rotation`, or positions="cache" in a model's cache.
    """

    name: ClassVar[str] = "sinks"
    paper: ClassVar[str] = "Xiao et al. 2023, StreamingLLM (arXiv 2309.17453)"
    count: int = 4

    def __post_init__(self) -> None:
        count("sinks", count=self.count)

    def protected_first(self) -> int:
        return self.count

    def priority(self, held: Held) -> Tensor:
        return held.position
