"""Bound what coarser readings of coded tokens lose: of the upper planes alone, and of a page's centre for its values.

A row is one (batch item, kv head) stream, a residual a token's key, or value, minus what a reading says of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvfloor.certify.operator_norm import operator_norm
from kvfloor.certify.rounding import unit
from kvfloor.core.fields import Field
from kvfloor.core.memory import Memory
from kvfloor.core.rowwise import length, product
from kvfloor.core.spec import Spec
from kvfloor.methods.stores.coded import CodedSlots
from kvfloor.methods.stores.nibbles import COARSER, NibbleChannels, NibbleTokens
from kvfloor.methods.stores.turn import turned

RADIUS = torch.bfloat16
COLUMNS = {"centre_radius": RADIUS, "upper_radius": RADIUS}
"""Columns of the coded slots: bounds on the norms of a value's residuals in the two coarser readings."""


class CoarseSums(Memory):
    """Keep the sums of the residuals' outer products of the coarser readings, by row.

    key_gram      (rows, d, d) sum over coded tokens of the outer product with itself of the residual of the key's upper
                  plane
    excess        (rows,) most that these residuals exceed half a step of that plane, as a norm over channels
    centre_gram   (rows, dv, dv) the same sum of the residuals of values from the centre of their page, rotated; zeros
                  if the values are the keys, as then there are no centres
    upper_gram    (rows, dv, dv) the same of the residuals of the values' upper planes
    operators     (rows, 2) bounds on the operator norms of the matrices of these two kinds of residuals
    """

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        how: dict[str, Any] = {"dtype": spec.compute_dtype, "device": spec.device}
        self.key_gram = torch.zeros(spec.rows, spec.d, spec.d, **how)
        self.excess = torch.zeros(spec.rows, **how)
        self.centre_gram, self.upper_gram = (torch.zeros(spec.rows, spec.dv, spec.dv, **how) for _ in range(2))
        self.operators = torch.zeros(spec.rows, 2, **how)

    def settle(
        self, codes: CodedSlots, here: Tensor, page: Tensor, k: Tensor, v: Tensor, at: tuple[Tensor, ...]
    ) -> None:
        """Add the tokens of the pages that were just coded: page[i] (r,) of the row here[i] (r,).

        k, v  (e, d), (e, dv) the tokens' keys and values as they were given
        at    each token's place, the index of its row in `here`, its index in the page: three (e,)
        """
        place, row, from_page = at
        keys, dtype = codes.key_codes, self.spec.compute_dtype
        assert isinstance(keys, NibbleChannels)
        pages = torch.zeros(len(here), codes.group, self.spec.d, dtype=dtype, device=here.device)
        pages[row, from_page] = k - codes.keys(place, coarse=True)
        self.key_gram[here] += product(pages.transpose(1, 2), pages)
        half = keys.steps(here.cpu())[torch.arange(len(here)), page.to(here.device)] * (COARSER / 2)
        over = length((pages.abs().amax(1) - half).clamp_min(0)) * (1 + unit(dtype) * (self.spec.d + 8))
        self.excess[here] = torch.maximum(self.excess[here], over)
        values, wide = codes.value_codes, [("upper", self.upper_gram, v - codes.values(place, coarse=True))]
        if values is not None:
            assert isinstance(values, NibbleTokens)
            centre = values.centre[here[row], page.to(here.device)[row]].to(dtype)
            wide.append(("centre", self.centre_gram, turned(v) - centre))
        terms = unit(dtype) * (codes.group + int(codes.coded.max()) // codes.group + 8)
        for name, gram, residual in wide:
            pages = torch.zeros(len(here), codes.group, self.spec.dv, dtype=dtype, device=here.device)
            pages[row, from_page] = residual
            gram[here] += product(pages.transpose(1, 2), pages)
            norm = operator_norm(gram[here], terms).to(dtype) * (1 + unit(dtype))
            self.operators[here, int(name == "upper")] = norm
            getattr(codes.columns, f"{name}_radius")[place] = rounded_up(length(residual))

    def bytes_read(self, codes: CodedSlots) -> tuple[float, int]:
        """Return the bytes that every query reads: of one coded token, and of the sums of all rows.

        They are those of the upper plane of the key, the radius of its value, and its part of the page's ranges and
        centre.
        """
        keys, values = codes.key_codes, codes.value_codes
        assert isinstance(keys, NibbleChannels)
        each = keys.coarse_bytes + torch.finfo(RADIUS).bits // 8
        if isinstance(values, NibbleTokens):
            each += values.shared_bytes
        return each, sum(x.nbytes for x in (self.key_gram, self.excess, self.operators))

    def fields(self) -> dict[str, Any]:
        dtype, sums = self.spec.compute_dtype, {}
        for name in ("key_gram", "centre_gram", "upper_gram", "excess", "operators"):
            least = None if name.endswith("gram") else 0
            sums[name] = Field(dtype, tuple(getattr(self, name).shape), least=least, finite=True)
        return sums


def rounded_up(radius: Tensor) -> Tensor:
    """Return numbers of at least 0 in 16 bits, rounded upwards."""
    radius = radius * (1 + 2.0**-7)  # bfloat16 rounds by at most 2^-8
    return torch.where(radius > 0, radius.clamp_min(torch.finfo(RADIUS).tiny), radius).to(RADIUS)
