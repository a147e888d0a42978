"""Compute attention over tokens of which some are known only by their codes, with a bound on its error.

A coded token's true key and value differ from the decoded ones by residuals, of which some sizes are known. Its logit
then errs by some eta. In shapes, r are rows, i.e. (batch item, kv head) streams, m queries, s tokens of a row, d and dv
the widths of a key and a value. The bounds and their proofs are in docs/certificates.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvfloor.certify.certified import Certified
from kvfloor.certify.chance import Dither, WeighedTokens, chance_bound
from kvfloor.certify.rounding import LEAST, unit
from kvfloor.core.partial import Partial

PAGE = 256  # tokens summed at a time, so that a long sum's rounding grows with its pages and not with its terms
_HEAVY = 64  # most tokens that are bounded one by one beside the Gram bound of the rest
DOUBT = 30.0  # a logit that may err by more bounds nothing


@dataclass(frozen=True)
class Glimpse:
    """Hold what m queries per row see of s tokens: their logits, how far these may err, and the tokens' values.

    logits    (r, m, s) logits of the keys at hand; -inf for a token that a query does not see
    doubt     (r, m, s) bound on |eta| of each token, rounding included
    rounding  (r, m, s) the part of it that is due to rounding
    coded     bool (r, m, s), True for tokens that are known by their codes only
    gram      (r, m) bound on the root of the sum of eta^2 over a row's coded tokens, without rounding
    v         (r, s, dv) the values at hand
    length    (r, s) bound on their norms
    radius    (r, s) bound on the norm of a value's residual
    operator  (r,) bound on the operator norm of the matrix of the row's value residuals
    index     (r, m, c) tokens whose values are replaced, None: none
    change    (r, m, c, dv) what is added to these tokens' values
    dither    what the residuals' law is, where they are random; None: they are not
    """

    logits: Tensor
    doubt: Tensor
    rounding: Tensor
    coded: Tensor
    gram: Tensor
    v: Tensor
    length: Tensor
    radius: Tensor
    operator: Tensor
    index: Tensor | None = None
    change: Tensor | None = None
    dither: Dither | None = None

    def rows(self, index: Tensor) -> Glimpse:
        """Return what the queries of the rows `index` see."""
        kept: dict[str, Any] = {n: x[index] for n, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **kept, dither=None if self.dither is None else self.dither.rows(index))

    def fetched(self, index: Tensor, real: Tensor, logits: Tensor, eta: Tensor, change: Tensor) -> Glimpse:
        """Return what the queries see once the tokens `index` (r, m, c) are known exactly, where `real` is True.

        logits  (r, m, c) their exact logits
        eta     (r, m, c) their logits' errors before the softcap: they leave the Gram bound
        change  (r, m, c, dv) true value minus decoded value
        """
        rounding = self.rounding.gather(-1, index)
        known = ((eta.abs() - rounding).clamp_min(0).square() * real).sum(-1)
        gram = (self.gram.square() - known).clamp_min(0).sqrt()

        def put(x: Tensor, new: Tensor) -> Tensor:
            return x.scatter(-1, index, torch.where(real, new, x.gather(-1, index)))

        doubt = torch.minimum(self.doubt, gram.unsqueeze(-1) + self.rounding)
        return replace(
            self,
            logits=put(self.logits, logits),
            doubt=put(doubt, rounding),
            coded=put(self.coded, torch.zeros_like(real)),
            gram=gram,
            index=index,
            change=change * real.unsqueeze(-1),
        )

    def answer(self, delta: float = 0.0) -> tuple[Certified, Tensor]:
        """Return attention over all tokens with its bound (r, m), and each token's share in the bound (r, m, s).

        delta: the probability with which the bound may fail; 0: it always holds.
        A token's share is its own bound on the error that its code causes, relative to the mass; -1 for a token that is
        known exactly or not seen.
        """
        dtype, s = self.logits.dtype, self.logits.shape[-1]
        eps, least = unit(dtype), LEAST[dtype]
        seen, top, weight, mass = weighed(self.logits)
        share = mass.clamp_min(1.0)  # the largest weight is 1
        mean = self._sum_of_values(weight) / share.unsqueeze(-1)
        log_mass = top + mass.log()
        coded = self.coded & seen
        doubt = self.doubt.clamp_max(DOUBT) * seen
        most = doubt.amax(-1) if s else torch.zeros_like(top)
        growth, slope = torch.expm1(doubt), torch.expm1(most) / most.clamp_min(torch.finfo(dtype).tiny)
        far = self._distances(mean, eps) * seen
        about_mean, away = weight * far, most >= DOUBT

        def deviates(a: Tensor) -> Tensor:
            return deviation(a, growth, self.rounding, coded, self.gram, slope)

        grown = weight * (1 + growth) * coded
        radius = self.radius.unsqueeze(1)
        values = torch.minimum(grown.square().sum(-1).sqrt() * self.operator.unsqueeze(1), (grown * radius).sum(-1))
        lengths = (weight * (self.length + self.radius).unsqueeze(1)).sum(-1) / share
        count = seen.sum(-1)
        floor = count * math.exp(least)
        terms = eps * (PAGE + (count / PAGE).ceil() + 2 * self.v.shape[-1] + 96)
        told = terms + 4 * eps * (log_mass.abs().nan_to_num(posinf=0.0) + 1)  # of the log-mass as a number
        loose = (1 + eps * (count + 4 * self.v.shape[-1] + 64)) * (1 + told)
        widest = far.amax(-1) if s else torch.zeros_like(top)
        error = (deviates(about_mean) + values + floor * widest) / share + terms * lengths * torch.exp(most)
        spread = (deviates(weight) + floor) / share + told
        nothing = mass == 0
        error, spread = (torch.where(away, torch.inf, x * loose).masked_fill(nothing, 0.0) for x in (error, spread))
        contribution = ((about_mean * growth + grown * radius) / share.unsqueeze(-1)).masked_fill(~coded, -1.0)
        found = Certified(Partial(mean, log_mass), error, spread, self._largest(seen, eps))
        if self.dither is not None and delta:
            low = torch.minimum(
                (weight * coded).square().sum(-1).sqrt() * self.operator.unsqueeze(1), (weight * coded * radius).sum(-1)
            )
            fetched = 0 if self.index is None else self.index.shape[-1]
            sums = WeighedTokens(
                *(weight, far + radius * coded, doubt, self.rounding, coded, self.length, low, share, floor, fetched),
                *(self.v.shape[-1], eps),
            )
            chance = chance_bound(self.dither, delta, sums, terms * lengths, loose, told)
            chance = torch.where(away, torch.inf, chance).masked_fill(nothing, 0.0)
            found = replace(found, chance=chance, delta=delta)
        return found, contribution

    def _sum_of_values(self, weight: Tensor) -> Tensor:
        pages = paged(weight).transpose(1, 2)
        short = pages.shape[1] * PAGE - self.v.shape[1]
        total = torch.matmul(pages, pad(self.v, (0, 0, 0, short)).unflatten(1, (-1, PAGE))).sum(1)
        if self.index is None or self.change is None:
            return total
        return total + torch.matmul(weight.gather(-1, self.index).unsqueeze(-2), self.change).squeeze(-2)

    def _distances(self, mean: Tensor, eps: float) -> Tensor:
        """Return bounds (r, m, s) on the distances of the values to the mean (r, m, dv)."""
        length, own = self.length.unsqueeze(1), mean.norm(dim=-1, keepdim=True)
        square = length.square() - 2 * torch.matmul(mean, self.v.transpose(1, 2)) + own.square()
        square = square.clamp_min(0) + eps * (2 * self.v.shape[-1] + 32) * (length + own).square()
        return square.sqrt() + self.radius.unsqueeze(1) * ~self.coded

    def _largest(self, seen: Tensor, eps: float) -> Tensor:
        """Return a number (r, m) of at most the largest norm of a value that a query sees."""
        least = (self.length * (1 - eps * (4 * self.v.shape[-1] + 64)) - self.radius).clamp_min(0)
        seen_lengths = least.unsqueeze(1) * seen
        return seen_lengths.amax(-1) if seen.shape[-1] else seen_lengths.sum(-1)


def weighed(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the weights of logits (..., s), relative to the largest: return (seen, top, weight, mass).

    seen    (..., s), False where a logit is -inf
    top     (...) the largest logit, 0 where there is none
    weight  (..., s) exp(logit - top), 0 where nothing is seen
    mass    (...) the sum of the weights
    """
    seen = logits > -torch.inf
    top = logits.amax(-1) if logits.shape[-1] else logits.new_full(logits.shape[:-1], -torch.inf)
    top = torch.where(top == -torch.inf, 0.0, top)
    weight = (logits - top.unsqueeze(-1)).clamp_min(LEAST[logits.dtype]).exp() * seen
    return seen, top, weight, paged(weight).sum(-1).sum(-1)


def paged(weight: Tensor) -> Tensor:
    """Return weights (r, m, s) in pages: (r, m, pages, 256), at least one page, zeros after the last token."""
    pages = max(1, -(-weight.shape[-1] // PAGE))
    return pad(weight, (0, pages * PAGE - weight.shape[-1])).unflatten(-1, (pages, PAGE))


def deviation(a: Tensor, growth: Tensor, rounding: Tensor, coded: Tensor, gram: Tensor, slope: Tensor) -> Tensor:
    """Return a bound (r, m) on the sum of a_i |exp(eta_i) - 1| for a >= 0 (r, m, s).

    It is the least of: each token by its own bound; the heaviest j coded tokens by their own bounds and the rest
    by the Gram bound, for j = 0 .. 64.
    growth  (r, m, s) exp(bound on |eta|) - 1
    slope   (r, m) (exp(B) - 1) / B for the largest B of these bounds
    """
    each = a * growth
    by_token = each.sum(-1)
    count = min(_HEAVY, a.shape[-1])
    heavy, index = (each * coded).topk(count, -1)
    plain = a * coded
    rest = plain.scatter(-1, index, 0.0).square().sum(-1, keepdim=True)
    own = plain.gather(-1, index).square()
    after = rest + pad(own.flip(-1).cumsum(-1).flip(-1), (0, 1))
    first = pad(heavy.cumsum(-1), (1, 0))
    split = first + slope.unsqueeze(-1) * gram.unsqueeze(-1) * after.sqrt()
    apart = (each * ~coded).sum(-1) + slope * (plain * rounding).sum(-1)
    return torch.minimum(by_token, split.amin(-1) + apart)
