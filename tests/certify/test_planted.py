"""Ten faults and more, each planted into certified reads: the trials must find every one of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvfloor import Spec
from kvfloor.certify.certified import Certified
from kvfloor.certify.glimpse import Glimpse
from kvfloor.methods.tiered import hot as hot_module
from kvfloor.methods.tiered import tiered as tiered_module
from kvfloor.methods.tiered.hot import Hot
from kvfloor.methods.tiered.tiered import Tiered
from tests.certify.test_trials import violations
from tests.support import seeded

Patch = pytest.MonkeyPatch
Fault = Callable[[Patch], None]


def on_glimpse(change: Callable[[Hot, Glimpse], dict[str, Tensor]]) -> Fault:
    """Return a fault that changes what the codes tell."""

    def plant(patch: Patch) -> None:
        real = Hot.glimpse

        def faulty(self: Hot, q: Tensor, hide: Tensor | None, rows: Tensor | None = None) -> Any:
            found, k = real(self, q, hide, rows)
            return replace(found, **change(self, found)), k

        patch.setattr(Hot, "glimpse", faulty)

    return plant


def on_settle(spoil: Callable[[Hot, dict[str, Tensor]], None]) -> Fault:
    """Return a fault that spoils the hot tier after a page; `spoil` gets the tier and its tensors from before."""

    def plant(patch: Patch) -> None:
        real = Hot.settle

        def faulty(self: Hot, seen: Tensor, rows: Tensor | None) -> None:
            before = {name: x.clone() for name, x in vars(self).items() if isinstance(x, Tensor)}
            real(self, seen, rows)
            spoil(self, before)

        patch.setattr(Hot, "settle", faulty)

    return plant


def smaller(factor: float, *names: str) -> Fault:
    return on_glimpse(lambda _, found: {name: getattr(found, name) * factor for name in names})


def without_the_scale(hot: Hot, found: Glimpse) -> dict[str, Tensor]:
    less = found.gram / hot.spec.scale * 0.01
    return {"gram": less, "doubt": torch.minimum(found.doubt, less.unsqueeze(-1))}


def without_a_token(hot: Hot, found: Glimpse) -> dict[str, Tensor]:
    del hot
    gone = torch.arange(found.logits.shape[-1]) == found.logits.shape[-1] // 2
    return {"logits": found.logits.masked_fill(gone, -torch.inf)}


def without_the_last_page(hot: Hot, before: dict[str, Tensor]) -> None:
    if int(hot.codes.coded.max()) > hot.codes.group:
        hot.key_gram = before["key_gram"]


def in_bfloat16(hot: Hot, before: dict[str, Tensor]) -> None:
    del before
    codes: Any = hot.codes.key_codes
    codes.range = codes.range.bfloat16().to(codes.range.dtype)


def with_the_wrong_sign(patch: Patch) -> None:
    real = Glimpse.fetched

    def faulty(self: Glimpse, index: Tensor, known: Tensor, logits: Tensor, eta: Tensor, change: Tensor) -> Glimpse:
        return real(self, index, known, logits, eta, -change)

    patch.setattr(Glimpse, "fetched", faulty)


def removed_twice(patch: Patch) -> None:
    real = Glimpse.fetched

    def faulty(self: Glimpse, index: Tensor, known: Tensor, logits: Tensor, eta: Tensor, change: Tensor) -> Glimpse:
        return real(self, index, known, logits, eta * 2**0.5, change)

    patch.setattr(Glimpse, "fetched", faulty)


def without_rounding(patch: Patch) -> None:
    def nothing(asked: Tensor, size: Tensor, spec: Spec, run: int = 0) -> Tensor:
        return asked.new_zeros(*asked.shape[:2], size.shape[1])

    for module in (hot_module, tiered_module):
        patch.setattr(module, "logit_rounding", nothing)


def the_upper_end_divides(patch: Patch) -> None:
    patch.setattr(Certified, "bound", property(lambda self: self.error / (1 + self.spread)))


FAULTS: dict[str, Fault] = {
    "the Gram matrix of keys is lost": smaller(0.0, "gram", "doubt"),
    "the Gram matrix misses a page": on_settle(without_the_last_page),
    "the operator norm is underestimated": smaller(0.1, "operator"),
    "the values' radii are halved": smaller(0.5, "radius"),
    "the query's scale is missing": on_glimpse(without_the_scale),
    "a token is dropped": on_glimpse(without_a_token),
    "the codes are read twice": on_glimpse(lambda _, found: {"logits": found.logits + found.coded * 2**-0.5}),
    "ranges are kept in bfloat16 after the sums were made": on_settle(in_bfloat16),
    "a fetched value's residual has the wrong sign": with_the_wrong_sign,
    "a fetched token's error leaves the sum twice": removed_twice,
    "no rounding is allowed for": without_rounding,
    "the upper end of the mass divides": the_upper_end_divides,
}


def tight(seed: int, keys: float, n: int = 18, first: int = 13) -> tuple[Tensor, Tensor, Tensor, Tiered]:
    """Draw few coded tokens of width 1 and wide ranges, so that the bounds are close to the errors."""
    draw = seeded(seed)
    k, v, q = draw(1, n, 1) * keys, draw(1, n, 2), draw(1, 200, 1) * 2
    return k, v, q, Tiered(page=16, first=first, recent=0)


def with_a_still_page(seed: int) -> tuple[Tensor, Tensor, Tensor, Tiered]:
    k, v, q, method = tight(seed, 60.0, 34, 0)
    k[:, :16] = k[:, :1]
    return k, v, q, method


def with_one_wide_page(seed: int) -> tuple[Tensor, Tensor, Tensor, Tiered]:
    """Draw a page of twelve coded tokens with equal keys but for the ends of the range, which are fetched last."""
    k, v, q, method = tight(seed, 60.0, 18, 4)
    return k, v * torch.linspace(1, 3, 18, dtype=torch.float64).unsqueeze(1), q, method


def of_large_logits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tiered]:
    """Draw keys that hardly differ, and whose logits are so large that their differences are lost in rounding."""
    draw = seeded(seed)
    k, away, v, q = (draw(1, n, 32, dtype=torch.float32) for n in (1, 40, 40, 60))
    return k * 300 + away * 0.01, v, q * 300, Tiered(page=16, recent=0)


def at_the_lower_end(seed: int) -> tuple[Tensor, Tensor, Tensor, Tiered]:
    """Return tokens whose heavy ones were all rounded up by nearly half a step, so that the mass is too large."""
    k, v = torch.zeros(1, 20, 1, dtype=torch.float64), torch.zeros(1, 20, 2, dtype=torch.float64)
    k[:, :4], k[:, 5], k[:, 6:16], v[:, 4:16, 0] = 253.0, 255.0, 254.51, 1.0
    q = torch.linspace(0.1, 3, 400, dtype=torch.float64).view(1, -1, 1) * (1 + 0.01 * seed)
    return k, v, q, Tiered(page=16, recent=0)


CASES = (
    lambda seed: tight(seed, 60.0),
    lambda seed: tight(seed, 0.0),
    with_a_still_page,
    with_one_wide_page,
    of_large_logits,
    at_the_lower_end,
)


def found_by_trials() -> int:
    """Return how many answers err more than their bound, over seeded cases that are close to their bounds."""
    wrong = 0
    for seed in range(3):
        for case in CASES:
            k, v, q, method = case(seed)
            state = method.open(Spec(1, k.shape[2], v.shape[2], 0.5, dtype=k.dtype))
            state.append(k, v)
            wrong += violations(state, q, k, v, 1e6, 0.1, 0.01)[1]
    return wrong


def test_without_a_fault_the_trials_find_nothing() -> None:
    assert found_by_trials() == 0


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name: str, monkeypatch: Patch) -> None:
    FAULTS[name](monkeypatch)
    assert found_by_trials() > 0
