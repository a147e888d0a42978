"""Count what certified reads have fetched."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kvfloor.certify.certified import Certified


@dataclass
class Tally:
    """Count the queries of certified reads, and the exact tokens that they fetched.

    queries    queries answered; the queries of a GQA group at one token count as one
    unfetched  those of them that were certified by the codes alone
    tokens     exact tokens fetched, one for each query that needed it
    bytes      the bytes of these tokens' keys and values, and `planes`
    largest    the largest bound of an answer so far, over the largest value norm that its query saw
    limit      the largest such bound that was promised
    broken     answers so far whose bound was larger
    planes     the bytes of planes of codes, with scales, radii and sums, that these queries read beyond what all read
    chance     answers so far whose bound may fail, each with the probability delta of the method

    A state's copies count into the same tally.
    """

    queries: int = 0
    unfetched: int = 0
    tokens: int = 0
    bytes: int = 0
    largest: float = 0.0
    limit: float = math.inf
    broken: int = 0
    planes: int = 0
    chance: int = 0

    def add(self, fetched: Tensor, planes: Tensor | None = None, *, token_bytes: int) -> None:
        """Count queries that fetched so many exact tokens each: fetched (...), int64.

        planes (...): the bytes of planes that each read beyond what every query reads; None: there are no planes.
        """
        tokens, beside = int(fetched.sum()), 0 if planes is None else int(planes.sum())
        self.queries += fetched.numel()
        self.unfetched += int(torch.count_nonzero(fetched == 0))
        self.tokens += tokens
        self.bytes += tokens * token_bytes + beside
        self.planes += beside

    def note(self, found: Certified, real: Tensor | None = None) -> None:
        """Record the bounds of answers found (rows, g, m), or (rows, m) if `real` is None.

        real: bool (rows, m), False for the answers of padding, which do not count; None: all are real.
        """
        marked = [found.relative, ~found.within(self.limit)] if self.limit < math.inf else [found.relative]
        chance = [] if found.chance is None else [found.statistical]
        if real is not None:
            marked, chance = ([x.transpose(1, 2)[real] for x in some] for some in (marked, chance))
        if marked[0].numel():
            self.largest = max(self.largest, float(marked[0].max()))
            self.broken += sum(int(torch.count_nonzero(over)) for over in marked[1:])
            self.chance += sum(int(torch.count_nonzero(one)) for one in chance)
