"""Compute the memory of attention by moments: sums of monomials of the keys, which evaluate a Taylor polynomial of exp.

Such attention keeps no tokens.
"""

import math

from kvfloor.validation import positive, whole, within

LARGEST_RADIUS = 1e6


def taylor_degree(r: float, error: float) -> int:
    """Return the least degree of a Taylor polynomial of exp that answers attention within relative `error`.

    Law: the least g with e^r r^(g+1) / (g+1)! <= error / (2 + error), for logits of size at most `r` nats.
    Then every truncated weight is within a factor 1±b of its exponential, b = error/(2+error), and every normalised
    weight within (1+b)/(1-b) = 1 + error: answers are (1±error)-approximations for values >= 0, and meet the max,
    Frobenius and operator norm guarantees with epsilon = error for all values, for every query at once, with
    certainty.
    Derived here by Lagrange's remainder (docs/floors.md, "What is possible"). Real arithmetic: rounding needs
    about 2 r / ln 2 bits more than the answer has.
    """
    r = within("r", r, 0.0, LARGEST_RADIUS, low_open=True)
    error = positive("error", error)
    log_goal = math.log(error) - math.log(2.0 + error) - r

    def enough(g: int) -> bool:
        return (g + 1) * math.log(r) - math.lgamma(g + 2) <= log_goal

    low = high = max(0, math.floor(r) - 1)  # up to here r^(g+1)/(g+1)! is at least 1; from here on it falls
    while not enough(high):
        low, high = high, 2 * high + 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return low


def taylor_numbers(d: int, dv: int, g: int) -> int:
    """Count the numbers that moments to degree `g` take: (dv + 1) sums for each of the C(d+g, g) monomials of the key.

    One sum is kept per value coordinate, and one for the denominator. For d = 1 the count is (g + 1)(dv + 1): g + 1
    moments.
    """
    d, dv, g = whole("d", d), whole("dv", dv), whole("g", g, least=0)
    return math.comb(d + g, g) * (dv + 1)
