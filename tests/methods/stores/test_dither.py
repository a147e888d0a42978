"""Residuals of dithered codes are uniform, independent of each other and of the numbers, at the ranges' ends too."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kvfloor import Spec
from kvfloor.core.randomness import halfwords, row_keys
from kvfloor.methods.stores.codes import ChannelCodes, SlotCodes
from kvfloor.methods.stores.dither import GRID, dither, steps_with
from kvfloor.methods.stores.dithered_tokens import DitheredTokens
from kvfloor.methods.stores.loud import LoudChannels
from kvfloor.methods.stores.turn import turned
from tests.certify.families import FAMILIES
from tests.support import Draw

T, SEEDS = 16, 4000
LUCK = 1e-9
"""The probability with which a test of a law may fail by chance."""

Made = Callable[[Spec, int], SlotCodes]
KINDS: dict[str, Made] = {
    "channels": lambda spec, w: ChannelCodes(spec, w, 5, 0, T, dithered=True),
    "loud channels": lambda spec, w: LoudChannels(spec, w, 4, 2, 0, T, True),
    "tokens": lambda spec, w: DitheredTokens(spec, w, 6, 0, T),
}


def residuals(made: Made, x: Tensor, seed: int = 0) -> Tensor:
    """Return the residuals (SEEDS, t, w), in steps, of one group x (t, w) that every row codes by a dither of its own.

    Those of tokens are of their rotated entries.
    """
    spec = Spec(SEEDS, x.shape[1], x.shape[1], dtype=x.dtype, seed=seed)
    codes = made(spec, x.shape[1])
    given, rows = x.to(spec.compute_dtype).expand(SEEDS, -1, -1), torch.arange(SEEDS)
    group = torch.ones(SEEDS, dtype=torch.int64)
    entries = codes.encode(rows, group, given, torch.ones(len(x), dtype=torch.bool))
    position = (T + torch.arange(len(x))).expand(SEEDS, -1)
    decoded = codes.decode(entries, None, group.unsqueeze(1).expand(-1, len(x)), True)
    decoded = decoded + codes.shift(entries, None, position, True)
    if isinstance(codes, DitheredTokens):
        return (turned(given) - decoded) / codes.step(entries["widest"]).unsqueeze(-1)
    return (given - decoded) / codes.steps(None)[:, 1:2]  # type: ignore[attr-defined]


def require_uniform(x: Tensor) -> None:
    """Fail if independent numbers x (n,) are not uniform on [-1/2, 1/2] (Dvoretzky, Kiefer, Wolfowitz; Massart)."""
    n = len(x)
    assert float(x.abs().max()) <= 0.5 + 1e-3
    away = (x.double().sort().values + 0.5 - torch.arange(n).double() / n).abs().max()
    assert float(away) <= math.sqrt(math.log(2 / LUCK) / (2 * n)) + 1 / n


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", KINDS)
def test_each_residual_is_uniform_whatever_the_number(draw: Draw, name: str, dtype: torch.dtype) -> None:
    """The least and the largest number of a channel are among them, and a channel that is dead."""
    x = draw(T, 4)
    x[:, 1] = 0.7
    x[3] *= 100
    found = residuals(KINDS[name], x.to(dtype))
    for token in range(T):
        for entry in range(4):
            require_uniform(found[:, token, entry])


@pytest.mark.parametrize("name", KINDS)
def test_residuals_of_tokens_channels_and_rows_are_independent(draw: Draw, name: str) -> None:
    """For independent numbers of mean 0 on [-1/2, 1/2], the mean of products is small (Hoeffding)."""
    found = residuals(KINDS[name], draw(T, 4)).double()
    flat = found.flatten(1)
    pairs = flat.T @ flat / SEEDS
    off = pairs - torch.diag(pairs.diagonal())
    largest = 0.5 * math.sqrt(math.log(2 * len(pairs) ** 2 / LUCK) / (2 * SEEDS))
    assert float(off.abs().max()) <= largest
    next_row = (flat[1:] * flat[:-1]).mean(0).abs().max()
    assert float(next_row) <= 2 * largest
    assert float((pairs.diagonal() - 1 / 12).abs().max()) <= largest


def test_keys_and_values_have_dithers_of_their_own() -> None:
    spec = Spec(3, 8, 8)
    position = torch.arange(40).expand(3, -1)
    one, two = (dither(spec, None, position, 8, name) for name in ("keys", "values"))
    assert not bool((one == two).all(-1).any())
    assert torch.equal(one[1:2], dither(spec, torch.tensor([1]), position[:1], 8, "keys"))
    assert torch.equal(one[:, 7:9], dither(spec, None, position[:, 7:9], 8, "keys"))
    other = dither(Spec(3, 8, 8, seed=1), None, position, 8, "keys")
    assert not bool((one == other).all(-1).any())
    odd = one.double() / (GRID / 2)
    assert torch.equal(odd % 2, torch.ones_like(odd)) and float(one.min()) > 0 and float(one.max()) < 1
    assert len(one.flatten().unique()) > 0.98 * one.numel()


def test_four_draws_of_one_hash_are_uniform_and_differ() -> None:
    found = halfwords(row_keys(0, torch.arange(4), "a test"), torch.arange(3000).unsqueeze(1))
    assert found.shape == (3000, 4, 4) and int(found.min()) >= 0 and int(found.max()) < 2**16
    for one in found.flatten(1).T:
        require_uniform((one + 0.5) / 2**16 - 0.5)
    assert int((found[..., :1] == found[..., 1:]).sum()) < 20


def test_what_a_number_loses_before_its_dither_does_not_depend_on_it() -> None:
    above = torch.tensor([-1e-9, 0.0, 3.3, 15.0, 15.0 + 1e-9, 1e9], dtype=torch.float64)
    kept = torch.tensor([0.0, 0.0, 3.3, 15.0, 15.0, 15.0], dtype=torch.float64)
    for u in (GRID / 2, 0.25 + GRID / 2, 1 - GRID / 2):
        code = steps_with(torch.full_like(above, u, dtype=torch.float32), above, 15)
        assert torch.equal(code, (kept + u).floor()) and float(code.min()) >= 0 and float(code.max()) <= 15


@pytest.mark.parametrize("name", FAMILIES)
def test_what_numbers_lose_before_their_dither_is_within_what_logits_are_allowed(draw: Draw, name: str) -> None:
    """Half of the 16 roundings that `product_rounding` has for the factors, of the norm of the ranges' ends."""
    x = FAMILIES[name](draw, 3, T, 8).float()
    for made in (KINDS["channels"], KINDS["loud channels"]):
        codes: Any = made(Spec(3, 8, 8), 8)
        codes.encode(torch.arange(3), torch.zeros(3, dtype=torch.int64), x, torch.ones(T, dtype=torch.bool))
        shared = [getattr(codes, one)[:, :1] for one in codes.shared]
        start, step = (one.double() for one in codes._steps(*shared))
        most = codes._largest(shared).double()
        kept = torch.minimum(((x.double() - start) / step.clamp_min(1e-38)).clamp_min(0), most)
        lost = (x.double() - start - step * kept).abs().amax(1).norm(dim=-1)
        ends = x.double().abs().amax(1).norm(dim=-1)
        assert bool((lost <= 8 * torch.finfo(torch.float32).eps * ends).all())


def test_what_is_decoded_without_the_dither_lies_within_a_step(draw: Draw) -> None:
    x = draw(3, T, 6)
    for made in KINDS.values():
        codes: Any = made(Spec(3, 6, 6, dtype=torch.float64), 6)
        group = torch.zeros(3, dtype=torch.int64)
        entries = codes.encode(torch.arange(3), group, x, torch.ones(T, dtype=torch.bool))
        at = torch.zeros(3, T, dtype=torch.int64)
        y = codes.decode(entries, None, at) + codes.shift(entries, None, torch.arange(T).expand(3, -1))
        size, error = codes.bounds(entries, at)
        assert bool(((y - x).norm(dim=-1) <= error * (1 + 1e-9)).all())
        assert bool((x.norm(dim=-1) <= size).all()) and bool((size <= y.norm(dim=-1) + 4 * error).all())
