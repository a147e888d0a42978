"""Say where the tokens that have no code are, if all rows have theirs in step, and write them among decoded ones.

A row is one (batch item, kv head) stream, a slot the place of one held token. In shapes, s are slots of each row, n the
tokens for which a row has room without codes, w the width of a key or value.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Uncoded:
    """Hold where the uncoded tokens of rows in step are: in their slots, and among those kept as they were given.

    coded      number of tokens of each row that came before those without codes
    stretches  (slot, index, number of tokens) of tokens that lie one after another, in all rows alike
    among      two tensors (rows, s), if tokens are in no order: True for slots whose token is uncoded, and the index of
               each; None: `stretches` has all
    """

    coded: int
    stretches: list[tuple[int, int, int]]
    among: tuple[Tensor, Tensor] | None = None

    def written(self, x: Tensor, given: Tensor) -> Tensor:
        """Replace the uncoded tokens of x (rows, s, w) by their entries in `given` (rows, n, w).

        Returns x itself, which is changed, or another tensor.
        """
        if self.among is not None:
            uncoded, index = self.among
            entries = given.gather(1, index.unsqueeze(-1).expand(-1, -1, given.shape[-1]))
            return torch.where(uncoded.unsqueeze(-1), entries, x)
        for slot, index, tokens in self.stretches:
            x.narrow(1, slot, tokens).copy_(given.narrow(1, index, tokens))
        return x
