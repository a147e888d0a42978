"""Summarise the evicted tokens by uniform samples of their values, with logit 0 (Haris and Onak 2025, Algorithm 1).

In this file a row is one (batch item, kv head) stream, and dv the width of a value. The unmasked law gives every
evicted token the logit 0 instead of -inf, i.e. the weight 1. A draw, or sample, is the value of one randomly chosen
evicted token. An answer is the median of Q means (the argument `groups`), each of T draws (`copies`). A `Spec` holds
the sizes and constants of a cache, such as dv and the seed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvfloor.core.fields import Field
from kvfloor.core.method import Guarantee, Traits
from kvfloor.core.partial import Partial
from kvfloor.core.randomness import row_keys, uniform
from kvfloor.core.spec import Spec
from kvfloor.core.summary import Summary, SummaryState, equal_lots
from kvfloor.validation import count, positives

_DRAWS_AT_ONCE = 1 << 20  # bounds the keys drawn in one product: rows x tokens x samples


@dataclass(frozen=True)
class ValueSample(Summary):
    """Summarise the evicted tokens by reservoir samples of their values, which estimate the mean value.

    The summary `value_sum` keeps the exact mean in less memory.
    Law (Haris and Onak 2025, section 4, Algorithm 1, Theorems 23 and 24): under the unmasked law, attention over the c
    evicted tokens has the total weight c and the mean of their values as result. The samples estimate this mean;
    attention over the held tokens is exact. In the paper an answer is one value, drawn by its weight from the held
    tokens and a reservoir of evicted values (method `window_sample`). The form here has the same expectation and no
    more variance (Rao-Blackwell).

    copies    T: independent samples in a mean; 1 unless given
    groups    Q: number of such means, whose coordinatewise median is the answer; odd, 1 unless given
    epsilon, delta   instead of copies and groups: T = 8 spread / epsilon^2,
                     Q = the next odd number >= 2.5 ln(horizon dv / delta)
    spread, horizon  for the guarantee: evicted values lie in [a, spread * a] for an a > 0, and at most
                     `horizon` tokens are evicted

    Guarantee, for a stream fixed beforehand: with probability 1 - delta, the error of every coordinate of every answer,
    to any query at any time, is at most epsilon times the coordinate's exact value. Proof: a drawn value's variance is
    at most spread times its squared expectation. So each mean of T draws has a relative error above epsilon with
    probability <= 1/8 (Chebyshev). For a median of Q means this probability is <= exp(-Q KL(1/2 || 1/8)) <= exp(-Q /
    2.5), where KL is the relative entropy of two coins with these chances. There are horizon * dv such medians. (The
    paper has 3 instead of 8 and 12 ln instead of 2.5 ln, for means that fail with probability 1/3. These constants do
    not fit together: with 1/3, the exponent is Q / 17.)
    """

    name: ClassVar[str] = "value_sample"
    paper: ClassVar[str] = "Haris and Onak 2025 (arXiv 2502.15955), Algorithm 1, Theorems 23 and 24; Rao-Blackwell form"
    copies: int | None = None
    groups: int | None = None
    epsilon: float | None = None
    delta: float = 0.1
    spread: float | None = None
    horizon: int | None = None

    def __post_init__(self) -> None:
        check_sampling(self.name, self.copies, self.groups)
        for name in ("epsilon", "spread"):
            if getattr(self, name) is not None:
                positives(self.name, **{name: getattr(self, name)})
        if not (isinstance(self.delta, float) and 0 < self.delta < 1):
            raise ValueError(f"{self.name}: delta must lie in (0, 1), got {self.delta!r}")
        if self.spread is not None and self.spread < 1:
            raise ValueError(f"{self.name}: spread is largest over least value, so at least 1, got {self.spread!r}")
        if self.horizon is not None:
            count(self.name, least=1, horizon=self.horizon)
        if self.epsilon is not None:
            if self.copies is not None or self.groups is not None:
                raise ValueError(f"{self.name}: give copies and groups, or an epsilon that they follow from, not both")
            if self.spread is None or self.horizon is None:
                raise ValueError(f"{self.name}: epsilon needs the spread of the values and a horizon in tokens")

    @property
    def traits(self) -> Traits:
        mean = self.epsilon is None and self.groups in (None, 1)  # a median mixes coordinates of different tokens
        return Traits(reference="unmasked", normalised=mean, value_linear=mean, turns=True)

    def sizes(self, dv: int) -> tuple[int, int]:
        """Return the number T of samples in a mean and the number Q of means, for values of width dv."""
        if self.epsilon is None:
            return self.copies or 1, self.groups or 1
        assert self.spread is not None and self.horizon is not None
        return sizes_for(self.epsilon, self.delta, self.spread, self.horizon * dv)

    def open(self, spec: Spec) -> ValueSampleState:
        return ValueSampleState(self, spec)

    def guarantee(self, spec: Spec) -> Guarantee | None:
        """Return the error bound for the median of Q means of T samples (Theorem 24).

        The bound holds at once for all dv coordinates of the estimates after each of up to `horizon` evicted tokens;
        `spec` gives dv. Returns None if `spread` or `horizon` is None, or if there are so few groups that the failure
        probability would be 1 or more.
        """
        if self.spread is None or self.horizon is None:
            return None
        t, q = self.sizes(spec.dv)
        return median_of_means(
            t,
            q,
            self.spread,
            self.horizon * spec.dv,
            "every query, for a stream fixed beforehand",
            (f"evicted values lie in [a, {self.spread} a] for some a > 0", f"at most {self.horizon} tokens leave"),
        )

    def sized_for(self, epsilon: float, delta: float, spec: Spec) -> ValueSample:
        del spec
        if self.spread is None or self.horizon is None or not (epsilon > 0 and delta > 0):
            return self
        return replace(self, copies=None, groups=None, epsilon=epsilon, delta=delta)


def check_sampling(owner: str, copies: int | None, groups: int | None) -> None:
    """Raise ValueError unless copies and groups, where given, are whole numbers >= 1 and groups is odd.

    owner: the method's name, for the error.
    """
    given = {"copies": copies, "groups": groups}
    count(owner, least=1, **{name: value for name, value in given.items() if value is not None})
    if groups is not None and groups % 2 == 0:
        raise ValueError(f"{owner}: groups must be odd, so that there is a middle mean, got {groups}")


def sizes_for(epsilon: float, delta: float, spread: float, answers: int) -> tuple[int, int]:
    """Return (T, Q) for which `answers` medians of Q means of T draws all have a relative error of at most epsilon.

    This holds with probability 1 - delta, if the variance of a draw is at most spread times its squared expectation. A
    draw is one coordinate of the value of a randomly chosen token, and errors are relative to its expectation. Q is
    odd.
    """
    q = math.ceil(2.5 * math.log(answers / delta))
    return math.ceil(8.0 * spread / epsilon**2), max(1, q + 1 - q % 2)


def median_of_means(
    t: int, q: int, spread: float, answers: int, quantifier: str, assumptions: tuple[str, ...]
) -> Guarantee | None:
    """Return the error bound of `answers` medians of q means of t draws, or None if its failure probability is >= 1.

    A draw is one coordinate of the value of a randomly chosen token; its variance must be at most spread times its
    squared expectation, to which errors are relative. The texts `quantifier` (the answers and streams that the bound
    holds for) and `assumptions` are only copied into the result.
    """
    delta = answers * math.exp(-q / 2.5)
    if delta >= 1:
        return None
    return Guarantee(
        math.sqrt(8.0 * spread / t),
        delta,
        "relative, every coordinate, against the unmasked law",
        quantifier,
        assumptions,
        "Haris and Onak 2025, Theorem 24; constants corrected",
    )


def out_of_range(least: Tensor, largest: Tensor, spread: float) -> str:
    """Return "" if the values of each row lie in an interval [a, spread * a], a > 0; otherwise a text with the reason.

    least (rows,) and largest (rows,) are the least and the largest entry of each row's values. Each row has an interval
    of its own.
    """
    low, high = float(least.min()), float(largest.max())
    if low <= 0:
        return f"a value of {low:.4g} was seen"
    if bool((largest > spread * least).any()):
        return f"values from {low:.4g} to {high:.4g} were seen"
    return ""


class ValueSampleState(SummaryState):
    """Hold T Q sampled values per row, the number of evicted tokens, and the range of their values.

    value           (rows, T Q, dv) sampled values, each in a slot of its own
    key             (rows, T Q) sampling key of each sampled value
    count           (rows,) number of evicted tokens
    least, largest  (rows,) least and largest entry of all evicted values
    A sampling key is a uniform random number, one for each pair of evicted token and slot. It is fixed by the seed, the
    identity number of the row, the token's position in the stream, and the slot's index. Each slot keeps the value of
    the token with the smallest sampling key for this slot. So each slot is a uniform draw from all evicted tokens,
    independent of the other slots, and the same however the stream is split into calls.
    """

    def __init__(self, summary: ValueSample, spec: Spec) -> None:
        super().__init__(spec)
        self.copies, self.groups = summary.sizes(spec.dv)
        self.spread = 0.0 if summary.spread is None else summary.spread
        self.horizon = 0 if summary.horizon is None else summary.horizon
        rows, samples, wide = spec.rows, self.copies * self.groups, spec.compute_dtype
        self.value = torch.zeros(rows, samples, spec.dv, dtype=spec.dtype, device=spec.device)
        self.key = torch.full((rows, samples), torch.inf, dtype=torch.float64, device=spec.device)
        self.count = torch.zeros(rows, dtype=torch.int64, device=spec.device)
        self.least = torch.full((rows,), torch.inf, dtype=wide, device=spec.device)
        self.largest = torch.full((rows,), -torch.inf, dtype=wide, device=spec.device)

    def absorb(self, row: Tensor, k: Tensor, v: Tensor, position: Tensor) -> None:
        del k
        for at, values, places in equal_lots(row, v, position):
            step = max(1, _DRAWS_AT_ONCE // (len(at) * self.key.shape[1]))
            for start in range(0, values.shape[1], step):
                self._sample(at, values[:, start : start + step], places[:, start : start + step])
            wide = values.to(self.least.dtype)
            self.least[at] = torch.minimum(self.least[at], wide.amin((1, 2)))
            self.largest[at] = torch.maximum(self.largest[at], wide.amax((1, 2)))
            self.count[at] += values.shape[1]

    def _sample(self, at: Tensor, v: Tensor, position: Tensor) -> None:
        """Update the samples of rows `at` (r,) by c newly evicted tokens each, with values v (r, c, dv).

        position (r, c) has the tokens' positions in the stream, which fix their sampling keys. A slot's sample is
        replaced if a new token has a smaller sampling key for the slot.
        """
        samples = self.key.shape[1]
        lane = row_keys(self.spec.seed, self.spec.ids(), "value sample")[at].view(-1, 1, 1)
        key = uniform(lane, position.unsqueeze(2) * samples + torch.arange(samples, device=v.device))
        best, token = key.min(1)  # (r, samples)
        better = best < self.key[at]
        drawn = v.gather(1, token.unsqueeze(-1).expand(-1, -1, v.shape[-1]))
        self.value[at] = torch.where(better.unsqueeze(-1), drawn, self.value[at])
        self.key[at] = torch.minimum(best, self.key[at])

    def fields(self) -> dict[str, Any]:
        return {
            "value": Field(self.spec.dtype, tuple(self.value.shape), finite=True),
            "key": Field(torch.float64, tuple(self.key.shape), least=0),
        }

    def read(self, q: Tensor) -> Partial:
        mean = middle(self.value.to(self.spec.compute_dtype), self.copies, self.groups)
        log_mass = torch.log(self.count.to(torch.float64)).to(mean.dtype)  # log 0 = -inf: nothing absorbed
        m = q.shape[1]
        return Partial(mean.unsqueeze(1).expand(-1, m, -1), log_mass.unsqueeze(1).expand(-1, m))

    def guarantee(self, stated: Guarantee) -> Guarantee:
        absorbed = int(self.count.max())
        if absorbed > self.horizon:
            return replace(stated, holds=False, why=f"{absorbed} tokens left, more than the horizon")
        why = out_of_range(self.least, self.largest, self.spread) if absorbed else ""
        return replace(stated, holds=False, why=why) if why else stated


def middle(draws: Tensor, copies: int, groups: int) -> Tensor:
    """Return the coordinatewise median (..., dv) of `groups` means, each of `copies` sampled values.

    draws (..., copies * groups, dv) are the sampled values.
    """
    means = draws.unflatten(-2, (groups, copies)).mean(-2)
    return means.squeeze(-2) if groups == 1 else means.median(-2).values
