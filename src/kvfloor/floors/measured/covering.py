"""Measure the covering ceiling: the memory that SubGen needs on given keys, at a given cluster radius.

SubGen (Zandieh et al. 2024) is a method that clusters keys online and greedily: a key farther than a radius delta from
all centres so far becomes a centre. It keeps a random sample of t keys near each centre, and one random sample of s
pairs of key and value from the whole stream. Memory is counted in numbers, i.e. stored floats. A row is the stream of
one kv head.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kvfloor.floors.measured.inputs import matrix
from kvfloor.floors.sampling import subgen_numbers, subgen_s, subgen_t
from kvfloor.validation import positive, whole, within

_TOKENS_AT_ONCE = 512


def greedy_cover(k: Tensor, delta: float) -> Tensor:
    """Return the indices (c,) of the keys that online greedy clustering of k (n, d) makes centres, in order of arrival.

    A key farther than `delta` (l2) from every centre so far becomes a centre, as in SubGen. Faster matrix products
    decide the pairs of keys whose distance is clearly below or above `delta`. The other distances are computed
    directly, so the result is the same as if all of them were.
    """
    k, delta = matrix("k", k), positive("delta", delta)
    k = k if k.dtype == torch.float64 else k.float()
    n = len(k)
    norms = k.square().sum(1)
    # Twice the largest error of |x|^2 - 2xc + |c|^2 and of the direct sum, in any order of summation.
    band = 8.0 * (k.shape[1] + 8) * torch.finfo(k.dtype).eps * (float(norms.max()) + delta**2)
    held, centre_norms = torch.empty_like(k), torch.empty_like(norms)
    centres = torch.empty(n, dtype=torch.int64, device=k.device)
    count = 0
    for low in range(0, n, _TOKENS_AT_ONCE):
        part = torch.arange(low, min(n, low + _TOKENS_AT_ONCE), device=k.device)
        part = part[~_covered(k[part], norms[part], held[:count], centre_norms[:count], delta, band)]
        new = part[_first_come(k[part], delta)]
        here = slice(count, count + len(new))
        held[here], centre_norms[here], centres[here] = k[new], norms[new], new
        count += len(new)
    return centres[:count].clone()


def covering_number(k: Tensor, delta: float) -> Tensor:
    """Count the centres of a greedy clustering, at radius `delta`, of each row's keys k (rows, n, d): (rows,) int64."""
    if not isinstance(k, Tensor) or k.ndim != 3:
        raise ValueError(f"k must be a tensor (rows, n, d), got {getattr(k, 'shape', type(k).__name__)}")
    return torch.tensor([len(greedy_cover(row, delta)) for row in k])


@dataclasses.dataclass(frozen=True)
class Ceiling:
    """Hold the memory that SubGen's error guarantee takes at cluster radius `delta`, for one row of keys.

    A row is the stream of one kv head.
    centres  number of cluster centres
    s        number of sampled pairs of key and value
    t        number of sampled keys per centre
    numbers  number of floats stored in all
    vacuous  True if SubGen saves nothing: s or t is at least the number of tokens, or keeping every token takes no more
             floats than `numbers`
    """

    delta: float
    centres: int
    s: int
    t: int
    numbers: int
    vacuous: bool


def covering_curve(
    k: Tensor,
    deltas: Sequence[float],
    *,
    dv: int,
    epsilon: float,
    radius: float,
    failure: float = 0.1,
) -> list[list[Ceiling]]:
    """Return the memory of SubGen at every cluster radius in `deltas`, for each row of keys k (rows, n, d).

    Returns one list per row, with one `Ceiling` per cluster radius.
    dv       width of a value
    epsilon  error of the guarantee: |answer - attention|_2 <= epsilon |softmax|_2 ||V||_op, for a query fixed before
             the stream. V is the matrix of the values; keys may have any length
    radius   largest length of scale * q for the queries q of the guarantee (it is not a cluster radius)
    failure  allowed probability that the error is larger
    Law: as many centres as a greedy clustering of the keys makes (`covering_number`), s = 9 dv / (epsilon^2 f) sampled
    pairs and t sampled keys per centre, with f = failure / 2. t is the smaller of two sufficient numbers (`subgen_t`),
    one by Chebyshev's inequality and one by Chernoff's. `subgen_numbers` counts the floats. Where s or t is too large
    for a float, the memory is that of keeping all n tokens.
    Source: Zandieh et al. 2024 (SubGen); docs/floors.md, "Covering ceiling".
    """
    dv, failure = whole("dv", dv), within("failure", failure, 0.0, 1.0, low_open=True, high_open=True)
    curves: list[list[Ceiling]] = [[] for _ in range(len(k))]
    for delta in deltas:
        for row, centres in enumerate(covering_number(k, delta).tolist()):
            forms = (subgen_t(delta, radius, epsilon, failure / 2.0, centres=c) for c in (None, float(centres)))
            sizes = subgen_s(dv, epsilon, failure / 2.0), max(1.0, min(forms))
            curves[row].append(_ceiling(delta, centres, *sizes, k.shape[1], k.shape[2], dv))
    return curves


def _ceiling(delta: float, centres: int, s: float, t: float, n: int, d: int, dv: int) -> Ceiling:
    everything = n * (d + dv)
    if not (math.isfinite(s) and math.isfinite(t)):
        return Ceiling(delta, centres, n, n, everything, True)
    s, t = math.ceil(s), math.ceil(t)
    numbers = subgen_numbers(d, dv, s, t, centres)
    return Ceiling(delta, centres, s, t, numbers, s >= n or t >= n or numbers >= everything)


def _covered(k: Tensor, norms: Tensor, centres: Tensor, centre_norms: Tensor, delta: float, band: float) -> Tensor:
    """Mark the keys of k (b, d) that lie within `delta` of one of the centres (c, d): (b,) bool.

    norms (b,) and centre_norms (c,) hold squared lengths. Matrix products give the squared distances, with rounding
    errors of at most `band`. A distance is computed again directly where its square is within `band` of delta^2.
    """
    if len(centres) == 0:
        return torch.zeros_like(norms, dtype=torch.bool)
    squared = torch.addmm(centre_norms.unsqueeze(0), k, centres.T, alpha=-2.0)
    least = squared.amin(1) + norms
    covered = least <= delta**2 - band
    for token in (~covered & (least <= delta**2 + band)).nonzero()[:, 0].tolist():
        close = squared[token] <= delta**2 + band - norms[token]
        covered[token] = _distances(k[token : token + 1], centres[close]).min() <= delta
    return covered


def _first_come(k: Tensor, delta: float) -> Tensor:
    """Mark the keys of k (b, d) that become centres of a greedy clustering at radius `delta`: (b,) bool.

    Keys are in order of arrival. A key becomes a centre if no earlier centre lies within delta; the caller has removed
    the keys within delta of the centres of earlier calls. The rule is applied to all keys at once, again and again
    until nothing changes. Every pass settles at least one more key, and only one set of centres satisfies the rule. So
    the result is that of applying the rule key by key.
    """
    near = (_distances(k, k) <= delta).tril(-1).float()
    opens = torch.ones(len(k), dtype=torch.bool, device=k.device)
    for _ in range(len(k)):
        again = (near @ opens.float()) == 0.0
        if bool((again == opens).all()):
            break
        opens = again
    return opens


def _distances(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
