"""Bound the inner products (`mu_*`) and the gaps (`gap_*`) of n keys in d dimensions that attention can tell apart.

The proofs of the memory floors (lower bounds on the bits that any KV cache needs) use such keys: each key's value holds
hidden bits, and a long query in the direction of one key reads the value of this key. The query can put nearly all
softmax weight on its key if the key's gap is positive.
    mu   an upper bound on the inner product of any two different keys, all of length 1
    gap  of key i: |k_i|^2 less the largest inner product <k_i, k_j> with another key k_j. If the query is k_i, every
         other logit is lower than that of key i by at least the gap. For keys of length 1 the gap is at least 1 - mu.
         The gap of a set of keys is the smallest of its keys' gaps
"""

import math

from kvfloor.floors.spherical import gap_packing
from kvfloor.validation import whole, within


def jl_dim_paper(n: int, eps: float) -> float:
    """Return a dimension d in which `n` random keys, of Gaussian entries with variance 1/d, are nearly orthogonal.

    Law: d = 12 ln n / (eps^2 - eps^3). The inner products of all pairs of keys are then within eps of 0 with
    probability 1 - 1/n. At eps = 0.1 the dimension is 1333 ln n, too large for real heads. The other functions of this
    file give bounds for keys that need fewer dimensions.
    Source: Haris & Onak (COLT 2025), Lemma 3 and Lemma 22.
    """
    eps = within("eps", eps, 0.0, 1.0, low_open=True, high_open=True)
    return 12.0 * math.log(whole("n", n)) / (eps**2 - eps**3)


def mu_rademacher(n: int, d: int, delta: float) -> float:
    """Return an upper bound on the inner products of any two of `n` random keys whose coordinates are ±1/sqrt(d).

    The bound holds for all pairs of keys at once, except with probability at most `delta`.
    Law: sqrt((4 ln n + 2 ln(1/(2 delta))) / d). By Hoeffding's bound, the inner product of one pair exceeds t with
    probability at most exp(-d t^2/2), and there are fewer than n^2/2 pairs. Derived here.
    """
    delta = within("delta", delta, 0.0, 1.0, low_open=True)
    bound = 4.0 * math.log(whole("n", n)) + 2.0 * math.log(1.0 / (2.0 * delta))
    return math.sqrt(max(0.0, bound) / whole("d", d))


def mu_sphere(n: int, d: int) -> float:
    """Return a bound mu such that some `n` unit keys in `d` dimensions have pairwise inner products of at most mu.

    Such keys exist, because independent uniform random unit keys stay within the bound with positive probability.
    Law: mu = sqrt(1 - (4/n^2)^(2/(d-1))) for d >= 2. The points within an angle theta <= pi/2 of a key cover at most
    the share sin(theta)^(d-1)/2 of the sphere. With cos(theta) = mu this share is 2/n^2, and there are fewer than n^2/2
    pairs of keys. Derived here.
    """
    n, d = whole("n", n), whole("d", d, least=2)
    return math.sqrt(max(0.0, 1.0 - (4.0 / n**2) ** (2.0 / (d - 1))))


def mu_chirp(p: int, m: int) -> float:
    """Return an upper bound on the inner products of the n <= p^m keys of a chirp code: (m-1)/sqrt(p), Weil's bound.

    Each key is made of its own polynomial f mod p. Its coordinates are cos(2 pi f(x)/p) / sqrt(p) and sin(2 pi f(x)/p)
    / sqrt(p) at x = 0..p-1 (`kvfloor.game.keys.codes.chirp`).
    p  a prime. A key has 2p such coordinates, so its width d must be at least 2p
    m  the largest degree of the polynomials, m < p
    Raises ValueError for p <= m.
    """
    p, m = whole("p", p), whole("m", m)
    if p <= m:
        raise ValueError(f"p must be above m (the degree), got p={p}, m={m}")
    return (m - 1) / math.sqrt(p)


def mu_reed_solomon(b: int, m: int) -> float:
    """Return an upper bound on the inner products of the n <= p^m one-hot Reed-Solomon keys: (m-1)/b.

    Each key is made of its own polynomial mod a prime p (`kvfloor.game.keys.codes.reed_solomon`). At each of b points,
    the polynomial's value, in 0..p-1, becomes p coordinates of the key: 1/sqrt(b) at the index equal to the value, 0 at
    the others. So the key width d must be at least b p.
    b  the number of points, b <= p
    m  the number of coefficients of a polynomial. Two polynomials of degree below m agree on at most m - 1 of the
       points
    """
    return (whole("m", m) - 1) / whole("b", b)


def gap_hypercube(d: int) -> float:
    """Return the gap of the set of all 2^d sign vectors {±1/sqrt(d)}^d: exactly 2/d.

    The gap is 1 less the largest inner product of two of the vectors, which is that of two vectors that differ in one
    sign.
    """
    return 2.0 / whole("d", d)


def gap_circle(n: int) -> float:
    """Return the gap of `n` equally spaced unit vectors in the plane: 1 - cos(2 pi / n).

    The gap is 1 less the largest inner product of two of the vectors. It is positive for every n, so that d = 2
    dimensions suffice for any number of keys.
    """
    n = whole("n", n, least=2)
    return 2.0 * math.sin(math.pi / n) ** 2


def gap_known(n: int, d: int) -> float:
    """Return the largest gap that is proven here of some `n` unit keys in `d` dimensions, at most 1.

    The gap of a set of unit keys is 1 less the largest inner product of two of them. The result is
        1          for n <= 2d, where n of the 2d vectors ±e_i along the axes serve as keys
        0          for d = 1 and n > 2, as there are only two unit keys
        otherwise  the largest of three gaps: of n points on a circle (`gap_circle`), of sign vectors for n <= 2^d
                   (`gap_hypercube`), and of keys packed on the sphere (`gap_packing`)
    """
    n, d = whole("n", n), whole("d", d)
    if n <= 2 * d:
        return 1.0
    if d == 1:
        return 0.0
    signs = math.ceil(math.log2(n))
    cube = gap_hypercube(signs) if signs <= d else 0.0
    return min(1.0, max(gap_packing(n, d), gap_circle(n), cube))
