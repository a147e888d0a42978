"""Compute the Gaussian reference: the fewest bits that describe attention's answers, if the values were Gaussian.

It is the rate-distortion function of the answers A V: the fewest bits for a given squared error. A is the attention
matrix (softmax weights) and V the matrix of the values. The result is a figure to compare measurements with, never a
lower bound for recorded values, which are not Gaussian.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from kvfloor.floors.measured.inputs import log_masses, logit_law, matrix
from kvfloor.floors.measured.products import Factors
from kvfloor.validation import positive, within


@dataclasses.dataclass(frozen=True)
class GaussianReference:
    """Hold the fewest bits that describe answers with a total squared error `distortion`, if the answers are Gaussian.

    The answers decompose into independent Gaussian components. Every component whose variance is above a common level
    is described with a squared error of that level; the others take no bits (reverse water-filling).
    bits        the number of bits, in all components
    distortion  the squared error, summed over all components
    level       the common level, theta
    variance    total variance of the answers: the squared error of guessing their mean
    sent        number of components that take bits: those of variance above `level`
    components  number of components with positive variance
    """

    bits: float
    distortion: float
    level: float
    variance: float
    sent: int
    components: int


def attention_matrix(
    q: Tensor, k: Tensor, *, scale: float = 1.0, softcap: float | None = None, later_mass: Tensor | float | None = None
) -> Tensor:
    """Return the softmax weights (m, n), float64, of queries q (m, d) on stored keys k (n, d).

    scale and softcap define the logits: scale q.k, then softcap tanh(logit / softcap) unless softcap is None.
    later_mass (m,), or one number, is the log-sum-exp of a query's logits on tokens after the stored ones. These tokens
    count in the softmax, so the weights of a query on stored keys sum to less than 1.
    """
    k = matrix("k", k)
    q = matrix("q", q, k.shape[1])
    scale, softcap = logit_law(scale, softcap)
    later = log_masses("later_mass", later_mass, len(q))
    everything = slice(None)
    logits = Factors.of(q, k, scale, softcap, torch.float64).logits(everything, everything)
    total = torch.logsumexp(logits, 1)
    if later is not None:
        total = torch.logaddexp(total, later.to(total.device))
    return logits.sub_(total.unsqueeze(1)).exp_()


def squared_singular_values(a: Tensor) -> Tensor:
    """Return the squared singular values (min(m, n),) of a (m, n), float64, largest first.

    They are the eigenvalues of the smaller of a a^T and a^T a. Eigenvalues within rounding of 0 are set to 0.
    """
    wide = matrix("a", a).double()
    gram = wide @ wide.T if wide.shape[0] <= wide.shape[1] else wide.T @ wide
    values = torch.linalg.eigvalsh(gram).flip(0)
    noise = len(values) * torch.finfo(torch.float64).eps * float(values[0].abs())
    return torch.where(values > noise, values, 0.0)


def value_spread(values: Tensor) -> Tensor:
    """Return the eigenvalues (dv,) of the covariance (divided by n) of values (n, dv), float64, largest first."""
    wide = matrix("values", values).double()
    away = wide - wide.mean(0)
    return torch.linalg.eigvalsh(away.T @ away / len(wide)).flip(0).clamp_min(0.0)


def gaussian_rate(variances: Tensor, distortion: float) -> GaussianReference:
    """Return the bits that independent Gaussians of these variances take at total squared error `distortion`.

    Law: the rate-distortion function 1/2 sum max(0, log2(variance / theta)) bits, with theta chosen so that sum
    min(theta, variance) = distortion. The bits are 0 if distortion is the total variance or more, and infinite at
    distortion 0. This is reverse water-filling (Shannon; Kolmogorov).
    """
    distortion = within("distortion", distortion, 0.0, math.inf)
    if not bool(torch.isfinite(variances).all()) or bool((variances < 0).any()):
        raise ValueError("variances must be finite and at least 0")
    positives = variances.double().flatten()
    positives = positives[positives > 0.0].sort().values
    count, variance = len(positives), float(positives.sum())
    if distortion >= variance:
        return GaussianReference(0.0, distortion, float(positives[-1]) if count else 0.0, variance, 0, count)
    if distortion == 0.0:
        return GaussianReference(math.inf, 0.0, 0.0, variance, count, count)
    below = torch.cumsum(positives, 0) - positives  # sum of the smaller components
    remaining = torch.arange(count, 0, -1, device=positives.device, dtype=torch.float64)
    at = int(torch.searchsorted(below + remaining * positives, distortion))  # theta <= positives[at]
    at = min(at, count - 1)
    level = (distortion - float(below[at])) / (count - at)
    above = positives[at:]
    bits = 0.5 * float(torch.log2(above / level).clamp_min(0.0).sum())
    return GaussianReference(bits, distortion, level, variance, int((above > level).sum()), count)


def gaussian_reference(
    a: Tensor,
    values: Tensor | None = None,
    *,
    spread: Tensor | None = None,
    distortion: float | None = None,
    mean_squared: float | None = None,
    relative: float | None = None,
) -> GaussianReference:
    """Return the fewest bits that describe the answers a V at a given error, if rows of V were independent Gaussians.

    `a` (m, n) is the attention matrix. All rows of V have one mean and one covariance Sigma. Give one of
        values  (n, dv), a matrix V: Sigma is the covariance of its rows
        spread  (dv,): the eigenvalues of Sigma
    and one error:
        distortion    D, the expected squared error summed over all m dv entries of the answers
        mean_squared  D / (m dv)
        relative      sqrt(D) / ||a V||_F, where V is `values`. If `spread` is given, the expectation of ||a V||_F^2 at
                      mean 0 takes the place of ||a V||_F^2
    Law: `gaussian_rate` of the variances sigma_i^2 lambda_j at distortion D, with sigma_i the singular values of `a`
    and lambda_j the eigenvalues of Sigma.
    For Gaussian values this is a lower bound on the bits of any state, even if `a` is known beforehand. For other
    values it is no bound: values of the same covariance can take fewer bits. Raises ValueError naming the argument.
    Source: derived, docs/floors.md, "Gaussian reference".
    """
    a = matrix("a", a)
    if (values is None) == (spread is None):
        raise ValueError("give either values or spread, the eigenvalues of their covariance")
    if values is not None:
        values = matrix("values", values)
        if len(values) != a.shape[1]:
            raise ValueError(f"values must have {a.shape[1]} rows, one per column of a, got {len(values)}")
        lambdas = value_spread(values)
    else:
        assert spread is not None
        lambdas = spread.double()
        if lambdas.ndim != 1 or bool((lambdas < 0).any()) or not bool(torch.isfinite(lambdas).all()):
            raise ValueError(f"spread must be eigenvalues (dv,), finite and at least 0, got {spread}")
    variances = torch.outer(squared_singular_values(a), lambdas.to(a.device))
    given = {"distortion": distortion, "mean_squared": mean_squared, "relative": relative}
    errors = [name for name, value in given.items() if value is not None]
    if len(errors) != 1:
        raise ValueError(f"give one of distortion, mean_squared, relative; got {', '.join(errors) or 'none'}")
    if distortion is not None:
        total = distortion
    elif mean_squared is not None:
        total = within("mean_squared", mean_squared, 0.0, math.inf) * a.shape[0] * len(lambdas)
    else:
        assert relative is not None
        power = float(variances.sum()) if values is None else float((a.double() @ values.double()).square().sum())
        total = positive("relative", relative) ** 2 * power
    return gaussian_rate(variances, total)
