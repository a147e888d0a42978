"""Predict from a token's key, and from its distance to the stream's end, how fine its codes must be.

The energy of a token is the squared gradient of later predictions with respect to its key or its value: how much an
error of it matters. Energies differ by factors of thousands, mostly as the token will be attended to. Their logarithms
are predicted by a linear function of features: a constant, the logarithm of the distance, the key's coordinates and the
squares of the first ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvfloor.methods.transform.basis import Basis

SQUARES = 64  # coordinates whose squares are features
SHRINKAGE = 100.0  # of the ridge regression, in tokens; features have about unit variance
MOST = 16
"""The largest fineness, and the smallest one's negative: steps are up to 256 times smaller or larger than the step."""


def features(keys: Tensor, distance: Tensor, basis: Basis) -> Tensor:
    """Return the features (n, 2 + w + min(w, SQUARES)), float64, of tokens.

    keys (n, w) vectors; distance (n,) of each token to its stream's end, 1 for the newest; basis: that of the keys
    """
    spread = basis.variances.clamp_min(float(basis.variances[0]) * 1e-12).clamp_min(torch.finfo(torch.float64).tiny)
    y = ((keys - basis.mean) @ basis.forward).double() / spread.sqrt()
    far = torch.log2(distance.double()).unsqueeze(1)
    return torch.cat([torch.ones(len(y), 1, dtype=torch.float64), far, y, y[:, :SQUARES].square()], 1)


def fit(found: Tensor, energy: Tensor) -> Tensor:
    """Return the weights of features `found` (n, features) that predict log2 of the energies (n,), less its mean.

    By ridge regression; the constant and the distance are not shrunk.
    """
    wanted = torch.log2(energy.double().clamp_min(torch.finfo(torch.float64).tiny))
    shrinkage = torch.full((found.shape[1],), SHRINKAGE, dtype=torch.float64)
    shrinkage[:2] = 1e-6
    weights = torch.linalg.solve(found.T @ found + torch.diag(shrinkage), found.T @ wanted)
    weights[0] -= (found @ weights).mean()
    return weights


def predicted(found: Tensor, weights: Tensor) -> Tensor:
    """Return the fineness (n,), int64, of tokens with features `found`: predicted log2 energy, rounded and bounded."""
    return (found @ weights).nan_to_num(0.0).clamp(-MOST, MOST).round().long()
