"""The nearest point, as if every distance were taken directly: near ties, ties, rounding and shapes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvfloor.core.rowwise import length
from kvfloor.methods.sketches import nearest as module
from kvfloor.methods.sketches.nearest import nearest
from tests.support import Draw


def direct(x: Tensor, points: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    far = length(x.unsqueeze(2) - points.unsqueeze(1)).masked_fill(~allowed, torch.inf)
    return far.amin(2), (far == far.amin(2, keepdim=True)).to(torch.int8).argmax(2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("b", "c"), [(1, 1), (5, 31), (16, 200), (7, 64)])
def test_it_is_the_direct_search(draw: Draw, b: int, c: int, dtype: torch.dtype) -> None:
    x, points = draw(3, b, 8).to(dtype), draw(3, c, 8).to(dtype)
    allowed = draw(3, b, c) > -0.5
    allowed[:, :, 0] = True
    for found, wanted in zip(nearest(x, points, allowed), direct(x, points, allowed), strict=True):
        assert torch.equal(found, wanted)


def test_rounding_of_the_product_decides_nothing(draw: Draw) -> None:
    """Points far from the origin and close to each other: the product alone cannot tell them apart."""
    points = 1000 + draw(2, 200, 8, scale=1e-3).float()
    x = 1000 + draw(2, 16, 8, scale=1e-3).float()
    allowed = torch.ones(2, 1, 200, dtype=torch.bool)
    rough = (points.square().sum(-1).unsqueeze(1) - 2 * x @ points.transpose(1, 2)).argmin(2)
    wanted = direct(x, points, allowed)
    assert not torch.equal(rough, wanted[1])
    for found, right in zip(nearest(x, points, allowed), wanted, strict=True):
        assert torch.equal(found, right)


def test_of_equal_points_the_first_counts_whatever_the_pieces(draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    points = draw(1, 1, 4).float().expand(1, 100, 4)
    allowed = torch.ones(1, 1, 100, dtype=torch.bool)
    allowed[..., :37] = False
    for piece in (2**18, 10):
        monkeypatch.setattr(module, "_MEASURED_AT_ONCE", piece)
        assert nearest(points[:, :1], points, allowed)[1].item() == 37


def test_without_an_allowed_point_the_distance_is_infinite(draw: Draw) -> None:
    x, points = draw(2, 3, 4), draw(2, 5, 4)
    nothing = torch.zeros(2, 1, 5, dtype=torch.bool)
    assert bool(torch.isinf(nearest(x, points, nothing)[0]).all())
    assert bool(torch.isinf(nearest(x, points[:, :0], nothing[..., :0])[0]).all())


def test_a_row_does_not_depend_on_its_neighbours(draw: Draw) -> None:
    x, points = draw(5, 6, 8).float(), draw(5, 70, 8).float()
    allowed = torch.ones(5, 1, 70, dtype=torch.bool)
    whole = nearest(x, points, allowed)
    alone = nearest(x[3:4], points[3:4], allowed[3:4])
    assert torch.equal(whole[0][3], alone[0][0]) and torch.equal(whole[1][3], alone[1][0])
