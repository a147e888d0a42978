"""Count what certified reads have fetched."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Tally:
    """Count the queries of certified reads, and the exact tokens that they fetched.

    queries    queries answered; the queries of a GQA group at one token count as one
    unfetched  those of them that were certified by the codes alone
    tokens     exact tokens fetched, one for each query that needed it
    bytes      the bytes of these tokens' keys and values

    A state's copies count into the same tally.
    """

    queries: int = 0
    unfetched: int = 0
    tokens: int = 0
    bytes: int = 0

    def add(self, fetched: Tensor, token_bytes: int) -> None:
        """Count queries that fetched so many exact tokens each: fetched (...), int64."""
        tokens = int(fetched.sum())
        self.queries += fetched.numel()
        self.unfetched += int(torch.count_nonzero(fetched == 0))
        self.tokens += tokens
        self.bytes += tokens * token_bytes
