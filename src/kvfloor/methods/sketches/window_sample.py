"""Answer with the value of one token, drawn by its unmasked attention weight (Haris and Onak 2025, Algorithm 1).

In this file a row is one (batch item, kv head) stream. The window is the newest tokens of a row, at most the budget.
Unmasked window attention gives every older token the logit 0 instead of -inf, i.e. the weight 1. A draw is one randomly
chosen token, whose value is the answer or enters a mean of several draws. The reservoir holds the drawn values of older
tokens. A `Partial` is a result of attention: the mean of values and the log-mass (log-sum-exp of logits). In shapes, m
are queries per row, s slots (places of held tokens), d and dv the widths of a key and a value. A `Spec` holds the sizes
and constants of a cache, such as these widths and the seed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvfloor.core.attend import weigh
from kvfloor.core.blocked import Blocked
from kvfloor.core.budget import Budget, tokens
from kvfloor.core.fields import require_equal
from kvfloor.core.method import Guarantee, Method, Traits
from kvfloor.core.partial import Partial
from kvfloor.core.randomness import row_keys, uniform
from kvfloor.core.slots import Slots
from kvfloor.core.spec import Spec
from kvfloor.methods.summaries.value_sample import (
    ValueSample,
    check_sampling,
    median_of_means,
    middle,
    out_of_range,
    sizes_for,
)
from kvfloor.validation import count, positives


@dataclass(frozen=True)
class WindowSample(Method):
    """Answer with the value of one token, drawn from the window or from a reservoir of older tokens.

    The reservoir holds, for each draw, the value of a token drawn uniformly from the c tokens outside the window.
    Law (Haris and Onak 2025, section 4, Algorithm 1): let S be c plus the sum of exp(logit) over the window. The answer
    is the value of a window token with probability exp(logit) / S, and the reservoir's value with probability c / S.
    Theorem 23: the answer's expectation is unmasked window attention, exactly. For values >= 0, the variance of a
    coordinate is at most max|value| times its expectation. While all tokens are in the window the answer is exact.

    budget   tokens of the window per row. A token's query is answered before the oldest token is evicted, so the
             paper's window W is budget + 1
    copies   T: number of independent draws in a mean
    groups   Q: number of such means, whose coordinatewise median is the answer; odd
    spread, horizon   for the guarantee (Theorem 24, corrected constants): values must lie in [a, spread * a] for some a
                      > 0, and at most `horizon` answers may be given. Then the relative error of every coordinate is at
                      most epsilon = sqrt(8 spread / T), with probability 1 - horizon dv exp(-Q / 2.5)
    Two other methods also estimate unmasked window attention, by exact attention over the window and a summary of the
    older tokens: `window+value_sample` has the same mean and no more variance, and `window+value_sum` has no
    error and takes less memory.
    """

    name: ClassVar[str] = "window_sample"
    paper: ClassVar[str] = "Haris and Onak 2025 (arXiv 2502.15955), Algorithm 1, Theorems 23 and 24"
    copies: int = 1
    groups: int = 1
    spread: float | None = None
    horizon: int | None = None
    budget: Budget = 64

    def __post_init__(self) -> None:
        check_sampling(self.name, self.copies, self.groups)
        if self.spread is not None:
            positives(self.name, spread=self.spread)
        if self.horizon is not None:
            count(self.name, least=1, horizon=self.horizon)
        if isinstance(self.budget, tuple):
            raise ValueError(f"{self.name} takes one budget for all rows, not one per row")
        if not isinstance(self.budget, str):
            count(self.name, least=1, budget=self.budget)

    @property
    def block(self) -> int:
        return 1

    @property
    def traits(self) -> Traits:
        return Traits(reference="unmasked", normalised=self.groups == 1, value_linear=self.groups == 1)

    def open(self, spec: Spec) -> WindowSampleState:
        return WindowSampleState(self, spec)

    def capacity(self, n: int, prompt: int | None = None, pinned: int = 0) -> int | None:
        del prompt, pinned
        return min(n, tokens(self.budget, 1)[0])

    def with_budget(self, budget: Budget) -> WindowSample:
        return replace(self, budget=budget)

    def guarantee(self, spec: Spec) -> Guarantee | None:
        """Return the error bound for the median of `groups` means of `copies` draws (Theorem 24).

        The bound holds for all horizon * dv coordinates of the answers at once; `spec` gives dv. Returns None if
        `spread` or `horizon` is None, or if there are so few groups that the failure probability would be 1 or more.
        """
        if self.spread is None or self.horizon is None:
            return None
        return median_of_means(
            self.copies,
            self.groups,
            self.spread,
            self.horizon * spec.dv,
            "every answer, for a stream and queries fixed beforehand",
            (f"values lie in [a, {self.spread} a] for some a > 0", f"at most {self.horizon} answers are given"),
        )

    def _sized_for(self, epsilon: float, delta: float, spec: Spec) -> WindowSample:
        if self.spread is None or self.horizon is None or not (epsilon > 0 and delta > 0):
            return self
        copies, groups = sizes_for(epsilon, delta, self.spread, self.horizon * spec.dv)
        return replace(self, copies=copies, groups=groups)


class WindowSampleState(Blocked[WindowSample]):
    """Hold the tokens of the window, and one sampled value of an older token per draw.

    For the guarantee, whose assumptions are tested, each row also holds the least and the largest entry of all values
    so far, and the number of answers given.
    The random number of a draw is fixed by the seed, the identity number of the row, the number of tokens seen and the
    index of the draw. So all queries of a row that are answered after the same number of tokens share this random
    number, and a repeated query gets the same answer. Answers that share random numbers are not independent; the
    method's guarantee still holds, as it is a union bound over answers.
    """

    def __init__(self, method: WindowSample, spec: Spec) -> None:
        self.window = tokens(method.budget, 1)[0]
        super().__init__(method, spec, Slots(spec, [self.window + 1] * spec.rows), block=1)
        self.outside = ValueSample(method.copies, method.groups).open(spec)
        wide = {"dtype": spec.compute_dtype, "device": spec.device}
        self.least = torch.full((spec.rows,), torch.inf, **wide)
        self.largest = torch.full((spec.rows,), -torch.inf, **wide)
        self.answers = torch.zeros(spec.rows, dtype=torch.int64, device=spec.device)

    def require_sound(self, fields: dict[str, Any]) -> None:
        super().require_sound(fields)
        held, seen = fields["slots"]["held"], fields["seen"]
        require_equal(held, seen.clamp_max(self.window), "tokens of the window")
        require_equal(fields["outside"]["count"], seen - held, "tokens outside the window")

    # ---- answering -----------------------------------------------------------------------------------------

    def _answer(self, q: Tensor, new_k: Tensor, new_v: Tensor, before: Tensor) -> Partial:
        del new_k, new_v, before  # a block is one token: whatever is held is visible
        return self._draw(q.flatten(1, 2), self.seen + 1).shaped(*q.shape[:3])

    def _read(self, q: Tensor) -> Partial:
        return self._draw(q, self.seen)

    def _draw(self, q: Tensor, n: Tensor) -> Partial:
        """Return the method's answer, from random draws, to each query of q (rows, m, d): a `Partial` (rows, m).

        n (rows,) is the number of tokens seen, which is one of the numbers that fix the draws.
        """
        view, spec = self.slots.view(), self.spec
        hide = None if view.live is None else ~view.live.unsqueeze(1)
        mean, inside, weights = weigh(q, view.k, view.v, spec.scale, spec.softcap, hide=hide)
        left = self.outside.count
        whole = torch.logaddexp(inside, torch.log(left.to(torch.float64)).to(inside.dtype).unsqueeze(1))
        if not bool((left > 0).any()) or not weights.numel():
            return Partial(mean, whole)
        samples = self.outside.value.shape[1]
        lane = row_keys(spec.seed, spec.ids(), "window sample").unsqueeze(1)
        u = uniform(lane, n.to(q.device).unsqueeze(1) * samples + torch.arange(samples, device=q.device))
        u = u.unsqueeze(1).expand(-1, q.shape[1], -1)  # (rows, m, samples)
        share = torch.exp((inside - whole).to(torch.float64)).unsqueeze(2)
        # Below the window's share, u is uniform on it: the same draw picks the token.
        ladder = weights.to(torch.float64).cumsum(-1)
        slot = torch.searchsorted(ladder, (u / share).clamp_max(1.0) * ladder[..., -1:]).clamp_max(ladder.shape[-1] - 1)
        picked = view.v.unsqueeze(1).expand(-1, q.shape[1], -1, -1)
        picked = picked.gather(2, slot.unsqueeze(-1).expand(-1, -1, -1, spec.dv))
        drawn = torch.where((u < share).unsqueeze(-1), picked, self.outside.value.unsqueeze(1))
        answer = middle(drawn.to(mean.dtype), self.method.copies, self.method.groups)
        return Partial(torch.where((left > 0).view(-1, 1, 1), answer, mean), whole)

    # ---- learning ------------------------------------------------------------------------------------------

    def _on_queries(self, q: Tensor, before: Tensor, take: Tensor) -> None:
        del before
        self.answers += q.shape[1] * take.to(self.answers.device)

    def _attend(self, q: Tensor) -> Partial:
        self.answers += q.shape[1] * q.shape[2]
        return super()._attend(q)

    def _close(self, rows: Tensor | None) -> None:
        view = self.slots.view()
        live = torch.ones(view.position.shape, dtype=torch.bool) if view.live is None else view.live.cpu()
        position = view.position.cpu()
        self._extend(view.v, live & (position == self.seen.unsqueeze(1) - 1))
        leaving = live & (position < self.seen.unsqueeze(1) - self.window)
        if bool(leaving.any()):
            self.outside.absorb(*self.slots.flat(leaving))
            self.slots.evict(leaving)

    def _extend(self, v: Tensor, newest: Tensor) -> None:
        """Update each row's least and largest value entry so far by the entries of the newest tokens.

        v (rows, s, dv) are the values in all slots; newest (rows, s), bool, is True in the slots of the newest tokens.
        """
        new = newest.to(v.device).unsqueeze(-1)
        wide = v.to(self.least.dtype)
        self.least = torch.minimum(self.least, wide.masked_fill(~new, torch.inf).amin((1, 2)))
        self.largest = torch.maximum(self.largest, wide.masked_fill(~new, -torch.inf).amax((1, 2)))

    def guarantee(self) -> Guarantee | None:
        stated = self.method.guarantee(self.spec)
        if stated is None or not bool((self.seen > 0).any()):
            return stated
        assert self.method.spread is not None and self.method.horizon is not None
        asked = int(self.answers.max())
        why = out_of_range(self.least, self.largest, self.method.spread)
        if asked > self.method.horizon:
            why = f"{asked} answers were given, more than the horizon"
        return replace(stated, holds=False, why=why) if why else stated
