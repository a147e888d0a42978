"""Find the nearest of many points (l2): a matrix product rules out most points, and distances to the others decide."""

from __future__ import annotations

import torch
from torch import Tensor

from kvfloor.core.rowwise import length

_GROUP = 32  # points whose least product is taken together
_TILE = 2**18  # products at a time, which stay in the cache
_MEASURED_AT_ONCE = 2**18  # pairs whose distance is taken directly at a time


def nearest(x: Tensor, points: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """Return the l2 distance to the nearest allowed point and its index, both (r, b), for vectors x (r, b, d).

    points (r, c, d) are the points of each row; allowed (r, b or 1, c) is True for the points that a vector may be
    matched with. The distance is inf where no point is allowed. Of equally near points the one of lowest index is
    returned. One matrix product gives rough distances, which rule out all points except a few. The distances to these
    few are computed directly, as norms of differences. So the result equals that of computing all distances directly.
    """
    (r, b, _d), c = x.shape, points.shape[1]
    apart = x.new_full((r * b,), torch.inf)
    index = torch.zeros(r * b, dtype=torch.int64, device=x.device)
    if c == 0:
        return apart.view(r, b), index.view(r, b)
    tiles = torch.arange(r).split(max(1, _TILE // (b * c)))
    likely = [_likely(x[t[0] : t[-1] + 1], points[t[0] : t[-1] + 1], allowed[t[0] : t[-1] + 1]) for t in tiles]
    line, j, at = (torch.cat(parts) for parts in zip(*likely, strict=True))
    line += torch.cat([t[0].expand(len(found[0])) for t, found in zip(tiles, likely, strict=True)]).to(line.device)
    for part in torch.arange(len(line), device=x.device).split(_MEASURED_AT_ONCE):
        one, other, to = line[part] * b + j[part], at[part], line[part]
        far = length(x[to, j[part]] - points[to, other])
        before = apart.clone()
        apart.scatter_reduce_(0, one, far, "amin")
        # The points come by index, so an equal distance in an earlier part belongs to a point of smaller index.
        first = torch.full_like(index, c).scatter_reduce_(0, one, torch.where(far == apart[one], other, c), "amin")
        index = torch.where(apart < before, first, index)
    return apart.view(r, b), index.view(r, b)


def _likely(x: Tensor, points: Tensor, allowed: Tensor) -> tuple[Tensor, ...]:
    """Return all pairs of a vector of x and a point that may be its nearest: three tensors (e,), for e pairs.

    The tensors are the pair's row, the vector's index in x and the point's index in `points`; pairs are sorted by them.
    x (r, b, d): b vectors per row; points (r, c, d): c points per row; allowed (r, b or 1, c): True for points that a
    vector may be matched with.
    Distances are computed by one matrix product. A point is left out only if its distance exceeds the smallest one by
    more than the product's rounding error. So the nearest allowed point of every vector is included.
    """
    norm, size = (torch.linalg.vector_norm(one, dim=-1).square_() for one in (x, points))
    side = size.unsqueeze(1).masked_fill(~allowed, torch.inf)
    rough = torch.bmm(x, points.transpose(1, 2)).mul_(-2).add_(side)  # squared distances minus |x|^2
    exact_products = x.dtype == torch.float64 or torch.get_float32_matmul_precision() == "highest"
    unit = torch.finfo(x.dtype).eps if exact_products else 2.0**-7
    doubt = 4 * unit * (x.shape[-1] + 4) * (norm + size.masked_fill(~allowed.any(1), 0).amax(1, keepdim=True))
    # Groups first: the least product of a group is found fast, and few groups need a closer search.
    if short := -rough.shape[2] % _GROUP:
        rough = torch.nn.functional.pad(rough, (0, short), value=torch.inf)
    grouped = rough.unflatten(2, (-1, _GROUP))
    least = grouped.amin(3)
    reach = least.amin(2).add_(doubt).clamp_max_(torch.finfo(x.dtype).max)  # below inf, which stands for no point
    line, j, group = (least <= reach.unsqueeze(2)).nonzero(as_tuple=True)
    which, within = (grouped[line, j, group] <= reach[line, j].unsqueeze(1)).nonzero(as_tuple=True)
    return line[which], j[which], group[which] * _GROUP + within
