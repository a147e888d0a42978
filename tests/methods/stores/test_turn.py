"""The fixed rotation keeps lengths and angles, gives a vector the same bits anywhere, and spreads what stood out."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kvfloor.methods.stores import turn
from kvfloor.methods.stores.turn import matrix, turned, turned_back
from tests.support import Draw

WIDTHS = range(1, 131)
POWERS = (16, 32, 64, 128, 256)
MOST = 3.75
"""Largest entry of a rotated one-hot or constant vector, in units of its root mean square; found: 3.5."""


def require_orthogonal(rotate: Callable[[Tensor], Tensor], draw: Draw, width: int) -> None:
    x = draw(7, width)
    y = rotate(x)
    assert y.shape == x.shape
    torch.testing.assert_close(y @ y.T, x @ x.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("width", WIDTHS)
def test_inner_products_are_kept_and_the_inverse_gives_the_vectors_back(draw: Draw, width: int) -> None:
    require_orthogonal(turned, draw, width)
    x = draw(7, width)
    for there, back in ((turned, turned_back), (turned_back, turned)):
        torch.testing.assert_close(back(there(x)), x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("width", [3, 64, 100])
def test_a_transform_without_its_factor_is_no_rotation(draw: Draw, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    mixed = turn._mixed
    monkeypatch.setattr(turn, "_mixed", lambda x, start, stop: mixed(x, start, stop) * 2**0.5)
    with pytest.raises(AssertionError):
        require_orthogonal(turned, draw, width)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_matrix_is_the_rotation(draw: Draw, width: int) -> None:
    x, rotation = draw(5, width), matrix(width, torch.float64, "cpu")
    torch.testing.assert_close(x @ rotation.T, turned(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x @ rotation, turned_back(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-13)


def require_bits_of_its_own(rotate: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Require that each of the vectors x (n, width) alone gives the bits that it gives in any batch and layout."""
    n, width = x.shape
    alone = torch.stack([rotate(one) for one in x])
    spaced = torch.zeros(n, 2 * width + 1, dtype=x.dtype)
    spaced[:, 1::2] = x
    for form in (x, x.T.contiguous().T, spaced[:, 1::2], x.expand(3, n, width)[1]):
        assert torch.equal(rotate(form), alone)
    order = torch.arange(n).flip(0)
    assert torch.equal(rotate(x[order]), alone[order])
    assert torch.equal(rotate(x.view(1, n, width).repeat(3, 2, 1))[2, n:], alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1, 2, 5, 64, 80, 127, 128])
def test_a_vectors_bits_depend_on_its_own_numbers_alone(draw: Draw, width: int, dtype: torch.dtype) -> None:
    x = draw(19, width, dtype=dtype)
    for rotate in (turned, turned_back):
        require_bits_of_its_own(rotate, x)


def test_a_rotation_that_looks_at_its_neighbours_is_found(draw: Draw) -> None:
    x = draw(19, 64, dtype=torch.float32)
    with pytest.raises(AssertionError):
        require_bits_of_its_own(lambda y: turned(y / y.abs().max()) * y.abs().max(), x)


@pytest.mark.parametrize("width", POWERS)
def test_one_hot_and_constant_vectors_become_spread(width: int) -> None:
    unit = torch.cat([torch.eye(width), torch.full((1, width), width**-0.5)]).double()
    largest = turned(unit).abs().amax(-1) * math.sqrt(width)
    assert float(largest.max()) <= MOST


def test_two_rounds_without_signs_would_undo_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turn, "_signs", lambda width, device: torch.ones(2, width))
    assert float(turned(torch.eye(64)).abs().max()) * 8 > MOST


@pytest.mark.parametrize("width", [6, 48, 80, 96, 100, 120])
def test_other_widths_mix_every_entry_into_half_of_the_others_at_least(width: int) -> None:
    """The two windows overlap in all but the first and the last entries."""
    spread = (matrix(width, torch.float64, "cpu").abs() > 1e-9).sum(0)
    assert int(spread.min()) >= width // 2


def test_the_signs_are_drawn_alike_in_every_process() -> None:
    """They are part of what a saved state means."""
    assert turn._signs(12, "cpu").tolist() == SIGNS


SIGNS = [
    [1, 1, -1, -1, -1, 1, -1, -1, -1, 1, 1, -1],
    [1, -1, -1, 1, -1, -1, 1, 1, -1, 1, -1, -1],
]
