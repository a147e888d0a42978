"""Bound how many tokens an eviction method must keep, whatever tokens and weights it chooses, under an l2 error.

An eviction method here answers with a convex combination of the values of the tokens that it keeps. Its weights may
depend on everything: the query, the keys, the tokens that left. A window, a sample, a coreset of tokens with weights >=
0 and a selector are such methods; clusters, sums, codes and projections are not.
"""

import math

from kvfloor.floors.coherence import gap_packing
from kvfloor.validation import positive, whole, within

_MOST = 1 << 40  # tokens; a larger count is reported as this many


def kept_tokens(d: int, dv: int, r: float, epsilon: float, p: float = 1.0) -> float:
    """Return a lower bound on the tokens that an eviction method keeps on some stream, in tokens per kv head.

    d, dv     widths of keys and values
    r         bound on the logits, scale max|q| max|k|, in nats
    epsilon   bound on ||answer - attention||_2 / max|v|
    p         probability with which each query's answer meets the bound; the tokens kept are then an expectation
    Law: p m, for the largest m that one of two constructions allows:
        axes    m <= min(2d, 2dv) keys and values among ±e_j: epsilon < e^r / (e^r + m - 1), and for m > min(d, dv)
                also epsilon < (e^r - e^-r) / (e^r + e^-r + m - 2)
        codes   m unit keys of pairwise gap g and m unit values of pairwise gap h (1 less an inner product):
                epsilon < h - 2x / (1 + x), x = (m - 1) e^(-r g); g and h from `gap_packing`, for d, dv >= 2
    1 where neither allows two. At most 2^40. Raises ValueError for sizes that are not whole numbers >= 1, r <= 0,
    epsilon < 0 and p outside [0, 1]. Derived here (docs/floors.md, "Kept tokens"); Liberty, Andoni and Kleiner 2026
    (arXiv 2605.05602) have Omega(sqrt(d) e^r / epsilon) tokens for unit keys and values, without constants.
    """
    d, dv, r = whole("d", d), whole("dv", dv), positive("r", r)
    epsilon, p = within("epsilon", epsilon, 0.0, math.inf), within("p", p, 0.0, 1.0)
    return p * max(_on_axes(min(d, dv), r, epsilon), _in_codes(d, dv, r, epsilon))


def _on_axes(axes: int, r: float, epsilon: float) -> int:
    """Return the largest m of the construction "axes", with `axes` = min(d, dv)."""
    small = math.exp(-r)
    m = 1
    while m < 2 * axes:
        more = m + 1
        error = 1.0 / (1.0 + (more - 1) * small)
        if more > axes:
            error = min(error, (1.0 - small**2) / (1.0 + small**2 + (more - 2) * small))
        if epsilon >= error:
            break
        m = more
    return m


def _in_codes(d: int, dv: int, r: float, epsilon: float) -> int:
    """Return the largest m of the construction "codes"."""
    if d < 2 or dv < 2:
        return 1

    def feasible(m: int) -> bool:
        leak = (m - 1) * math.exp(-r * gap_packing(m, d))
        return epsilon < gap_packing(m, dv) - 2.0 * leak / (1.0 + leak)

    low, high = 1, _MOST
    if feasible(high):
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if feasible(middle) else (low, middle)
    return low
