"""Bound the error of attention from dithered codes with a probability: the theorem is in docs/certificates.md.

Residuals of dithered codes are independent, of mean 0 and uniform. So the errors that they cause in a sum over tokens
mostly cancel, and a bound that holds with probability 1 - delta is several times less than one that always holds. In
shapes, r are rows, i.e. (batch item, kv head) streams, m queries, s tokens of a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from kvfloor.validation import count, within

FIRST = 8
"""Tokens of the first fetch; with each further one twice as many are known."""
_UNFETCHED = 0.9  # share of delta of the answers from codes alone; fetches have the rest
_OFF = 2.0**-15  # a dither of 16 bits leaves a mean of less than 2^-17 steps; a bound on |eta| counts half steps


@dataclass(frozen=True)
class Dither:
    """Hold what is known of the residuals of dithered codes before the dither is drawn.

    square  (r, m, s) sum over a key's channels of (scale q_j step_j / 2)^2, 0 for tokens that are not coded
    widest  (r, m, s) sum over them of |scale q_j step_j / 2|
    step    (r, s) step of a value's rotated entries, None: the values' residuals are bounded in another way
    """

    square: Tensor
    widest: Tensor
    step: Tensor | None

    def rows(self, index: Tensor) -> Dither:
        """Return what is known of the rows `index`."""
        kept: dict[str, Any] = {n: x[index] for n, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **kept)


@dataclass(frozen=True)
class WeighedTokens:
    """Hold what the answer from codes has summed over tokens, on which the bound rests.

    weight    (r, m, s) estimated weights, relative to the largest; 0 for tokens that a query does not see
    far       (r, m, s) bound on the distances of the values to the estimated mean, residuals included
    doubt     (r, m, s) bound on the error of each token's logit, rounding included
    rounding  (r, m, s) the part of it that is due to rounding
    coded     bool (r, m, s), True for tokens that are seen, and known by their codes only
    length    (r, s) bound on the norms of the values at hand
    values    (r, m) a bound that always holds on the norm of the sum of weights times values' residuals
    mass      (r, m) the sum of the weights
    floor     (r, m) bound on what was added to weights that are too small for the dtype
    fetched   number of tokens, at most, that were chosen by what the codes say, and fetched
    width     numbers of a value
    eps       one rounding of the dtype in which these were computed
    """

    weight: Tensor
    far: Tensor
    doubt: Tensor
    rounding: Tensor
    coded: Tensor
    length: Tensor
    values: Tensor
    mass: Tensor
    floor: Tensor
    fetched: int
    width: int
    eps: float


@lru_cache(maxsize=1024)
def reach_of_norm(log_odds: float, dimensions: int = 1) -> float:
    """Return k: the norm of a sum is at most k times its deviation, except with probability exp(-log_odds).

    Let Y_i be independent, E Y_i = 0 and E exp(t Y_i) <= exp(t^2 s_i^2 / 2) for all t, and u_i fixed vectors.
    dimensions = 1: ||sum Y_i u_i|| is at most k times the root of sum s_i^2 ||u_i||^2, in a space of any dimension.
    dimensions = D: if the sum of s_i^2 u_i u_i^T is s^2 times the identity of D dimensions, the norm is at most k s.
    k^2 is the x >= D for which (x - D - D log(x / D)) / 2 = log_odds (chi-squared of D degrees, Chernoff's bound). The
    proof is in docs/certificates.md; the inequality is that of Hsu, Kakade and Zhang 2012 (arXiv 1110.2842), sharper.
    """
    low = float(dimensions)
    high = low + 2 * math.sqrt(low * log_odds) + 2 * log_odds
    for _ in range(200):
        middle = (low + high) / 2
        small = (middle - dimensions - dimensions * math.log(middle / dimensions)) / 2 < log_odds
        low, high = (middle, high) if small else (low, middle)
    return math.sqrt(high) * (1 + 1e-12)


def log_odds(delta: float, fetched: int, tokens: int) -> float:
    """Return log(1 / probability) that each bound may fail with, so that all that an answer could have fail by delta.

    The tokens fetched are chosen by what the codes say. So a bound on the error of the others must hold for every
    choice of at most `fetched` of `tokens`, of which there are at most (e tokens / fetched)^fetched. Bounds from the
    codes alone fail with 0.9 delta, those after the k-th fetch with 0.1 delta / 2^k.
    """
    if not fetched:
        return -math.log(_UNFETCHED * delta)
    stage = max(0, math.ceil(math.log2(fetched / FIRST))) + 1
    choices = tokens * math.log(2)
    if fetched < tokens:
        choices = min(choices, fetched * (1 + math.log(tokens / fetched)))
    return stage * math.log(2) - math.log((1 - _UNFETCHED) * delta) + choices


def _reaches(delta: float, fetched: int, tokens: Tensor, dimensions: int) -> Tensor:
    """Return `reach_of_norm` (r, m) for queries that see so many coded tokens, (r, m), those fetched included."""
    counts, place = (tokens if fetched else torch.zeros_like(tokens)).unique(return_inverse=True)
    each = [reach_of_norm(log_odds(delta, fetched, count), dimensions) for count in counts.tolist()]
    return torch.tensor(each, dtype=torch.float64, device=tokens.device)[place]


def delta_of_answer(delta: float, heads: int, layers: int, steps: int) -> float:
    """Return the delta of one answer with which the bounds of a whole generation all hold with probability 1 - delta.

    heads: query heads of a layer; layers: those that are compressed; steps: tokens whose queries are answered, the
    prompt's included. By the union bound it is delta / (heads layers steps). This holds for queries, keys and values
    that do not depend on the dither. In a generation they do, through earlier answers: see docs/certificates.md.
    """
    within("delta", delta, 0.0, 1.0, low_open=True, high_open=True)
    count("delta_of_answer", least=1, heads=heads, layers=layers, steps=steps)
    return delta / (heads * layers * steps)


def deviation(square: Tensor, widest: Tensor) -> Tensor:
    """Return s (...) with E exp(t Y) <= exp(t^2 s^2 / 2) for all t, where Y is exp(-eta) minus its mean.

    eta is a sum of independent terms, uniform on [-a_j, a_j]. square: the sum of a_j^2; widest: that of a_j.
    """
    return (square / 3).sqrt() + (torch.expm1(widest) - widest) / 2


def bias(square: Tensor, off: Tensor, share: Tensor) -> Tensor:
    """Return bounds (r, m, s) on |E exp(-eta) - 1 - b| for one number b (r, m) that is the same for all tokens.

    Weights times values minus their mean sum to zero, so b times the weights leaves no error. square: as for
    `deviation`, 0 for a token whose eta is 0; off: bound on exp(the fixed part of eta) - 1; share: estimated weights
    that sum to 1, by which b is chosen.
    """
    most, least = torch.expm1(square / 6), square / 6 * (1 - 2.0**-10)  # the sums of squares are rounded
    b = (share * most).sum(-1, keepdim=True)
    return (most - b).abs() + (most - least) + off * (1 + most)


def chance_bound(
    dither: Dither, delta: float, given: WeighedTokens, own: Tensor, loose: Tensor, told: Tensor
) -> Tensor:
    """Return a bound (r, m) on the norm of estimated minus true mean, which fails with probability delta at most.

    delta  above 0, at most 1/2
    own    (r, m) what summation's rounding makes of the mean
    loose  (r, m) factor for the rounding of the sums below
    told   (r, m) relative error of the mass
    """
    weight, far, doubt, rounding = (x.double() for x in (given.weight, given.far, given.doubt, given.rounding))
    coded, mass = given.coded, given.mass.double()
    square, widest = dither.square.double() * coded, dither.widest.double() * coded
    tokens = coded.sum(-1) + given.fetched
    share = delta if dither.step is None else delta / 2  # for keys as for values
    true = weight * doubt.exp()  # at least the true weights
    off = torch.expm1(_OFF * widest + rounding * coded)  # of the part of eta that is not random
    spread = true * (1 + off) * deviation(square, widest)
    k = _reaches(share, given.fetched, tokens, 1)
    mean = true * bias(square, off, weight / mass.unsqueeze(-1)) + weight * torch.expm1(rounding)

    def total(size: Tensor) -> Tensor:
        return k * (spread * size).square().sum(-1).sqrt() + (mean * size).sum(-1)

    floor, values = given.floor.double(), given.values.double()
    if dither.step is not None:
        step, length = dither.step.double(), given.length.double()
        of_codes = weight * coded
        drift = step * (given.width**0.5 * 2.0**-16) + 32 * given.eps * length
        noise = (of_codes * step.unsqueeze(1)).square().sum(-1).div(12).sqrt()
        chance = _reaches(share, given.fetched, tokens, given.width) * noise + (of_codes * drift.unsqueeze(1)).sum(-1)
        values = torch.minimum(values, chance)
    furthest = far.amax(-1) if far.shape[-1] else torch.zeros_like(mass)
    error = (total(far) + values + floor * furthest) / mass * loose + own
    lost = (total(torch.ones_like(far)) + floor) / mass * loose + told
    bound = torch.where(lost < 1, error / (1 - lost), torch.inf)
    return torch.where(bound >= 0, bound, torch.inf).to(own.dtype) * (1 + 2 * given.eps)
