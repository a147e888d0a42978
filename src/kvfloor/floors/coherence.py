"""Bound the inner products `mu_*` and one-sided gaps `gap_*` of families of n nearly orthogonal keys in d dimensions.

mu is an upper bound on the inner product of two different keys. The one-sided gap of key i is
g_i = |k_i|^2 - max_{j != i} <k_i, k_j>. For unit keys, g >= 1 - mu. In a hard instance, the stream of a floor's proof,
each key hides values, and a query along the key reads these values. Reading needs a positive gap, no more.
"""

import math

from kvfloor.validation import whole, within


def jl_dim_paper(n: int, eps: float) -> float:
    """Return a dimension in which `n` Gaussian keys are nearly orthogonal: 12 ln n / (eps^2 - eps^3).

    In that dimension the inner products of all pairs of keys are within eps of 0 with probability 1 - 1/n.
    Source: Haris & Onak (COLT 2025), Lemma 3 and Lemma 22. At eps = 0.1 the dimension is 1333 ln n, too large for real
    heads, hence the other families.
    """
    eps = within("eps", eps, 0.0, 1.0, low_open=True, high_open=True)
    return 12.0 * math.log(whole("n", n)) / (eps**2 - eps**3)


def mu_rademacher(n: int, d: int, delta: float) -> float:
    """Return an upper bound on the inner products of any two of `n` random keys in {±1/sqrt(d)}^d.

    The bound holds for all pairs of keys at once, except with probability at most `delta`.
    Law: sqrt((4 ln n + 2 ln(1/(2 delta))) / d), Hoeffding's tail exp(-d t^2/2) over fewer than n^2/2 pairs. Derived
    here.
    """
    delta = within("delta", delta, 0.0, 1.0, low_open=True)
    bound = 4.0 * math.log(whole("n", n)) + 2.0 * math.log(1.0 / (2.0 * delta))
    return math.sqrt(max(0.0, bound) / whole("d", d))


def mu_sphere(n: int, d: int) -> float:
    """Return an upper bound on the inner products within some set of `n` unit keys in `d` dimensions.

    Such keys exist, as uniform random unit keys stay within the bound with positive probability.
    Law: sqrt(1 - (4/n^2)^(2/(d-1))) for d >= 2, as a cap of angle theta <= pi/2 covers at most the share
    sin(theta)^(d-1)/2 of the sphere. Derived here.
    """
    n, d = whole("n", n), whole("d", d, least=2)
    return math.sqrt(max(0.0, 1.0 - (4.0 / n**2) ** (2.0 / (d - 1))))


def mu_chirp(p: int, m: int) -> float:
    """Return an upper bound on the inner products of the n <= p^m keys of a chirp code: (m-1)/sqrt(p), Weil's bound.

    Each key is made of one polynomial mod p (`kvfloor.game.keys.codes.chirp`). p is a prime, m < p the degree of the
    polynomials, and d >= 2p the key width. Raises ValueError for p <= m.
    """
    p, m = whole("p", p), whole("m", m)
    if p <= m:
        raise ValueError(f"p must be above m (the degree), got p={p}, m={m}")
    return (m - 1) / math.sqrt(p)


def mu_reed_solomon(b: int, m: int) -> float:
    """Return an upper bound on the inner products of the n <= p^m one-hot Reed-Solomon keys: (m-1)/b.

    Each key is made of one polynomial mod a prime p (`kvfloor.game.keys.codes.reed_solomon`). m is the number of
    coefficients of a polynomial, b <= p the number of points at which the polynomials are evaluated, and d >= b p the
    key width. Two polynomials of degree below m agree on at most m - 1 of the b points.
    """
    return (whole("m", m) - 1) / whole("b", b)


def gap_hypercube(d: int) -> float:
    """Return the gap of all n <= 2^d sign vectors {±1/sqrt(d)}^d: exactly 2/d, as neighbours differ in one sign.

    The gap of unit vectors is 1 less the largest inner product of two of the vectors.
    """
    return 2.0 / whole("d", d)


def gap_circle(n: int) -> float:
    """Return the gap of `n` equally spaced points of a circle: 1 - cos(2 pi / n).

    The gap is 1 less the largest inner product of two points. It is positive for every n, so d = 2 has room for every
    n.
    """
    n = whole("n", n, least=2)
    return 2.0 * math.sin(math.pi / n) ** 2


def log_packing_count(d: int, gap: float) -> float:
    """Return ln of a lower bound on how many unit keys with this `gap` exist in d >= 2 dimensions.

    The gap is 1 less the largest inner product of two keys. Law: at least 2 / sin(theta)^(d-1) keys exist with
    cos(theta) = 1 - gap, as caps of angle theta around a maximal packing cover the sphere. Beyond theta = pi/2 the cap
    bound fails, so gap > 1 raises ValueError. Derived here.
    """
    d = whole("d", d, least=2)
    gap = within("gap", gap, 0.0, 1.0, low_open=True)
    return math.log(2.0) - 0.5 * (d - 1) * math.log(gap * (2.0 - gap))


def gap_packing(n: int, d: int) -> float:
    """Return a gap that some `n` unit keys in d >= 2 dimensions reach: 1 - sqrt(1 - (2/n)^(2/(d-1))).

    The gap is 1 less the largest inner product of two keys. This function inverts `log_packing_count`.
    """
    n, d = whole("n", n), whole("d", d, least=2)
    if n <= 2:
        return 1.0
    sine_squared = math.exp(2.0 / (d - 1) * math.log(2.0 / n))
    return sine_squared / (1.0 + math.sqrt(1.0 - sine_squared))


def gap_known(n: int, d: int) -> float:
    """Return the largest gap that this module's closed forms guarantee for `n` unit keys in `d` dimensions, at most 1.

    The gap is 1 less the largest inner product of two keys. It is 1 for n <= 2d, where the 2d unit vectors ±e_i of the
    axes suffice. Otherwise it is the largest of three gaps: on a circle, in the hypercube, and of a maximal packing. It
    is 0 when d = 1 and n > 2: no query can favour a key that lies between two other keys.
    """
    n, d = whole("n", n), whole("d", d)
    if n <= 2 * d:
        return 1.0
    if d == 1:
        return 0.0
    signs = math.ceil(math.log2(n))
    cube = gap_hypercube(signs) if signs <= d else 0.0
    return min(1.0, max(gap_packing(n, d), gap_circle(n), cube))
