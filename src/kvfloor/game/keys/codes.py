"""Make key families from codes over prime fields: explicit keys whose largest inner product is known in closed form.

The keys are public keys of a game in which values are hidden under them and read by queries along them. The smaller the
inner products of the keys, the better a query singles one key out. Every key belongs to one polynomial modulo a prime
p. A point is a number x at which the polynomials are evaluated.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from kvfloor.floors.coherence import mu_chirp, mu_reed_solomon


def primes_up_to(limit: int) -> list[int]:
    """Return all primes <= limit, ascending."""
    return [p for p in range(2, limit + 1) if all(p % q for q in range(2, math.isqrt(p) + 1))]


def digits_needed(n: int, p: int) -> int:
    """Return the number of base-p digits that n different numbers need: the least m >= 1 with p^m >= n."""
    m, reach = 1, p
    while reach < n:
        m, reach = m + 1, reach * p
    return m


def chirp_parameters(n: int, d: int) -> tuple[int, int] | None:
    """Find (p, m) of the chirp code of n keys in d dimensions with the smallest bound on inner products, or None.

    Each of the n unit keys is made from its own polynomial of degree at most m modulo a prime p (`chirp`). p is tried
    from the largest prime <= d/2 downwards, and m is the least number with p^m >= n. The first p is returned for which
    p > m and the bound (m-1)/sqrt(p) on the inner product of two keys is less than 1. Returns None where there is no
    such code.
    """
    for p in reversed(primes_up_to(d // 2)):
        m = digits_needed(n, p)
        if p > m and mu_chirp(p, m) < 1.0:
            return p, m
    return None


def reed_solomon_parameters(n: int, d: int) -> tuple[int, int, int] | None:
    """Find (p, b, m) of the Reed-Solomon code of n keys in d dimensions with the smallest bound on inner products.

    p is a prime, m the number of coefficients of the code's polynomials mod p, and b the number of points at which the
    polynomials are evaluated. The bound, on the inner product of two keys, is (m-1)/b. A key has p coordinates per
    point: all 0 but the one whose index is the polynomial's value, in 0..p-1. So a key needs b p <= d coordinates.
    Returns None where there is no such code.
    """

    def fitting() -> Iterator[tuple[int, int, int]]:
        for p in primes_up_to(d):
            b, m = min(p, d // p), digits_needed(n, p)
            if m <= b:
                yield p, b, m

    return min(fitting(), key=lambda code: mu_reed_solomon(code[1], code[2]), default=None)


def chirp(n: int, d: int, seed: int = 0) -> Tensor:
    """Make n unit keys (n, d), float64, of the chirp code: cosines and sines of the values of a polynomial.

    Each key has one polynomial f(x) = a_1 x + ... + a_m x^m mod the prime p. Its coordinates are cos(2 pi f(x)/p) /
    sqrt(p) at the points x = 0..p-1, then sin(2 pi f(x)/p) / sqrt(p) at the same points, then zeros.
    Inner products of two keys are at most (m-1)/sqrt(p) (Weil). `seed` is not used: the code is explicit.
    Raises ValueError where no chirp code has n keys in d dimensions.
    """
    del seed
    code = chirp_parameters(n, d)
    if code is None:
        raise ValueError(f"no chirp code has n={n} keys in d={d} dimensions; raise d or take another family")
    p, m = code
    points = torch.arange(p)
    phase = _evaluate(n, p, m, points, first_power=1)
    turn = [2.0 * math.pi * step / p for step in range(p)]
    cosine = torch.tensor([math.cos(angle) for angle in turn], dtype=torch.float64)
    sine = torch.tensor([math.sin(angle) for angle in turn], dtype=torch.float64)
    keys = torch.zeros(n, d, dtype=torch.float64)
    keys[:, : 2 * p] = torch.cat([cosine[phase], sine[phase]], dim=1) / math.sqrt(p)
    return keys


def reed_solomon(n: int, d: int, seed: int = 0) -> Tensor:
    """Make n unit keys (n, d), float64, of a Reed-Solomon code: the values of a polynomial, each in one-hot form.

    A key has one polynomial mod a prime p, which is evaluated at the points 0..b-1. Each of the b values, in 0..p-1,
    becomes p coordinates of the key: 1/sqrt(b) at the index equal to the value, 0 at the others. Coordinates from b p
    on are 0. Inner products of two keys lie in [0, (m-1)/b] for polynomials of m coefficients. `seed` is not used: the
    code is explicit.
    Raises ValueError where no such code has n keys in d dimensions.
    """
    del seed
    code = reed_solomon_parameters(n, d)
    if code is None:
        raise ValueError(f"no Reed-Solomon code has n={n} keys in d={d} dimensions; raise d or take another family")
    p, b, m = code
    place = _evaluate(n, p, m, torch.arange(b), first_power=0) + p * torch.arange(b)
    keys = torch.zeros(n, d, dtype=torch.float64)
    return keys.scatter_(1, place, 1.0 / math.sqrt(b))


def _evaluate(n: int, p: int, m: int, points: Tensor, first_power: int) -> Tensor:
    """Evaluate the first n polynomials of m coefficients mod p at every entry of `points` (b,): (n, b) int64.

    Polynomial number l has the base-p digits of l as coefficients. The lowest digit is that of x^first_power, the next
    that of x^(first_power + 1), and so on.
    """
    number, value, power = torch.arange(n), torch.zeros(n, len(points), dtype=torch.int64), points**first_power
    for _ in range(m):
        value = (value + (number % p).unsqueeze(1) * power) % p
        number, power = number // p, power * points % p
    return value
