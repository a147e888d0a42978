"""Codes in equal steps: each number errs by half a step, and no more than the levels of normal numbers do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kvfloor import Spec
from kvfloor.methods.stores import stepped_tokens
from kvfloor.methods.stores.codes import SCALE, SlotCodes, TokenCodes
from kvfloor.methods.stores.stepped_tokens import SteppedTokens
from kvfloor.methods.stores.turn import turned
from tests.support import Draw

ROWS, T = 2, 40
REAL = torch.ones(T) > 0


def opened(width: int, bits: int, dtype: torch.dtype = torch.float64) -> SteppedTokens:
    return SteppedTokens(Spec(ROWS, width, width, dtype=dtype), width, bits, 8)


def coded(codes: SlotCodes, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return what x (rows, t, w) is decoded as, and its entries."""
    entries = codes.encode(torch.arange(ROWS), torch.zeros(ROWS, dtype=torch.int64), x, REAL)
    return codes.decode(entries, None, None), entries


def half_a_step(x: Tensor, bits: int) -> None:
    """Raise AssertionError unless each rotated number errs by at most half a step, and some by nearly so much."""
    codes = opened(x.shape[-1], bits)
    y, entries = coded(codes, x)
    largest = turned(x).abs().amax(-1, keepdim=True)
    step = 2 * largest / (2**bits - 1)
    off = (turned(y) - turned(x)).abs()
    assert bool((off <= step / 2 * (1 + torch.finfo(SCALE).eps)).all()) and bool((off > step / 2.2).any())
    size, error = codes.bounds(entries, torch.zeros(ROWS, T, dtype=torch.int64))
    assert bool((size >= x.norm(dim=-1)).all()) and bool((error >= (y - x).norm(dim=-1)).all())


@pytest.mark.parametrize("bits", [1, 4, 6, 8])
@pytest.mark.parametrize("width", [5, 64])
def test_a_number_errs_by_half_a_step_and_the_bounds_hold(draw: Draw, width: int, bits: int) -> None:
    half_a_step(draw(ROWS, T, width) * torch.logspace(-3, 3, T, dtype=torch.float64).unsqueeze(1), bits)


def test_nothing_is_coded_as_nothing_and_a_rotated_reading_is_rotated(draw: Draw) -> None:
    codes = opened(16, 8)
    assert not bool(coded(codes, torch.zeros(ROWS, T, 16, dtype=torch.float64))[0].any())
    y, entries = coded(codes, draw(ROWS, T, 16))
    torch.testing.assert_close(codes.decode(entries, None, None, turn=True), turned(y))


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_the_error_is_about_that_of_levels_for_normal_numbers(draw: Draw, bits: int) -> None:
    x = draw(ROWS, T, 64)
    levels = TokenCodes(Spec(ROWS, 64, 64, dtype=torch.float64), 64, bits, 8, centred=False, unbiased=True)
    mine, theirs = ((coded(codes, x)[0] - x).square().mean().sqrt() for codes in (opened(64, bits), levels))
    assert float(mine) < 1.1 * float(theirs)


def narrower(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda self, widest: real(self, widest) * 0.99


FAULTS = {
    "the range is too narrow": ("step", narrower),
    "numbers are rounded down": ("_rounded", lambda real: lambda self, number, *rest: number.floor().clamp(0, 255)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(draw: Draw, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    at, fault = FAULTS[name]
    monkeypatch.setattr(SteppedTokens, at, fault(getattr(stepped_tokens.SteppedTokens, at)))
    with pytest.raises(AssertionError):
        half_a_step(draw(ROWS, T, 64), 8)
