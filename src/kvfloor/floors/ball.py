"""Bound the bits of a state whose answers err little in the l2 norm: the values of the proof fill the unit ball.

A method is a way to keep a KV cache; its state is the memory that it keeps of a stream of tokens. In the proof, the
values of m tokens are independent uniform points of the unit ball of dv dimensions. The receiver of the state reads
each point by a query that puts nearly all softmax mass on its token, and learns it to within a radius. The smaller the
radius, the more bits a point tells: dv log2(1/radius). The leak is the ratio (softmax mass off the token)/(mass on it).
docs/floors.md, "Other error guarantees", has the proofs.
"""

import math
from collections.abc import Callable, Iterable

from kvfloor.floors.entropy import row_bits
from kvfloor.validation import whole, within

_STEPS = 256  # radii tried per factor of two
_FEW, _BLOCK = 64, 16  # steps between the radii that are tried first; radii that are ruled out together


def ball_radius(epsilon: float, size: float, leak: float, rounding: float, *, of_all: bool) -> float:
    """Return the radius to which an answer within an l2 guarantee tells a hidden point of the unit ball.

    epsilon   the guarantee: |answer - attention|_2 <= epsilon S
    size      without `of_all`, S is at most size times the longest value. With it, S is at most |softmax|_2 size
              (1 + rounding): size bounds the Frobenius or operator norm of all values
    leak      ratio (softmax mass off the token)/(mass on it)
    rounding  largest |rounded point - point|_2 in the values' number format
    Law: (1 + rounding) (epsilon size f + leak) + rounding, with f = sqrt(1 + leak^2) if `of_all`, else 1 + leak; and
    infinite for leak >= 1, where nothing is claimed.
    Derived here: an answer z is within epsilon S of w x' + (1-w) y, where x' is the rounded point, w = 1/(1 + leak) its
    softmax weight at least, and y an average of other values. So (1 + leak) z is within the radius of x.
    """
    if leak >= 1.0:
        return math.inf
    spread = math.sqrt(1.0 + leak * leak) if of_all else 1.0 + leak
    return (1.0 + rounding) * (epsilon * size * spread + leak) + rounding


def ball_norm(m: int, dv: int) -> float:
    """Return an operator norm that m independent uniform points of the unit ball of dv dimensions keep to by half.

    The points are the rows of an m x dv matrix, whose operator norm is at most the result with probability at least
    1/2. Law, with s = sqrt(m) + sqrt(dv) and a = sqrt(2) Gamma((dv+1)/2)/Gamma(dv/2), the mean length of a Gaussian
    vector: norm^2 is the smaller of m and the least value, over k = 1, 2, ..., of 2^(1/k) s^2 e^(2k/s^2) / a^2. Two k
    are tried: the whole numbers next to s sqrt(ln(2)/2), the best real k.
    Derived here: docs/floors.md, "Other error guarantees", compares such points with Gaussian ones.
    """
    return math.sqrt(squared_ball_norm(whole("m", m), whole("dv", dv)))


def squared_ball_norm(m: int, dv: int) -> float:
    """Return the square of `ball_norm`(m, dv), without checks of its arguments."""
    s = math.sqrt(m) + math.sqrt(dv)
    best = s * math.sqrt(math.log(2.0) / 2.0)
    low, high = max(1, math.floor(best)), max(1, math.ceil(best))
    exponent = min(math.log(2.0) / k + 2.0 * k / s**2 for k in (low, high))
    log_mean_length = math.log(2.0) / 2.0 + math.lgamma((dv + 1) / 2.0) - math.lgamma(dv / 2.0)
    return min(float(m), s**2 * math.exp(exponent - 2.0 * log_mean_length))


def best_points(most: int, dv: int, p: float, radius: Callable[[int], float]) -> tuple[int, float, float]:
    """Find the number m <= `most` of hidden points for which the bound on the bits of a state is largest.

    p       probability that an answer is within its guarantee, and so tells its point to within the radius
    radius  called with m; returns the radius for m points. It must not decrease as m grows
    Law: the bound is `row_bits`(m, dv, p, log2(1/r)): a guess is within r of a uniform point with probability r^dv at
    most. Returns (m, r, bits): the choice, the radius that is counted, and the bound; (0, 1, 0) where no choice gives
    positive bits. Radii r are tried at 256 steps per factor of two, and for each the largest m that it allows is found
    by bisection, so that no argument can lower the bound.
    """
    most, dv, p = whole("most", most, least=0), whole("dv", dv), within("p", p, 0.0, 1.0, low_open=True)
    best = (0, 1.0, 0.0)
    least = radius(1) if most else 1.0
    if least >= 1.0:
        return best
    finest = _step(least)
    first = [min(_step(radius(most)), finest), *range(_FEW, finest, _FEW)]  # a good bound early rules out most others
    best = _best_of((step for step in first if step > 0), best, most, dv, p, radius)
    for start in range(0, finest, _BLOCK):
        steps = range(start + 1, min(start + _BLOCK, finest) + 1)
        gain = row_bits(1, dv, p, steps[-1] / _STEPS)
        if gain > 0.0 and _more(best[2] / gain, most, 2.0 ** -(steps[0] / _STEPS), radius) is not None:
            best = _best_of(steps, best, most, dv, p, radius)
    return best


def _step(radius: float) -> int:
    return math.floor(-_STEPS * math.log2(min(radius, 2.0)))


def _best_of(
    steps: Iterable[int],
    best: tuple[int, float, float],
    most: int,
    dv: int,
    p: float,
    radius: Callable[[int], float],
) -> tuple[int, float, float]:
    for step in steps:
        gain, allowed = row_bits(1, dv, p, step / _STEPS), 2.0 ** -(step / _STEPS)
        low, high = _more(best[2] / gain, most, allowed, radius) if gain > 0.0 else None, most
        if low is None:
            continue
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if radius(middle) <= allowed else (low, middle - 1)
        if low * gain > best[2]:
            best = (low, allowed, low * gain)
    return best


def _more(count: float, most: int, allowed: float, radius: Callable[[int], float]) -> int | None:
    """Return the least whole number above `count` if it is at most `most` and has an allowed radius; None if not."""
    above = math.floor(count) + 1
    return above if above <= most and radius(above) <= allowed else None
