"""Bound the number of scores q.k that a non-adaptive method must read to answer the last query of a stream.

A non-adaptive method fixes which scores it reads before the data arrive. The proof uses two kinds of streams of n
tokens, with one query q (norm sqrt(d)) at the end. In the first kind, all keys are 0. In the second, one heavy key k_i,
with q.k_i = 2 ln(n-1), takes nearly all softmax mass; i is uniform in {2..n}. In both, v_1 is n in every coordinate,
and all other values are 0. Attention is 1 in every coordinate in the first kind, and 1/(n-1) in the second. A method
that does not read the heavy key's score cannot tell the two kinds apart.
"""

from kvfloor.validation import relative_error, whole, within


def time_probes(n: int, p: float = 0.9, *, eta: float = 0.0, expected: bool = False) -> float:
    """Return the least number of scores q.k_l that a non-adaptive method must read to answer at the last token.

    A non-adaptive method fixes the positions l before the data arrive. The stream has `n` tokens. The answer must be
    within a factor 1±eta with probability `p`.
    Law: T >= (2 - 1/p)(n-1) for a fixed number T of scores. If T is random, its expectation is at least (2p-1)(n-1);
    `expected` = True returns this bound. Both bounds are tight. The result is 0 for p <= 1/2. It is also 0 for eta >= 1
    - 2/n, where one answer can be right for both kinds of streams: all keys zero, or one heavy key that takes nearly
    all softmax mass.
    Source: Haris & Onak (COLT 2025), Theorems 19 and 26, as Omega(n) probes of cost d; streams and constants derived
    here (docs/floors.md, "Time").
    """
    return _reads(whole("n", n) - 1, n, p, eta, expected)


def time_operations(n: int, d: int, p: float = 0.9, *, eta: float = 0.0, expected: bool = False) -> float:
    """Return the least number of key coordinates that a non-adaptive method must read to answer at the last token.

    A non-adaptive method fixes which coordinates of which keys it reads before the data arrive. The stream has `n`
    tokens of key width `d`. The answer must be within a factor 1±eta with probability `p`.
    Law: T >= (2 - 1/p)(n-1) d coordinates for a fixed T; T >= (2p-1)(n-1) d in expectation (`expected` = True). This is
    the law of `time_probes` with (n-1) d coordinates instead of n-1 scores. In the proof, the query has 1 in every
    coordinate. One key, of a random token i, is 2 ln(n-1) e_j with j uniform in {1..d}, and all others are 0. So one
    coordinate of (n-1) d differs from zero. Derived here; the paper counts d coordinates per score.
    """
    return _reads((whole("n", n) - 1) * whole("d", d), n, p, eta, expected)


def probing_success(T: float, n: int) -> float:
    """Return the best chance of a right answer from `T` scores read at positions fixed beforehand: (1 + T/(n-1))/2.

    The result is at most 1. With even odds, the stream of n tokens has only zero keys, or one heavy key, which takes
    nearly all softmax mass. The answer says which. Reading at uniformly random positions reaches this chance: answer as
    for zero keys unless the heavy key is found.
    """
    n = whole("n", n, least=2)
    T = within("T", T, 0.0, float("inf"))
    return 0.5 * (1.0 + min(1.0, T / (n - 1)))


def _reads(places: int, n: int, p: float, eta: float, expected: bool) -> float:
    p = within("p", p, 0.0, 1.0, low_open=True)
    if p <= 0.5 or relative_error(eta) >= 1.0 - 2.0 / n:
        return 0.0
    return (2.0 * p - 1.0 if expected else 2.0 - 1.0 / p) * places
