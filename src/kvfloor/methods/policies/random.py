"""Keep a uniform random sample of the stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvfloor.core.policy import Held, Policy
from kvfloor.core.randomness import row_keys, uniform
from kvfloor.validation import count


@dataclass(frozen=True)
class Random(Policy):
    """Evict tokens at random, so that the held tokens are a uniform sample of all tokens seen.

    Each token has a uniform random number, fixed by the seed, the token's (batch item, kv head) stream and its position
    there; the tokens with the largest numbers stay. The kept set is therefore a uniform sample without replacement of
    all tokens seen (a bottom-k sample, Cohen and Kaplan 2007), however the stream is split into calls. The first
    `sinks` and the newest `recent` tokens are never evicted; both numbers are 0 by default.
    """

    name: ClassVar[str] = "random"
    paper: ClassVar[str] = "Vitter 1985 (reservoir sampling)"
    sinks: int = 0
    recent: int = 0

    def __post_init__(self) -> None:
        count("random", sinks=self.sinks, recent=self.recent)

    def protected_first(self) -> int:
        return self.sinks

    def protected_last(self, budget: int) -> int:
        del budget
        return self.recent

    def priority(self, held: Held) -> Tensor:
        keys = row_keys(held.spec.seed, held.row_ids, "random policy")
        return uniform(keys.unsqueeze(1), held.position)
