"""Summarise the evicted tokens by exact sums of monomials of their keys, for a truncated exponential (Taylor).

In this file a row is one (batch item, kv head) stream. The features phi(u) of a vector u are its t monomials up to
degree g, scaled so that phi(q).phi(k) is the Taylor polynomial of e^(q.k) of degree g. A `Spec` holds the sizes and
constants of a cache, among them the number of rows, d and dv (the widths of a key and of a value), and the softcap on
logits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from kvfloor.core.fields import Field
from kvfloor.core.method import Guarantee, Traits
from kvfloor.core.partial import Partial
from kvfloor.core.rowwise import length
from kvfloor.core.spec import Spec
from kvfloor.core.summary import Summary, SummaryState, lots
from kvfloor.validation import count, positives

FEATURES_LIMIT = 10_000
_FEATURES_PER_ROW = 1 << 18  # of one product: tokens (or queries) x t
_LARGEST_EXPONENT = 700.0
_SHARED = "taylor/"
_UNIT = 2.0**-53  # of rounding


@dataclass(frozen=True)
class Taylor(Summary):
    """Summarise the evicted tokens by sums of key monomials, for weights that are Taylor polynomials of e^(q.k).

    An evicted token has the weight p(x) = sum over j <= g of x^j / j! instead of e^x, with x = scale q.k. One pass
    over the tokens suffices, and no token is kept.
    Law, with the scale put into q: let phi(u) have the entries u^a / sqrt(a!), one for each of the t = C(d+g, g) tuples
    a of d exponents with a sum <= g, where u^a = u_1^a_1 ... u_d^a_d and a! = a_1! ... a_d!. Then p(q.k) =
    phi(q).phi(k). So S = sum of phi(k) v^T (t x dv) and z = sum of phi(k) (t), over the evicted tokens, give the answer
    phi(q) S / phi(q) z. S and z are t (dv + 1) float64 numbers per row. The method is useful where |x| is below about
    2.

    degree  g. Even: every weight is positive for every query, so answers are convex combinations of the values. Odd:
            weights can be negative (for g = 1, p(x) = 1 + x is negative if x < -1). A query whose weights sum to 0 or
            less is answered without the evicted tokens
    radius  r of the guarantee below, which holds as long as |scale| |q| |k| <= radius for the longest query and the
            longest evicted key of each row. None: no guarantee
    Under a softcap c the series of exp(c tanh(x/c)) is used, without a guarantee. An even degree whose series is not
    positive for every x raises ValueError, and so do more than FEATURES_LIMIT = 10,000 features (t).

    Guarantee: let high and low be the largest and the least ratio p(x) e^-x for |x| <= r, and epsilon = high/low - 1.
    Then each evicted token's weight, divided by the sum of these weights, is its softmax weight among the evicted
    tokens times a factor in [1 - epsilon, 1 + epsilon]. This is certain, and holds for every query.
    Proof that high and low are ratios at x = -r, 0 or r: the ratio has the derivative -e^-x x^g / g!, so it is monotone
    for x <= 0 and for x >= 0. There is no guarantee if low <= 0 or epsilon >= 1.
    """

    name: ClassVar[str] = "taylor"
    paper: ClassVar[str] = "Addanki, Li, Song and Yang 2023 (arXiv 2311.14652), polynomial part; exact sums"
    degree: int = 2
    radius: float | None = None

    def __post_init__(self) -> None:
        count(self.name, degree=self.degree)
        if self.radius is not None:
            positives(self.name, radius=self.radius)

    @property
    def traits(self) -> Traits:
        return Traits(normalised=self.degree % 2 == 0)

    def open(self, spec: Spec) -> TaylorState:
        """Return an empty summary for the rows of `spec`.

        Raises ValueError where there are too many features, or where a softcap's series is not positive.
        """
        features = math.comb(spec.d + self.degree, self.degree)
        if features > FEATURES_LIMIT:
            fits = next(g for g in range(self.degree, -1, -1) if math.comb(spec.d + g, g) <= FEATURES_LIMIT)
            raise ValueError(
                f"{self.name}: degree {self.degree} in d = {spec.d} dimensions has C({spec.d + self.degree}, "
                f"{self.degree}) = {features:,} monomials, {8 * features * (spec.dv + 1):,} bytes per row; at most "
                f"{FEATURES_LIMIT:,} are allowed: d = {spec.d} takes degree {fits} or less"
            )
        return TaylorState(self, spec)

    def guarantee(self, spec: Spec) -> Guarantee | None:
        if self.radius is None or spec.softcap is not None:
            return None
        return bounded_by(
            relative_error(self.degree, self.radius),
            Guarantee(
                0.0,
                0.0,
                "relative, every coordinate, for values >= 0 (for others times the largest |value|), up to rounding",
                "every query",
                (f"scale |q| |k| <= {self.radius} for every query and evicted key", "epsilon < 1"),
                "the truncated exponential's ratio to the exponential; derived here",
            ),
        )

    def sized_for(self, epsilon: float, delta: float, spec: Spec) -> Taylor:
        """Return this summary with the least even degree whose guarantee has an error of at most epsilon.

        If this takes more than FEATURES_LIMIT features for keys of width spec.d, the largest even degree within the
        limit is used, and the error exceeds epsilon. If `radius` is None there is no guarantee, and the degree is 0.
        The failure probability delta is not used, as the error bound is certain.
        """
        del delta
        degree = 0
        while self.radius is not None and relative_error(degree, self.radius) > epsilon:
            if math.comb(spec.d + degree + 2, degree + 2) > FEATURES_LIMIT:
                break
            degree += 2
        return replace(self, degree=degree)


def bounded_by(epsilon: float, stated: Guarantee) -> Guarantee:
    """Return the error bound `stated` with this epsilon in place of its own, and with holds=False if epsilon >= 1."""
    why = "" if epsilon < 1 else f"epsilon = {epsilon:.3g} is vacuous: another degree is needed"
    return replace(stated, epsilon=epsilon, holds=not why, why=why)


def relative_error(degree: int, r: float) -> float:
    """Return the largest relative error of an answer with weights p(x) instead of e^x, for logits |x| <= r.

    p is the Taylor polynomial of e^x of this degree. The error is inf if p is 0 or negative for some such x.
    Law: high / low - 1, where low and high are the least and largest p(x) e^-x, which are taken at x = -r, 0 or r.
    """
    ratio = [1.0] + [_truncated(degree, x) for x in (-r, r)]
    return max(ratio) / min(ratio) - 1.0 + 4.0 * _UNIT if min(ratio) > 0 else math.inf


def _truncated(degree: int, x: float) -> float:
    """Return p(x) e^-x, where p is the Taylor polynomial of e^x of this degree.

    p is summed in exact rationals, because its terms nearly cancel for x < 0.
    """
    total = term = Fraction(1)
    for j in range(1, degree + 1):
        term *= Fraction(x) / j
        total += term
    return float(total) * math.exp(-x) if x > -_LARGEST_EXPONENT else math.inf


def series(degree: int, cap: float | None) -> list[float]:
    """Return the degree + 1 Taylor coefficients at 0 of exp(x), or of exp(cap tanh(x / cap)) under a softcap `cap`.

    The constant comes first. cap None: no softcap.
    """
    if cap is None:
        return [1.0 / math.factorial(j) for j in range(degree + 1)]
    bent, whole = [0.0] * (degree + 1), [1.0] + [0.0] * degree  # c tanh(x/c), and its exponential
    for j in range(degree):
        squares = sum(bent[i] * bent[j - i] for i in range(j + 1)) / cap**2
        bent[j + 1] = ((j == 0) - squares) / (j + 1)  # (c tanh)' = 1 - tanh^2
        whole[j + 1] = sum((i + 1) * bent[i + 1] * whole[j - i] for i in range(j + 1)) / (j + 1)  # E' = E (c tanh)'
    return whole


@dataclass(frozen=True)
class Monomials:
    """Hold a table of the t monomials of degree <= g in d variables, from which features are computed.

    Monomials are in ascending order of degree. Monomial 0 is the constant 1. Every other one is made from a monomial of
    one degree less, its parent, by multiplication with a variable:
        monomial[i] = monomial[parent[i-1]] * x[variable[i-1]] * factor[i-1]
    parent, variable  (t - 1,) index of the parent; index of the variable
    factor            (t - 1,) 1 / sqrt(e), where e is the variable's exponent in the monomial that is made
    degree            (t,) degree of each monomial
    """

    parent: Tensor
    variable: Tensor
    factor: Tensor
    degree: Tensor  # of each, ascending: (t,)

    def features(self, u: Tensor) -> Tensor:
        """Return phi(u) (..., t), float64: the scaled monomials of u (..., d).

        phi(u).phi(w) is the Taylor polynomial of e^(u.w) of degree g.
        """
        u = u.to(torch.float64)
        phi = u.new_ones(*u.shape[:-1], len(self.degree))
        start = 1
        for size in torch.bincount(self.degree).tolist()[1:]:
            made, stop = slice(start - 1, start - 1 + size), start + size
            phi[..., start:stop] = phi[..., self.parent[made]] * u[..., self.variable[made]] * self.factor[made]
            start = stop
        return phi


@lru_cache(maxsize=16)
def monomials(d: int, degree: int) -> Monomials:
    """Return the table of all monomials of degree <= `degree` in d variables."""
    parent, variable, factor, degrees = [], [], [], [0]
    last = [(0, 0, 0)]  # (index, last variable, its exponent) of the monomials of the current degree
    for g in range(1, degree + 1):
        fresh = []
        for index, top, exponent in last:
            for j in range(top, d):
                power = exponent + 1 if j == top else 1
                fresh.append((len(degrees), j, power))
                parent.append(index)
                variable.append(j)
                factor.append(power**-0.5)
                degrees.append(g)
        last = fresh
    return Monomials(
        torch.tensor(parent, dtype=torch.int64),
        torch.tensor(variable, dtype=torch.int64),
        torch.tensor(factor, dtype=torch.float64),
        torch.tensor(degrees, dtype=torch.int64),
    )


class TaylorState(SummaryState):
    """Hold the monomial sums of the evicted tokens, and the largest |k| and |q| of each row.

    moments (rows, t, dv + 1), float64: S = sum of phi(k) v^T, with z = sum of phi(k) as last column.
    longest_key (rows,) is the largest |k| of an evicted key, longest_query (rows,) the largest |q| of a query.
    """

    def __init__(self, summary: Taylor, spec: Spec) -> None:
        super().__init__(spec)
        table = monomials(spec.d, summary.degree)
        for f in fields(Monomials):
            self.shared[_SHARED + f.name] = getattr(table, f.name).to(spec.device)
        coefficients = series(summary.degree, spec.softcap)
        if spec.softcap is not None and summary.degree % 2 == 0 and not _positive(coefficients):
            raise ValueError(
                f"{summary.name}: the series of a capped exponential (softcap {spec.softcap}) to degree "
                f"{summary.degree} is not positive everywhere: take degree 2, whose series is"
            )
        weight = torch.tensor([a * math.factorial(j) for j, a in enumerate(coefficients)], dtype=torch.float64)
        self.shared[_SHARED + "weight"] = weight.to(spec.device)[self.shared[_SHARED + "degree"]]
        wide = {"dtype": torch.float64, "device": spec.device}
        self.moments = torch.zeros(spec.rows, len(table.degree), spec.dv + 1, **wide)
        self.longest_key = torch.zeros(spec.rows, **wide)
        self.longest_query = torch.zeros(spec.rows, **wide)
        self.radius = 0.0 if summary.radius is None else summary.radius

    @property
    def _step(self) -> int:
        """Return the number of a row's tokens (or queries) whose features are computed at a time, to bound memory.

        The number does not depend on how many rows there are, so the sums of a row round alike in every batch.
        """
        return max(1, _FEATURES_PER_ROW // self.moments.shape[1])

    def _features(self, u: Tensor) -> Tensor:
        return Monomials(*(self.shared[_SHARED + f.name] for f in fields(Monomials))).features(u)

    def absorb(self, row: Tensor, k: Tensor, v: Tensor, position: Tensor) -> None:
        del position
        for at, keys, values in lots(row, k, v):
            for start in range(0, keys.shape[1], self._step):
                some = slice(start, start + self._step)
                phi = self._features(keys[:, some]).transpose(1, 2)
                wide = values[:, some].to(torch.float64)
                self.moments[at] += torch.bmm(phi, torch.cat([wide, torch.ones_like(wide[..., :1])], -1))
            norms = length(keys.to(torch.float64)).amax(1)
            self.longest_key[at] = torch.maximum(self.longest_key[at], norms)

    def read(self, q: Tensor) -> Partial:
        pieces = [self._sums(q[:, i : i + self._step]) for i in range(0, max(1, q.shape[1]), self._step)]
        sums = pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)  # (rows, m, dv + 1)
        mass = sums[..., -1:]
        mean = torch.where(mass > 0, sums[..., :-1] / mass, 0.0)
        log_mass = torch.log(mass.squeeze(-1).clamp_min(0.0))
        return Partial(mean.to(self.spec.compute_dtype), log_mass.to(self.spec.compute_dtype))

    def _sums(self, q: Tensor) -> Tensor:
        phi = self._features(q.to(torch.float64) * self.spec.scale) * self.shared[_SHARED + "weight"]
        return torch.bmm(phi, self.moments)

    def on_queries(self, q: Tensor) -> None:
        if self.radius and q.numel():
            norms = length(q.to(torch.float64)).amax((1, 2))
            self.longest_query = torch.maximum(self.longest_query, norms)

    def fields(self) -> dict[str, Any]:
        length = Field(torch.float64, (self.spec.rows,), least=0)
        return {"longest_key": length, "longest_query": length}

    def guarantee(self, stated: Guarantee) -> Guarantee:
        """Return the error bound `stated` with another epsilon: the one for the logits that can have occurred so far.

        `stated` is the bound for logits up to `radius`. Let r be the largest product |scale| |q| |k| of the longest
        query and the longest evicted key of a row, over all rows: no logit so far exceeds it. If r exceeds the radius,
        the result has holds=False. Otherwise its epsilon is that for logits up to r, plus a bound on rounding errors,
        which grow with the number of tokens, the number of features and e^(2r).
        """
        r = float((self.longest_key * self.longest_query).max()) * abs(self.spec.scale)
        if r > self.radius * (1.0 + 1e-12):  # the rounding of a norm
            why = f"a logit of {r:.4g} was possible, radius is {self.radius}"
            return replace(stated, holds=False, why=why)
        terms = self.moments.shape[1] + float(self.moments[:, 0, -1].max())
        rounding = 2.0 * terms * _UNIT * math.exp(min(2.0 * r, _LARGEST_EXPONENT))
        degree = int(self.shared[_SHARED + "degree"][-1])
        return bounded_by(relative_error(degree, r) + rounding, stated)


def _positive(coefficients: list[float]) -> bool:
    """Return True if sum_j coefficients[j] x^j is positive for every real x."""
    highest = np.trim_zeros(coefficients[::-1], "f")
    if len(highest) % 2 == 0 or highest[0] < 0:  # of odd degree, or falling on both sides
        return False
    roots = np.roots(highest)
    return not bool((np.abs(roots.imag) < 1e-9).any())
