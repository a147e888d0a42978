"""Bound the number of balls, clusters or greedy centres that a clustering of keys in the unit ball needs.

All counts are upper bounds: whole numbers as floats, `inf` where a float overflows. For keys of norm up to R, divide
the radius or diameter delta by R.
"""

import math

from kvfloor.validation import positive, whole

_LARGEST_LOG = 700.0  # exp of it is still a float


def covering_balls(delta: float, d: int) -> float:
    """Return an upper bound on the number of balls of radius `delta` that cover the unit ball of R^d: (1 + 2/delta)^d.

    For delta >= 1 one ball suffices, and the result is 1.
    Proof: take as many points of the unit ball as possible that are more than delta apart. The balls of radius delta
    around them cover the unit ball, because no point can be added. The balls of radius delta/2 around them are disjoint
    and lie in a ball of radius 1 + delta/2, so their number is at most the ratio of the volumes.
    Haris & Onak (COLT 2025), Lemma 13, has (3/delta)^d for delta < 1.
    """
    delta, d = positive("delta", delta), whole("d", d)
    return 1.0 if delta >= 1.0 else _power(1.0 + 2.0 / delta, d)


def clusters(delta: float, d: int) -> float:
    """Return an upper bound on the number of clusters of diameter `delta` that points of the unit ball need.

    The diameter of a cluster is the largest distance of two of its points. The clusters are balls of radius delta/2,
    whose diameter is delta.
    Law: (1 + 4/delta)^d, and 1 for delta >= 2. Derived here. Haris & Onak (COLT 2025), Lemma 14, uses balls of radius
    delta, whose diameter is 2 delta (docs/floors.md, "Covering").
    """
    return covering_balls(positive("delta", delta) / 2.0, d)


def greedy_centres(delta: float, d: int) -> float:
    """Return an upper bound on the number of centres of an online greedy clustering of the unit ball at radius `delta`.

    The clustering makes a point a centre if it is farther than delta from every centre so far. So centres are more than
    delta apart.
    Law: at most (1 + 2/delta)^d centres, and 1 for delta >= 2, where no two points are farther apart than delta.
    Derived here.
    """
    delta, d = positive("delta", delta), whole("d", d)
    return 1.0 if delta >= 2.0 else _power(1.0 + 2.0 / delta, d)


def _power(base: float, exponent: int) -> float:
    log = exponent * math.log(base)
    return math.inf if log >= _LARGEST_LOG else float(math.floor(math.exp(log) * (1.0 + 1e-12)))
