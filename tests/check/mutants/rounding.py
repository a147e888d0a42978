"""Break rounding on every machine in the ways in which some matrix products break it on some machines."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvfloor import Spec
from kvfloor.core.policy import Held, Queries
from kvfloor.core.summary import equal_lots
from kvfloor.methods.policies.heavy_hitters import HeavyHitters
from kvfloor.methods.summaries.value_sum import ValueSumState
from mutants.base import summing


def summed(x: Tensor, backwards: bool) -> Tensor:
    """Sum x (n, ...) over its first axis in float32, one addition after another, from either end."""
    whole = torch.zeros(x.shape[1:])
    for part in x.flip(0) if backwards else x:
        whole = whole + part.float()
    return whole


def off_boundary(x: Tensor) -> bool:
    return x.data_ptr() % 64 != 0


@summing
class RoundsByPlace(ValueSumState):
    """Break bits by place: sum a row's evicted values from an end that depends on the row's place in the batch."""

    def absorb(self, row: Tensor, k: Tensor, v: Tensor, position: Tensor) -> None:
        for at, values in equal_lots(row, v.float()):
            for here, own in zip(at, values, strict=True):
                self.total[here] += summed(own, off_boundary(own))
            self.count[at] += values.shape[1]


@summing
class RoundsByBoundary(ValueSumState):
    """Break bits by address: measure queries by a sum whose order depends on where the caller's tensor lies."""

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self.longest = torch.zeros(spec.rows, 64)  # under as many metrics, each of which may show a rounding

    def on_queries(self, q: Tensor) -> None:
        if q.numel():
            metric = 1.0 + torch.arange(64 * q.shape[-1]).view(64, -1) % 7
            squares = summed((q.float().square().unsqueeze(-2) * metric).movedim(-1, 0), off_boundary(q))
            self.longest = torch.maximum(self.longest, squares.amax((1, 2)))


@dataclass(frozen=True)
class RoundsByRows(HeavyHitters):
    """Break bits by batch: score tokens by a sum whose order depends on the number of rows in a call."""

    def on_weights(self, held: Held, weights: Tensor, queries: Queries) -> dict[str, Tensor]:
        received = summed(weights.flatten(1, 2).movedim(1, 0), backwards=len(weights) > 1)
        return {"score": held.columns["score"] + received / weights.shape[1]}
