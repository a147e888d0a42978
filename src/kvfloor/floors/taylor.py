"""Compute the memory of attention by moments: sums of monomials of the keys, which evaluate a Taylor polynomial of exp.

Such attention keeps no tokens. For each monomial in the key's coordinates up to some degree, it keeps two sums over all
tokens: that of monomial times value, and that of the monomial. Queries are answered from these sums.
"""

import math

from kvfloor.validation import positive, whole, within

LARGEST_RADIUS = 1e6


def taylor_degree(r: float, error: float) -> int:
    """Return the least degree of a Taylor polynomial of exp that answers attention within relative `error`.

    Logits are at most `r` nats in size. For values >= 0, every value of an answer is within a factor 1±error. For
    values v_i of any sign, the l2 error is at most `error` times each of max |v_i|, ||softmax||_2 ||V||_F and
    ||softmax||_2 ||V||_op, where V is the matrix of the values. This holds for every query, with certainty, in real
    arithmetic. In floating point, the sums need about 2 r / ln 2 more significant bits than the answer, because terms
    cancel.
    Law: the least g with e^r r^(g+1) / (g+1)! <= b, b = error / (2 + error). By Lagrange's remainder, every exponential
    is then within a factor 1±b, and every softmax weight within (1+b)/(1-b) = 1 + error. Derived here (docs/floors.md,
    "What is possible").
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
    """Count the stored numbers of moments to degree `g`: dv + 1 sums for each monomial of the key up to this degree.

    There are C(d+g, g) such monomials, a binomial coefficient. For each, one sum is kept per value coordinate, and one
    for the softmax denominator. For d = 1 the count is (g + 1)(dv + 1): g + 1 moments.
    """
    d, dv, g = whole("d", d), whole("dv", dv), whole("g", g, least=0)
    return math.comb(d + g, g) * (dv + 1)
