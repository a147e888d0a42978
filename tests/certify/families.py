"""Draw adversarial keys and queries: streams on which bounds from codes are most likely to fail."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tests.support import Draw

Family = Callable[[Draw, int, int, int], Tensor]
"""Draws keys (rows, n, d) from (draw, rows, n, d), in float64."""


def uniform(draw: Draw, *shape: int) -> Tensor:
    return torch.special.ndtr(draw(*shape)).clamp(1e-12, 1 - 1e-12)


def spikes(draw: Draw, rows: int, n: int, d: int) -> Tensor:
    k = draw(rows, n, d) * 0.01
    k[:, :: max(2, n // 5)] *= 3000.0
    return k


def heavy_tails(draw: Draw, rows: int, n: int, d: int) -> Tensor:
    return draw(rows, n, d).sign() * uniform(draw, rows, n, d).pow(-1 / 1.1).clamp_max(6e4)


def antipodal(draw: Draw, rows: int, n: int, d: int) -> Tensor:
    k = draw(rows, (n + 1) // 2, d) * 3
    return torch.stack((k, -k), 2).flatten(1, 2)[:, :n]


def splitting_clusters(draw: Draw, rows: int, n: int, d: int) -> Tensor:
    where = (torch.arange(n) * 7) % 4
    return draw(rows, 4, d)[:, where] * 4 + 0.05 * draw(rows, n, d)


def sorted_keys(draw: Draw, rows: int, n: int, d: int) -> Tensor:
    return (draw(rows, n, d) * 3).sort(1).values


def zooming(draw: Draw, rows: int, n: int, d: int) -> Tensor:
    return draw(rows, n, d) * torch.logspace(1.5, -4, n, dtype=torch.float64).unsqueeze(1)


def duplicates(draw: Draw, rows: int, n: int, d: int) -> Tensor:
    return draw(rows, 3, d)[:, torch.arange(n) % 3] * 5


def norm_ramp(draw: Draw, rows: int, n: int, d: int) -> Tensor:
    return draw(rows, n, d) * torch.linspace(0.01, 30, n, dtype=torch.float64).unsqueeze(1)


def needle(draw: Draw, rows: int, n: int, d: int) -> Tensor:
    k = draw(rows, n, d) * 0.2
    k[:, n // 3] = 12.0 * draw(rows, d).sign()
    return k


def rotating(draw: Draw, rows: int, n: int, d: int) -> Tensor:
    half = max(1, d // 2)
    angle = torch.arange(n, dtype=torch.float64).unsqueeze(1) * 1e4 ** (-torch.arange(half) / half)
    k = torch.cat((angle.cos(), angle.sin()), 1).repeat(1, 1 + d // (2 * half))[:, :d]
    return k * 4 + 0.1 * draw(rows, n, d)


def zeros(draw: Draw, rows: int, n: int, d: int) -> Tensor:
    return torch.zeros(rows, n, d, dtype=torch.float64)


def edge_of_float16(draw: Draw, rows: int, n: int, d: int) -> Tensor:
    return draw(rows, n, d).sign() * torch.where(uniform(draw, rows, n, d) < 0.5, 6e4, 6e-8)


def random_signs(draw: Draw, rows: int, n: int, d: int) -> Tensor:
    """Draw keys of random signs, nearly orthogonal to each other: the hard keys of the space bound."""
    return draw(rows, n, d).sign() * math.sqrt(2 * math.log(max(2, n))) / math.sqrt(d) * 3


def dead_channels(draw: Draw, rows: int, n: int, d: int) -> Tensor:
    k = draw(rows, n, d) * 2
    k[..., ::2] = 0.7
    return k


FAMILIES: dict[str, Family] = {
    made.__name__: made
    for made in (
        *(spikes, heavy_tails, antipodal, splitting_clusters, sorted_keys, zooming, duplicates, norm_ramp, needle),
        *(rotating, zeros, edge_of_float16, random_signs, dead_channels),
    )
}


def queries(draw: Draw, k: Tensor, m: int) -> Tensor:
    """Draw queries (rows, m, d): random ones of all sizes, and ones that point at keys, sharply and weakly."""
    rows, n, d = k.shape
    q = draw(rows, m, d) * torch.logspace(-2, 1, m, dtype=torch.float64).unsqueeze(1)
    at = (torch.arange(m) * 37) % n
    aimed = k[:, at] / k[:, at].norm(dim=-1, keepdim=True).clamp_min(1e-30)
    return torch.where((torch.arange(m) % 2 == 0).view(1, -1, 1), q, aimed * q.norm(dim=-1, keepdim=True))
