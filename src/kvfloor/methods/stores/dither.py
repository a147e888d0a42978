"""Draw the dither of coded numbers: what is added to a number before it is rounded down, and subtracted afterwards.

Let y be a number in steps, u the dither, uniform on (0, 1). The code is floor(y + u), and stands for code + 1/2 - u.
The residual, y minus what it stands for, is frac(y + u) - 1/2: uniform, whatever y is, and independent of it
(Schuchman 1964). Residuals of different tokens and channels have dithers of their own, so they are independent too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvfloor.core.randomness import halfwords, row_keys
from kvfloor.core.spec import Spec

GRID = 2.0**-16
"""Distance of two possible dithers. A residual is off by less than half of it, in steps, from one of mean 0."""
_FINE = 2.0**24


def dither(spec: Spec, rows: Tensor | None, position: Tensor, width: int, purpose: str) -> Tensor:
    """Return the dither (r, t, width) of tokens at the positions (r, t) of `rows` (None: all), in the compute dtype.

    It is an odd multiple of 2^-17 between 0 and 1: a function of the seed, the row's id, the position and the entry.
    """
    lane = row_keys(spec.seed, spec.ids(), f"dither of {purpose}")
    if rows is not None:
        lane = lane[rows.to(lane.device)]
    words = -(-width // 4)
    counters = position.to(torch.int64).unsqueeze(-1) * words + torch.arange(words, device=position.device)
    drawn = halfwords(lane[:, None, None], counters).flatten(-2)[..., :width]
    return (drawn.to(spec.compute_dtype) + 0.5) * GRID


def steps_with(u: Tensor, above: Tensor, most: Tensor | float) -> Tensor:
    """Return codes, floor(y + u), of numbers `above`: how many steps each is above its offset, in float64.

    y is `above`, but at least 0 and at most `most`, and rounded to 24 binary places: so the sum is exact, and the
    residual of y has the law above. What y differs from `above` by does not depend on u.
    """
    within = torch.minimum(above.clamp_min(0), torch.as_tensor(most, dtype=above.dtype, device=above.device))
    return ((within * _FINE).round() / _FINE + u.double()).floor()
