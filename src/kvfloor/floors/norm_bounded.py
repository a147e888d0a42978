"""Count the keys that queries of bounded length can tell apart: each key has a query that gives it nearly all mass.

Mass is softmax mass. Such a query, a multiple of its key, is a spike query. The logit radius r = scale max|q| max|k|
bounds the logits, in nats (natural logarithm, as in exp(logit)). The gap of unit keys is 1 less the largest inner
product of two keys. The larger it is, the shorter a spike query may be. The counts enter memory floors, which are lower
bounds on any method's bits: as many hidden values can be read as keys can be told apart.
"""

import math

from kvfloor.floors.spherical import log_packing_count
from kvfloor.validation import positive, relative_error, whole, within

_LARGEST_LOG = 700.0  # exp of it is still a float


def N_dr(d: int, r: float, eta: float) -> float:
    """Count the keys in `d` dimensions that spike queries of logit radius `r` can tell apart at relative error `eta`.

    A spike query puts so much softmax mass on one key that its answer, right within a factor 1±eta, reveals a hidden
    bit in the key's value: all other keys together have at most (1-eta)/4 times this mass. `r` = scale * max|q| *
    max|k| in nats.
    Law: the largest whole m such that some m unit keys have pairwise gaps of at least g = ln(4m/(1-eta))/r <= 1
    (`log_packing_count`); for d = 1 there are the keys ±1 alone. It is at least 1, and at least min(2d, (1-eta) e^r /
    4) rounded down. At least this many keys can be told apart, perhaps more. So the floor computed from the result is
    valid. Returns a whole number as a float, `inf` beyond e^700. Derived here (docs/floors.md, "Bounded norms").
    """
    d, r, eta = whole("d", d), positive("r", r), relative_error(eta)
    return _count(d, r, math.log(4.0 / (1.0 - eta)))


def separable_keys(d: int, r: float, ratio: float) -> float:
    """Count the keys in `d` dimensions that spike queries of logit radius `r` can tell apart at a leak <= `ratio`.

    A spike query puts nearly all softmax mass on one key. Its leak is (mass on all other keys)/(mass on the key). `r` =
    scale * max|q| * max|k| in nats.
    Law: that of `N_dr` with g = ln(m / ratio)/r. At least this many keys can be told apart, perhaps more. Returns a
    whole number as a float, `inf` beyond e^700.
    `N_dr`(d, r, eta) is the case ratio = (1-eta)/4. Derived here (docs/floors.md, "Bounded norms").
    """
    d, r = whole("d", d), positive("r", r)
    return _count(d, r, -math.log(within("ratio", ratio, 0.0, 1.0, low_open=True, high_open=True)))


def _count(d: int, r: float, offset: float) -> float:
    """Count the keys in `d` dimensions that spike queries of logit radius `r` can tell apart at a leak <= e^-offset.

    A spike query puts nearly all softmax mass on one key. Its leak is (mass on all other keys)/(mass on the key). The
    law is that of `separable_keys` with ratio = e^-offset.
    """
    packed = _packed(d, r, offset) if d >= 2 else 0.0
    return max(1.0, packed, min(2.0 * d, _whole_exp(r - offset)))  # ±e_i have gap 1


def _packed(d: int, r: float, offset: float) -> float:
    """Return the largest whole m for which some m unit keys of gap (ln m + offset)/r exist in d dimensions, or 0.

    The gap is 1 less the largest inner product of two keys. Take a query of logit radius r in the direction of a key.
    At this gap, all other keys together have at most e^-offset times the softmax mass of this key. `log_packing_count`
    gives a number of keys that surely exist at a gap; more are not counted. Where m keys exist, fewer exist too, so
    bisection on ln m finds the largest m. Returns 0 where no m will do, and `inf` beyond e^700.
    """

    def feasible(log_m: float) -> bool:
        gap = (log_m + offset) / r
        return gap <= 1.0 and log_m <= log_packing_count(d, gap)

    low, high = 0.0, max(0.0, r - offset)
    if not feasible(low):
        return 0.0
    if feasible(high):
        low = high
    while high - low > 1e-15 * high:
        middle = 0.5 * (low + high)
        if not low < middle < high:
            break
        low, high = (middle, high) if feasible(middle) else (low, middle)
    if low >= _LARGEST_LOG:
        return math.inf
    m = float(math.floor(math.exp(low)))
    return m + 1.0 if feasible(math.log(m + 1.0)) else m


def _whole_exp(x: float) -> float:
    """Return e^x rounded down to a whole number, as a float; x above 700 counts as 700."""
    return float(math.floor(math.exp(min(x, _LARGEST_LOG)) * (1.0 + 1e-12)))
