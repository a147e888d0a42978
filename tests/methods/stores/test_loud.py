"""The wider half of a group's channels gets further bits, and which half that is follows from the ranges."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvfloor import Spec
from kvfloor.methods.stores.codes import ChannelCodes
from kvfloor.methods.stores.loud import LoudChannels
from tests.support import Draw

ROWS, T = 3, 16


def coded(codes: LoudChannels | ChannelCodes, x: Tensor, in_order: bool) -> Tensor:
    """Code x (rows, 2 t, w) as two groups of each row, and return what is read back."""
    parts = []
    for group in range(2):
        here = x[:, group * T : (group + 1) * T]
        parts.append(codes.encode(torch.arange(ROWS), torch.full((ROWS,), group), here, torch.ones(T) > 0))
    entries = {name: torch.cat([part[name] for part in parts], 1) for name in parts[0]}
    group = None if in_order else (torch.arange(2 * T) // T).expand(ROWS, -1)
    return codes.decode(entries, None, group)


def opened(width: int, extra: int) -> LoudChannels:
    return LoudChannels(Spec(ROWS, width, width, dtype=torch.float64), width, 8, extra, 0, T)


@pytest.mark.parametrize(("width", "extra"), [(2, 1), (5, 2), (16, 2), (7, 3), (16, 4), (64, 8)])
def test_a_number_errs_by_half_a_step_and_wide_channels_have_finer_ones(draw: Draw, width: int, extra: int) -> None:
    x = draw(ROWS, 2 * T, width) * torch.linspace(0.2, 5, width, dtype=torch.float64)
    codes = opened(width, extra)
    y = coded(codes, x, True)
    torch.testing.assert_close(coded(codes, x, False), y, rtol=0, atol=0)
    half = codes.steps(None).repeat_interleave(T, 1) / 2
    assert bool(((y - x).abs() <= half * (1 + 1e-9)).all()) and bool(((y - x).abs() > half / 2).any())
    plain = ChannelCodes(codes.spec, width, 8, 0, T)
    coded(plain, x, True)
    ratio = plain.steps(None) / codes.steps(None)
    wide = codes.loud.long()
    falling = plain.steps(None).gather(-1, wide)
    assert bool((falling[..., 1:] <= falling[..., :-1]).all())
    finer = torch.zeros_like(ratio, dtype=torch.bool).scatter(-1, wide, True)
    assert int(finer.sum(-1).amin()) == int(finer.sum(-1).amax()) == width // 2
    torch.testing.assert_close(ratio[~finer], torch.ones_like(ratio[~finer]))
    torch.testing.assert_close(ratio[finer], torch.full_like(ratio[finer], (2.0 ** (8 + extra) - 1) / 255))
    narrow = plain.steps(None).masked_fill(finer, 0).amax(-1)
    assert bool((plain.steps(None).masked_fill(~finer, torch.inf).amin(-1) >= narrow).all())


def test_of_equal_ranges_the_first_channels_are_taken() -> None:
    x = torch.linspace(-1, 1, 2 * T, dtype=torch.float64).view(1, -1, 1).expand(ROWS, -1, 6)
    codes = opened(6, 2)
    coded(codes, x, True)
    step = codes.steps(None)
    assert bool((step[..., :3] < step[..., 3:].amin() / 3).all())


def test_rows_are_selected_with_their_ranges(draw: Draw) -> None:
    x = draw(ROWS, 2 * T, 8)
    codes = opened(8, 2)
    parts = [
        codes.encode(torch.arange(ROWS), torch.full((ROWS,), group), x[:, group * T :][:, :T], torch.ones(T) > 0)
        for group in range(2)
    ]
    entries = {name: torch.cat([part[name] for part in parts], 1) for name in parts[0]}
    before = codes.decode(entries, None, None)
    codes.select_rows(torch.tensor([2, 0]))
    after = codes.decode({name: x[[2, 0]] for name, x in entries.items()}, None, None)
    assert torch.equal(after, before[[2, 0]])
    codes = LoudChannels(codes.spec, 8, 8, 2, 4, T)
    assert codes.token_bytes == 8 + 1 + (2 * 8 + 4) / T + 4 * 8 / T
