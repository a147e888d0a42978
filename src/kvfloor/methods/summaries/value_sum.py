"""Summarise the evicted tokens of a KV cache by the sum of their values, as if all their logits were 0.

A summary is the fixed-size record that attention reads in place of the evicted tokens. With the policy `window`, which
keeps the newest tokens, this summary gives exactly the unmasked sliding window of Haris and Onak 2025. A row is one
(batch item, kv head) stream, and dv the width of a value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvfloor.core.method import Guarantee, Traits
from kvfloor.core.partial import Partial
from kvfloor.core.spec import Spec
from kvfloor.core.summary import Summary, SummaryState


@dataclass(frozen=True)
class ValueSum(Summary):
    """Summarise the evicted tokens by the sum and count of their values.

    In attention the logit of an evicted token is then 0 rather than -inf: c evicted tokens add c to the softmax's
    denominator, and the sum of their values to its numerator. This is the "sliding window with unmasked values" of
    Haris and Onak 2025, section 4, computed without error from dv + 1 numbers per row. The paper's Algorithm 1
    estimates the sum with a reservoir sample.
    """

    name: ClassVar[str] = "value_sum"
    paper: ClassVar[str] = "Haris and Onak 2025 (arXiv 2502.15955), section 4; exact form"

    @property
    def traits(self) -> Traits:
        return Traits(reference="unmasked", turns=True)

    def open(self, spec: Spec) -> ValueSumState:
        return ValueSumState(spec)

    def guarantee(self, spec: Spec) -> Guarantee:
        del spec
        return Guarantee(
            0.0,
            0.0,
            "max norm, up to rounding, against the unmasked law",
            "every query",
            (),
            "Haris and Onak 2025, section 4: the closed form of the unmasked window",
        )


class ValueSumState(SummaryState):
    """Hold the sum of the evicted tokens' values, total (rows, dv), and the number of these tokens, count (rows,).

    The sum is float64, in which 2**29 bfloat16 or float32 numbers of the same exponent add up without rounding error.
    """

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self.total = torch.zeros(spec.rows, spec.dv, dtype=torch.float64, device=spec.device)
        self.count = torch.zeros(spec.rows, dtype=torch.int64, device=spec.device)

    def absorb(self, row: Tensor, k: Tensor, v: Tensor, position: Tensor) -> None:
        del k, position
        self.total.index_add_(0, row, v.to(torch.float64))
        self.count.index_add_(0, row, torch.ones_like(row))

    def read(self, q: Tensor) -> Partial:
        mean = self.total / self.count.clamp_min(1).unsqueeze(1)
        log_mass = torch.log(self.count.to(torch.float64))  # log 0 = -inf: no token absorbed, no mass
        dtype, m = self.spec.compute_dtype, q.shape[1]
        return Partial(mean.to(dtype).unsqueeze(1).expand(-1, m, -1), log_mass.to(dtype).unsqueeze(1).expand(-1, m))
