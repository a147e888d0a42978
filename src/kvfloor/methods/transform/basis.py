"""Define the linear transform of a coder: principal axes of vectors, under a metric that says which errors matter."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 1e-3
"""Share of the metric's mean eigenvalue that is added to all, so that no direction's error counts as nothing."""


@dataclass(frozen=True)
class Basis:
    """Map vectors of width w to uncorrelated coordinates along some axes, and back.

    mean       (w,) the mean vector
    forward    (w, axes): the coordinates of x are (x - mean) @ forward
    backward   (axes, w): x is mean + coordinates @ backward, less what lies along axes that are left out
    variances  (axes,) float64, the variance of each coordinate over the vectors it was fitted to, largest first
    """

    mean: Tensor
    forward: Tensor
    backward: Tensor
    variances: Tensor

    @classmethod
    def fitted(cls, x: Tensor, metric: Tensor | None = None) -> Basis:
        """Return the principal axes of vectors x (n, w) (the Karhunen-Loeve transform).

        metric: (w, w), positive semidefinite; the squared error of a difference e counts as e @ metric @ e, which is
        its squared length in coordinates, up to RIDGE. None: the squared length of e itself.
        """
        x = x.detach().double()
        mean = x.sum(0) / max(1, len(x))
        covariance = (x - mean).T @ (x - mean) / max(1, len(x))
        root = inverse = torch.eye(x.shape[1], dtype=torch.float64)
        if metric is not None:
            value, axis = torch.linalg.eigh((metric + metric.T).double() / 2)
            value = value.clamp_min(0)
            value = value + RIDGE * value.mean() + torch.finfo(torch.float32).tiny
            root = axis * value.sqrt() @ axis.T
            inverse = axis / value.sqrt() @ axis.T
        variance, turn = torch.linalg.eigh(root @ covariance @ root)
        variance, turn = variance.flip(0).clamp_min(0), turn.flip(1)
        return cls(mean.float(), (root @ turn).float(), (turn.T @ inverse).float(), variance)

    def scaled(self, factor: float) -> Basis:
        """Return the basis whose coordinates are `factor` times these."""
        return Basis(self.mean, self.forward * factor, self.backward / factor, self.variances * factor**2)

    def kept(self, level: float) -> Basis:
        """Return the basis of the axes of larger variance than `level` alone."""
        count = int((self.variances > level).sum())
        return Basis(self.mean, self.forward[:, :count], self.backward[:count], self.variances[:count])

    @classmethod
    def from_forward(cls, mean: Tensor, forward: Tensor, variances: Tensor) -> Basis:
        """Return the basis of all w axes whose `forward` (w, w) is given; `backward` is its inverse."""
        if forward.ndim != 2 or forward.shape != (len(mean), len(mean)) or variances.shape != mean.shape:
            raise ValueError(f"a mean of {tuple(mean.shape)} does not fit axes of {tuple(forward.shape)}")
        return cls(mean, forward, torch.linalg.inv(forward.double()).float(), variances)
