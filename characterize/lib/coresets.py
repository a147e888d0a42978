"""Compress tokens into weighted tokens, sums of monomials, or both; references for `characterize.successors`.

A row is one (batch item, kv head) stream. In shapes, r are rows, n tokens, s entries of a coreset, m queries, d and dv
the widths of a key and of a value. All keys k (r, n, d) and values v (r, n, dv) are float64, and `scale` is the factor
on q.k. `sharpness` is the factor h in the kernel exp(h scale k.k') by which tokens are compared with each other; the
temperature tau of WildCat is 1 / sqrt(h). Every function takes all tokens at once, which is kinder than a stream.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvfloor import Spec
from kvfloor.core.randomness import row_keys, uniform
from kvfloor.core.summary import Summary
from kvfloor.methods.sketches.self_balancing import gram, halve
from kvfloor.methods.summaries.clusters import ClusterMeansState
from kvfloor.methods.summaries.nystrom import NystromState

GREEDY = 0.125  # threshold of the walk, as in `balance`


@dataclass(frozen=True)
class Sums:
    """Hold sums over tokens for a Taylor polynomial of exp(scale q.(k - centre)) of degree 0 or 1.

    count       number of tokens n
    centre      (r, d) the tokens' mean key, so that the sum of k - centre is 0 and needs no place
    value       (r, dv) sum of values
    product     (r, d, dv) sum of (k - centre) v^T; None: degree 0
    """

    count: int
    centre: Tensor
    value: Tensor
    product: Tensor | None

    @staticmethod
    def over(k: Tensor, v: Tensor, degree: int) -> Sums:
        centre = k.mean(1)
        product = (k - centre.unsqueeze(1)).transpose(1, 2) @ v if degree else None
        return Sums(k.shape[1], centre, v.sum(1), product)

    @property
    def numbers(self) -> int:
        """Return how many numbers a row keeps."""
        product = 0 if self.product is None else self.product[0].numel()
        return 1 + self.centre.shape[1] + self.value.shape[1] + product


@dataclass(frozen=True)
class Coreset:
    """Hold weighted tokens: an entry adds exp(scale q.key) value to the numerator, exp(scale q.key) mass to the mass.

    key (r, s, d), value (r, s, dv), mass (r, s); mass may be negative. With `sums`, an entry's factor is the
    exponential less its Taylor polynomial, and the polynomial's own sums over all tokens are added.
    """

    key: Tensor
    value: Tensor
    mass: Tensor
    sums: Sums | None = None

    def terms(self, q: Tensor, scale: float, top: Tensor) -> tuple[Tensor, Tensor]:
        """Return numerator (r, m, dv) and mass (r, m) of queries q (r, m, d), both times exp(-top), top (r, m, 1)."""
        x = scale * q @ self.key.transpose(1, 2)
        if self.sums is None:
            weight = (x - top).exp()
            return weight @ self.value, (weight @ self.mass.unsqueeze(-1)).squeeze(-1)
        base = scale * q @ self.sums.centre.unsqueeze(-1)
        inner = x - base
        polynomial = torch.ones_like(inner) if self.sums.product is None else 1.0 + inner
        lift = (base - top).exp()
        weight = (x - top).exp() - lift * polynomial
        whole = self.sums.value.unsqueeze(1)
        if self.sums.product is not None:
            whole = whole + scale * q @ self.sums.product
        mass = (weight @ self.mass.unsqueeze(-1)).squeeze(-1) + lift.squeeze(-1) * self.sums.count
        return weight @ self.value + lift * whole, mass


def answer(q: Tensor, k: Tensor, v: Tensor, scale: float, coreset: Coreset | None) -> Tensor:
    """Return the answers (r, m, dv) to queries q (r, m, d) over exact tokens k, v and a coreset of the others.

    Where the whole mass is not positive, which signed masses allow, the exact tokens answer alone: 0 if there are none.
    """
    x = scale * q @ k.transpose(1, 2)
    every = x if coreset is None else torch.cat([x, scale * q @ coreset.key.transpose(1, 2)], -1)
    top = every.amax(-1, keepdim=True)
    weight = (x - top).exp()
    alone, mass_alone = weight @ v, weight.sum(-1)
    if coreset is None:
        return alone / mass_alone.unsqueeze(-1)
    more, mass = coreset.terms(q, scale, top)
    fine = (mass_alone + mass > 0).unsqueeze(-1)
    numerator = torch.where(fine, alone + more, alone)
    whole = torch.where(fine.squeeze(-1), mass_alone + mass, mass_alone)
    return numerator / whole.clamp_min(1e-300).unsqueeze(-1)


# ---- samples and walks ---------------------------------------------------------------------------------------


def sampled(k: Tensor, v: Tensor, size: int, seed: int, sums: Sums | None = None) -> Coreset:
    """Draw `size` tokens uniformly without repetition; each stands for n / size tokens."""
    rows, n = k.shape[:2]
    picked = _draws(rows, n, seed).argsort(1)[:, :size]
    return _of(k, v, picked, torch.full(picked.shape, n / size, dtype=k.dtype), sums)


def walked(k: Tensor, v: Tensor, size: int, scale: float, seed: int, kernel: str, degree: int | None = None) -> Coreset:
    """Halve the tokens by self-balancing walks over pairs of neighbours until `size` are left, with weights 2^l.

    The oldest tokens are halved once more than the newest, so that `size` is met. kernel is one of
    "thinformer"   exp(scale k.k') (v.v' / max |v|^2 + 1), as in Thinformer and Express
    "balance"      exp(scale / 4 k.k') (v.v' / max |v|^2 + 1/40) of keys less their mean, as in kvfloor's `balance`
    degree: the coreset is one of the remainder, i.e. of the kernel less its Taylor polynomial of this degree, 0 or 1.
    """
    rows, n = k.shape[:2]
    most = max(0, (n // size).bit_length() - 1)  # 2^most <= n / size
    low, high = 2**most, 2 ** (most + 1)
    young = max(0, min(n // low, (size * high - n) // low))  # kept of the newest tokens
    cut = n - young * low  # the oldest `cut` tokens are halved once more
    picked, weight = [], []
    for first, last, times in ((0, cut, most + 1), (cut, n, most)):
        index = torch.arange(first, last).expand(rows, -1)
        for level in range(times):
            index = _halved(k, v, index, scale, seed + level, kernel, degree)
        picked.append(index)
        weight.append(torch.full(index.shape, (last - first) / max(1, index.shape[1]), dtype=k.dtype))
    sums = None if degree is None else Sums.over(k, v, degree)
    return _of(k, v, torch.cat(picked, 1), torch.cat(weight, 1), sums)


def _halved(k: Tensor, v: Tensor, index: Tensor, scale: float, seed: int, kernel: str, degree: int | None) -> Tensor:
    index = index[:, : index.shape[1] // 2 * 2]
    if index.shape[1] == 0:
        return index
    keys, values = _at(k, index), _at(v, index)
    live = torch.ones(index.shape, dtype=torch.bool)
    sharpness, constant, centre = (1.0, 1.0, False) if kernel == "thinformer" else (0.25, 0.025, True)
    products = gram(keys, values, live, scale * sharpness, constant, centre)
    if degree is not None:
        products = _remainder(k, keys, values, scale * sharpness, constant, degree)
    draws = _draws(len(k), index.shape[1], seed)
    stays, _, _ = halve(products, torch.full((len(k),), index.shape[1]), draws, GREEDY, "pairs")
    return index[stays].view(len(k), -1)


def _remainder(every: Tensor, k: Tensor, v: Tensor, scale: float, constant: float, degree: int) -> Tensor:
    """Return the kernel of the walk less its Taylor polynomial about the mean of all keys `every`."""
    centred = k - every.mean(1, keepdim=True)
    x = scale * centred @ centred.transpose(1, 2)
    most = float(x.max())
    rest = (x - most).exp() - (1.0 + (x if degree else 0.0)) * torch.exp(torch.tensor(-most, dtype=x.dtype))
    unit = v / v.norm(dim=-1).amax(1).view(-1, 1, 1).clamp_min(1e-300)
    return rest * (unit @ unit.transpose(1, 2) + constant)


# ---- pivots and clusters -------------------------------------------------------------------------------------


def nystrom(k: Tensor, v: Tensor, size: int, scale: float, seed: int, sharpness: float) -> Coreset:
    """Choose tokens by randomly pivoted Cholesky and weight them by Nystrom's formula (WildCat, arXiv 2602.10056).

    With K(k, k') = exp(h scale k.k') of keys less their mean: W = K(S, S)^-1 K(S, all), value W V, mass W 1. A pivot is
    drawn in proportion to the residual of its diagonal. The mean is a common factor of all weights of a query.
    """
    centre = k.mean(1, keepdim=True)
    root = (sharpness * scale) ** 0.5 * (k - centre)
    square = root.square().sum(-1)
    near = (root @ root.transpose(1, 2) - 0.5 * (square.unsqueeze(1) + square.unsqueeze(2))).exp()  # unit diagonal
    picked = pivots(near, square, size, seed)
    rows = torch.arange(len(k)).unsqueeze(1)
    across = near[rows, picked]  # (r, s, n)
    inner = across.gather(2, picked.unsqueeze(1).expand(-1, picked.shape[1], -1))
    inner = inner + 1e-8 * torch.eye(picked.shape[1], dtype=k.dtype)
    lift = (0.5 * (square.unsqueeze(1) - square.gather(1, picked).unsqueeze(2))).exp()
    weight = torch.cholesky_solve(across, torch.linalg.cholesky(inner)) * lift
    # exp(scale q.(k - centre)) is what the weights carry over; the factor exp(scale q.centre) is common to all keys.
    return Coreset(_at(k, picked), weight @ v, weight.sum(-1))


def pivots(near: Tensor, square: Tensor, size: int, seed: int) -> Tensor:
    """Return `size` pivots (r, size) of the kernel exp((|x|^2 + |x'|^2) / 2) near, near (r, n, n), square |x|^2."""
    rows, n = square.shape
    at = torch.arange(rows)
    log_diagonal = square.clone()
    residual = torch.ones_like(square)  # of the unit diagonal
    factor = near.new_zeros(rows, n, size)
    draws = _draws(rows, size, seed)
    picked = torch.zeros(rows, size, dtype=torch.int64)
    for i in range(size):
        score = log_diagonal + residual.clamp_min(1e-14).log()
        share = (score - score.amax(1, keepdim=True)).exp().masked_fill(residual <= 1e-12, 0.0).cumsum(1)
        one = torch.searchsorted(share, draws[:, i : i + 1] * share[:, -1:]).squeeze(1).clamp_max(n - 1)
        column = near[at, one] - (factor @ factor[at, one].unsqueeze(-1)).squeeze(-1)
        factor[:, :, i] = column / residual[at, one].clamp_min(1e-12).sqrt().unsqueeze(1)
        residual = (residual - factor[:, :, i].square()).clamp_min(0.0)
        residual[at, one] = 0.0
        picked[:, i] = one
    return picked


def absorbed(summary: Summary, k: Tensor, v: Tensor, scale: float) -> Coreset:
    """Return what a `clusters` or `nystrom` summary holds after the tokens left in order of age, in float32."""
    rows, n, d = k.shape
    state = summary.open(Spec(rows, d, v.shape[2], scale))
    row, position = torch.arange(rows).repeat_interleave(n), torch.arange(n).repeat(rows)
    assert isinstance(state, ClusterMeansState | NystromState)
    state.absorb(row, k.flatten(0, 1).float(), v.flatten(0, 1).float(), position)
    count = state.count.double()
    each, share = (state.value, state.share) if isinstance(state, NystromState) else (state.mean_v, torch.ones(()))
    return Coreset(state.mean_k.double(), each.double() * count.unsqueeze(-1), share.double() * count)


# ---- shared --------------------------------------------------------------------------------------------------


def _of(k: Tensor, v: Tensor, picked: Tensor, weight: Tensor, sums: Sums | None) -> Coreset:
    return Coreset(_at(k, picked), _at(v, picked) * weight.unsqueeze(-1), weight, sums)


def _at(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def _draws(rows: int, n: int, seed: int) -> Tensor:
    lane = row_keys(seed, torch.arange(rows), "coreset").unsqueeze(1)
    return uniform(lane, torch.arange(n).expand(rows, -1))
