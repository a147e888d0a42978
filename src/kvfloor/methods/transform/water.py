"""Share out an allowed squared error among independent components by reverse water-filling.

A component of variance v gets the error min(v, level), where the level is the same for all. This takes the fewest bits
for Gaussian components (Cover and Thomas, "Elements of Information Theory", 2nd edition, theorem 10.3.3).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvfloor.validation import positive


def water_level(variances: Tensor, error: float) -> float:
    """Return the level at which the errors min(variance, level) of all components sum to `error`.

    variances  any shape, entries >= 0
    error      the allowed sum of squared errors, > 0; from the sum of variances on, the level is the largest variance
    """
    error = positive("error", error)
    v = variances.detach().flatten().double().sort().values
    count = len(v)
    if count == 0 or error >= float(v.sum()):
        return float(v[-1]) if count else 0.0
    below = torch.cumsum(v, 0) - v  # the sum of all smaller variances
    level = (error - below) / (count - torch.arange(count))
    return float(level[(level <= v).nonzero()[0, 0]])


def gaussian_bits(variances: Tensor, level: float) -> Tensor:
    """Return the bits that a Gaussian component of each variance needs, at least, for the error min(variance, level).

    The bits are those of the rate-distortion function, log2(variance / level) / 2, or 0 below the level.
    """
    return 0.5 * torch.log2((variances.double() / level).clamp_min(1))
