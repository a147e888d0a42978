"""Compute attention over tokens that are known from nested codes, each as closely as it was read, with a bound.

A key is known from the upper plane of its code, from both planes, or exactly; a value from the centre of its page, from
the upper plane, from both, or exactly. In shapes, r are rows, i.e. (batch item, kv head) streams, g query heads of a kv
head, m queries of each head, s tokens of a row, dv the width of a value. The bounds and their proofs are in
docs/certificates.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvfloor.certify.certified import Certified
from kvfloor.certify.glimpse import DOUBT, PAGE, deviation, paged, weighed
from kvfloor.certify.rounding import LEAST, unit
from kvfloor.core.partial import Partial

UPPER, BOTH, EXACT_KEY = 0, 1, 2
"""How closely a key is known."""
CENTRE, UPPER_VALUE, BOTH_VALUE, EXACT_VALUE = 0, 1, 2, 3
"""How closely a value is known."""


@dataclass(frozen=True)
class PlaneGlimpse:
    """Hold what the queries of g heads see of s tokens, of which each is known as closely as it was read.

    logits     (r, g, m, s) logits of the keys as they are known; -inf for a token that a query does not see
    doubt      (r, g, m, s) bound on each logit's error eta, rounding included
    rounding   (r, g, m, s) the part of it that is due to rounding
    key        (r, m, s) uint8: UPPER, BOTH or EXACT_KEY
    value      (r, m, s) uint8: CENTRE, UPPER_VALUE, BOTH_VALUE or EXACT_VALUE
    grams      (r, g, m, 2) bounds, without rounding, on the root of the sum of eta^2 over the keys known from the upper
               plane, and over those known from both
    values     (r, 4, s, dv) the values as each of the four ways knows them; arbitrary where a way was never read
    lengths    (r, 4, s) bounds on their norms
    radii      (r, 3, s) bounds on the norms of the values' residuals, for all ways but the exact one
    operators  (r, 3) bounds on the operator norms of the matrices of these residuals
    least      (r, m) at most the largest norm of a value that the queries see
    """

    logits: Tensor
    doubt: Tensor
    rounding: Tensor
    key: Tensor
    value: Tensor
    grams: Tensor
    values: Tensor
    lengths: Tensor
    radii: Tensor
    operators: Tensor
    least: Tensor

    def rows(self, index: Tensor) -> PlaneGlimpse:
        """Return what the queries of the rows `index` see."""
        kept: dict[str, Any] = {field.name: getattr(self, field.name)[index] for field in fields(self)}
        return replace(self, **kept)

    def answer(self) -> tuple[Certified, Tensor, Tensor]:
        """Return attention over all tokens with its bound (r, g, m), and what each token adds to it.

        The latter are two (r, g, m, s), what the key's error and what the value's error add, relative to the mass:
        whichever is less, by the token's own bound or by its part in the bound on all. 0 where nothing can be read.
        """
        dtype, s = self.logits.dtype, self.logits.shape[-1]
        eps, least, dv = unit(dtype), LEAST[dtype], self.values.shape[-1]
        seen, top, weight, mass = weighed(self.logits)
        share = mass.clamp_min(1.0)  # the largest weight is 1
        as_known = [(self.value == way).unsqueeze(1) for way in range(EXACT_VALUE + 1)]
        mean = self._sum_of_values(weight, as_known) / share.unsqueeze(-1)
        log_mass = top + mass.log()
        doubt = self.doubt.clamp_max(DOUBT) * seen
        most = doubt.amax(-1) if s else torch.zeros_like(top)
        growth = torch.expm1(doubt)
        far = self._distances(mean, as_known, eps) * seen
        about_mean = weight * far
        parts = [self._part(way, doubt) for way in (UPPER, BOTH)]
        known = growth * (self.key == EXACT_KEY).unsqueeze(1)

        def deviates(a: Tensor) -> Tensor:
            found = (a * known).sum(-1)
            for mask, gram, slope in parts:
                found = found + deviation(a * mask, growth, self.rounding, mask & seen, gram, slope)
            return found

        grown = weight * (1 + growth)
        values, by_value = torch.zeros_like(top), torch.zeros_like(weight)
        lengths = self.lengths[:, EXACT_VALUE, None, None] * as_known[EXACT_VALUE]
        for way in range(EXACT_VALUE):
            here, radius = grown * as_known[way], self.radii[:, way, None, None]
            own, norm = here * radius, here.square().sum(-1).sqrt()
            together = norm * self.operators[:, way, None, None]
            values = values + torch.minimum(together, own.sum(-1))
            by_value = by_value + torch.minimum(own, here.square() * (together / _above(norm * norm)).unsqueeze(-1))
            lengths = lengths + (self.lengths[:, way, None, None] + radius) * as_known[way]
        count = seen.sum(-1)
        floor = count * math.exp(least)
        terms = eps * (PAGE + (count / PAGE).ceil() + 2 * dv + 104)
        told = terms + 4 * eps * (log_mass.abs().nan_to_num(posinf=0.0) + 1)  # of the log-mass as a number
        loose = (1 + eps * (count + 4 * dv + 80)) * (1 + told)
        widest = far.amax(-1) if s else torch.zeros_like(top)
        size = (weight * lengths).sum(-1) / share
        error = (deviates(about_mean) + values + floor * widest) / share + terms * size * torch.exp(most)
        spread = (deviates(weight) + floor) / share + told
        nothing, away = mass == 0, most >= DOUBT
        error, spread = (torch.where(away, torch.inf, x * loose).masked_fill(nothing, 0.0) for x in (error, spread))
        found = Certified(Partial(mean, log_mass), error, spread, self._largest(seen, eps))
        a = about_mean + weight * torch.minimum(found.bound, found.largest).nan_to_num(posinf=0.0).unsqueeze(-1)
        by_key = torch.zeros_like(weight)
        for mask, gram, slope in parts:
            here = a * mask
            all_together = slope * gram / _above(here.square().sum(-1).sqrt())
            by_key = by_key + torch.minimum(here * growth, here.square() * all_together.unsqueeze(-1))
        return found, by_key / share.unsqueeze(-1), by_value / share.unsqueeze(-1)

    def _part(self, way: int, doubt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (mask (r, 1, m, s), gram (r, g, m), slope (r, g, m)) of the keys that are known in this way.

        slope is (exp(B) - 1) / B for the largest B of their bounds on |eta|.
        """
        mask = (self.key == way).unsqueeze(1)
        most = (doubt * mask).amax(-1) if doubt.shape[-1] else doubt.sum(-1)
        slope = torch.where(most > 0, torch.expm1(most) / _above(most), 1.0)
        return mask, self.grams[..., way], slope

    def _sum_of_values(self, weight: Tensor, as_known: list[Tensor]) -> Tensor:
        total = weight.new_zeros(*weight.shape[:-1], self.values.shape[-1])
        for way, mask in enumerate(as_known):
            pages = paged((weight * mask).flatten(1, 2)).transpose(1, 2)
            short = pages.shape[1] * PAGE - self.values.shape[2]
            v = pad(self.values[:, way], (0, 0, 0, short)).unflatten(1, (-1, PAGE))
            total = total + torch.matmul(pages, v).sum(1).view_as(total)
        return total

    def _distances(self, mean: Tensor, as_known: list[Tensor], eps: float) -> Tensor:
        """Return bounds (r, g, m, s) on the distances of the values, as they are known, to the mean (r, g, m, dv)."""
        own, dv = mean.norm(dim=-1, keepdim=True), mean.shape[-1]
        found = mean.new_zeros(*mean.shape[:-1], self.values.shape[2])
        for way, mask in enumerate(as_known):
            length = self.lengths[:, way, None, None]
            cross = torch.matmul(mean.flatten(1, 2), self.values[:, way].transpose(1, 2)).view_as(found)
            square = (length.square() - 2 * cross + own.square()).clamp_min(0)
            square = square + eps * (2 * dv + 32) * (length + own).square()
            found = torch.where(mask, square.sqrt(), found)
        return found

    def _largest(self, seen: Tensor, eps: float) -> Tensor:
        """Return a number (r, g, m) of at most the largest norm of a value that a query sees."""
        lower = self.lengths * (1 - eps * (4 * self.values.shape[-1] + 64)) - pad(self.radii, (0, 0, 0, 1))
        at = self.value.long().unsqueeze(1)
        lower = lower.clamp_min(0).unsqueeze(2).expand(-1, -1, at.shape[2], -1).gather(1, at) * seen
        most = lower.amax(-1) if seen.shape[-1] else lower.sum(-1)
        return torch.maximum(most, self.least.unsqueeze(1) * seen.any(-1))

    def raised(self, index: Tensor, where: Tensor, **new: Tensor) -> PlaneGlimpse:
        """Return what the queries see when some numbers of the tokens `index` (r, u) are known better.

        where  bool (r, m, u), True where they are
        new    the numbers (r, g, m, u), or (r, m, u), by the name of the field that they replace in part
        """
        changed: dict[str, Any] = {}
        for name, x in new.items():
            old = getattr(self, name)
            changed[name] = put(old, index, where, x)
        return replace(self, **changed)


def put(old: Tensor, index: Tensor, where: Tensor, new: Tensor) -> Tensor:
    """Return old (r, m, s) or (r, g, m, s) with its entries at index (r, u) replaced by new (..., u).

    where: bool (r, m, u), True for the queries for which they are.
    """
    between = old.ndim - 2
    at = index.view(len(index), *[1] * between, -1).expand(*old.shape[:-1], -1)
    where = where.unsqueeze(1) if between == 2 else where
    return old.scatter(-1, at, torch.where(where, new.to(old.dtype), old.gather(-1, at)))


def _above(x: Tensor) -> Tensor:
    """Return x, at least the smallest normal number of its dtype, to divide by."""
    return x.clamp_min(torch.finfo(x.dtype).tiny)
