"""Bound the number of scores q.k that a non-adaptive method must read: one that fixes their positions before the data.

The hard pair of streams, sigma and H(i), has one query q (norm sqrt(d)). In sigma all keys are 0. In H(i) one heavy key
k_i, with q.k_i = 2 ln(n-1), takes nearly all softmax mass; i is uniform in {2..n}. v_1 is n in every coordinate, all
other values are 0. Attention is 1 on sigma and 1/(n-1) on H(i), in every coordinate.
"""

from kvfloor.validation import relative_error, whole, within


def time_probes(n: int, p: float = 0.9, *, eta: float = 0.0, expected: bool = False) -> float:
    """Return the least number of scores q.k_l that a non-adaptive method must read to answer at the last of `n` tokens.

    A non-adaptive method fixes the positions l before the data. The answer must be within 1±eta with probability `p`.
    Law, T the number of scores: T >= (2 - 1/p)(n-1) for a fixed T, and (2p-1)(n-1) for the expectation of a random T
    (`expected`); both bounds are tight.
    T is 0 for p <= 1/2 and for eta >= 1 - 2/n, where one answer can be right for both streams of the hard pair (all
    keys zero, or one heavy key, which takes nearly all softmax mass).
    Source: Haris & Onak (COLT 2025), Theorems 19 and 26, as Omega(n) probes of cost d; instance and constants
    derived here (docs/floors.md, "Time").
    """
    return _reads(whole("n", n) - 1, n, p, eta, expected)


def time_operations(n: int, d: int, p: float = 0.9, *, eta: float = 0.0, expected: bool = False) -> float:
    """Return the least number of key coordinates that a non-adaptive method must read to answer at the last token.

    A non-adaptive method fixes the places (token and coordinate) that it reads before the data; there are `n` tokens.
    The answer must be within 1±eta with probability `p`.
    Law: T >= (2 - 1/p)(n-1) d places, or (2p-1)(n-1) d in expectation (`expected`): the law of `time_probes`, with
    (n-1) d places in the role of the n-1 scores there. The one heavy key, of token i, is 2 ln(n-1) e_j, and the query
    has 1 in every coordinate; j is uniform in {1..d}, so one place of (n-1) d differs from zero. Derived here; the
    paper counts d per probe.
    """
    return _reads((whole("n", n) - 1) * whole("d", d), n, p, eta, expected)


def probing_success(T: float, n: int) -> float:
    """Return the best chance of a right answer from `T` non-adaptive probes (scores read): (1 + T/(n-1))/2, at most 1.

    The stream of n tokens has, with even odds, all keys zero or one heavy key, which takes nearly all softmax mass.
    Uniform probing reaches this chance: give the answer for zero keys unless a probe finds the heavy key.
    """
    n = whole("n", n, least=2)
    T = within("T", T, 0.0, float("inf"))
    return 0.5 * (1.0 + min(1.0, T / (n - 1)))


def _reads(places: int, n: int, p: float, eta: float, expected: bool) -> float:
    p = within("p", p, 0.0, 1.0, low_open=True)
    if p <= 0.5 or relative_error(eta) >= 1.0 - 2.0 / n:
        return 0.0
    return (2.0 * p - 1.0 if expected else 2.0 - 1.0 / p) * places
