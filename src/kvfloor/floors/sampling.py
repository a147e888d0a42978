"""Compute the sizes of two sampling methods: SubGen's constants and stored numbers, and lazy Gumbel sampling's tokens.

SubGen (Zandieh et al. 2024) clusters keys online. It estimates attention as z / tau. The numerator z estimates sum_j
exp(q.k_j) v_j from s sampled pairs of key and value. The denominator tau estimates sum_j exp(q.k_j) from t sampled keys
per cluster.
Lazy Gumbel sampling (Haris & Onak 2025) draws a token with the probability of its softmax weight: the token whose logit
plus random Gumbel noise is largest. It holds the tokens of largest logit, and of the others only the few whose noise is
so large that they may win. If a key is one number (d = 1), the tokens of largest logit are those of the largest or
smallest keys.
K and V are the matrices of the keys k_j and the values v_j; q is a query, and d and dv are the widths of a key and a
value. A number is one stored float. `failure` is the allowed probability that the error exceeds its bound.
"""

import math

from kvfloor.floors.covering import greedy_centres
from kvfloor.validation import one_of, positive, whole, within

_LARGEST_LOG = 700.0  # exp of it is still a float


def subgen_s(dv: int, epsilon: float, failure: float, *, norm: str = "operator") -> float:
    """Return the number s of sampled pairs of key and value that keeps SubGen's numerator z accurate.

    The numerator estimates sum_j exp(q.k_j) v_j. Accurate means an error of at most (epsilon/3) |exp(Kq)|_2 ||V||,
    except with probability `failure`, for one fixed query. `norm` is the norm of V, "operator" or "frobenius".
    Law, by Chebyshev's inequality: s is 9 / (epsilon^2 failure) for the Frobenius norm. For the operator norm it is dv
    times as large, because ||V||_F^2 <= dv ||V||_op^2. The result is not rounded to a whole number.
    Source: Zandieh et al. 2024 (SubGen); constants derived here.
    """
    dv, epsilon, failure = whole("dv", dv), _accuracy(epsilon), _failure(failure)
    rank = dv if one_of("norm", norm, ("operator", "frobenius")) == "operator" else 1
    return 9.0 * rank / failure / epsilon / epsilon


def subgen_t(delta: float, r: float, epsilon: float, failure: float, *, centres: float | None = None) -> float:
    """Return the number t of key samples per cluster that keeps SubGen's denominator accurate.

    The denominator estimates sum_j exp(q.k_j). Accurate means an error of at most epsilon/3 of this sum, except with
    probability `failure`, for one fixed query.
    delta    greatest distance of a key from its cluster's centre
    r        greatest length of a query
    centres  number of clusters; None: it does not enter the formula
    Law, with R = exp(2 delta r), the largest ratio of exp(q.k) of two keys of a cluster:
        centres None   9 (R-1)^2 / (4 R epsilon^2 failure), by Chebyshev's inequality on the sum of all clusters
        centres given  27 R ln(2 centres / failure) / epsilon^2, by Chernoff's inequality in each cluster
    The result is not rounded to a whole number, and is `inf` where R overflows a float.
    Source: Zandieh et al. 2024 (SubGen); constants derived here.
    """
    delta, r = positive("delta", delta), positive("r", r)
    epsilon, failure = _accuracy(epsilon), _failure(failure)
    if 2.0 * delta * r >= _LARGEST_LOG:
        return math.inf
    ratio = math.exp(2.0 * delta * r)
    if centres is None:
        return 2.25 * (ratio - 1.0) * ((ratio - 1.0) / ratio) / failure / epsilon / epsilon
    centres = within("centres", centres, 1.0, math.inf)
    return 27.0 * ratio * math.log(2.0 * centres / failure) / epsilon / epsilon


def subgen_numbers(d: int, dv: int, s: int, t: int, centres: int) -> int:
    """Count the numbers that SubGen stores, for s sampled pairs, `centres` centres and t sampled keys per centre.

    SubGen holds s pairs of key and value, the sum of all |v|^2, and for each centre its key, its count and t sampled
    keys.
    Law: s (d + dv) + centres (d (1 + t) + 1) + 1.
    """
    d, dv, centres = whole("d", d), whole("dv", dv), whole("centres", centres)
    return whole("s", s) * (d + dv) + centres * (d * (1 + whole("t", t)) + 1) + 1


def subgen_plan(
    n: int, d: int, dv: int, epsilon: float, r: float, failure: float, *, norm: str = "operator"
) -> tuple[float, int, int, int] | None:
    """Find the sizes (delta, s, t, centres) with which SubGen guarantees error `epsilon` at the fewest stored numbers.

    The guarantee is |answer - attention|_2 <= epsilon |softmax|_2 ||V|| with probability 1 - `failure`. It holds for
    epsilon <= 1, one query q fixed before the stream, |q| <= `r`, and `n` keys in the unit ball. `norm` (operator or
    frobenius) is the norm of V.
    delta    cluster radius, the best of 2^(-j/4), j from -4 to 40
    s, t     numbers of sampled pairs, and of sampled keys per cluster. Half of `failure` goes to each of numerator and
             denominator. t is the smaller of the two formulas of `subgen_t`
    centres  the lesser of n and a bound on the centres of a greedy clustering of the unit ball (`greedy_centres`)
    Returns None where s, or t at every cluster radius, overflows a float.
    """
    n, failure = whole("n", n), _failure(failure)
    pairs = subgen_s(dv, epsilon, failure / 2.0, norm=norm)
    if not math.isfinite(pairs):
        return None
    s, plans = math.ceil(pairs), []
    for delta in (2.0 ** (-j / 4.0) for j in range(-4, 41)):
        centres = int(min(float(n), greedy_centres(delta, d)))
        forms = (subgen_t(delta, r, epsilon, failure / 2.0, centres=count) for count in (None, centres))
        t = min(forms)
        if math.isfinite(t):
            plans.append((delta, s, max(1, math.ceil(t)), centres))
    return min(plans, key=lambda plan: subgen_numbers(d, dv, *plan[1:]), default=None)


def lazy_gumbel_tokens(n: int) -> float:
    """Return the expected number of tokens that lazy Gumbel sampling holds for one unbiased draw when d = 1: O(sqrt n).

    `n` is the number of tokens of the stream. The draw is a random token of the stream, with the probabilities of one
    query's softmax weights.
    Law: it holds the k = ceil(sqrt n) largest and the k smallest keys, and at most (n - k)/k sampled keys in
    expectation; never more than n.
    Source: Haris & Onak (COLT 2025), Appendix D, Algorithm 2; docs/floors.md ("What is possible") derives the constant.
    """
    n = whole("n", n)
    k = math.isqrt(n - 1) + 1
    return min(float(n), 2.0 * k + (n - k) / k)


def _accuracy(epsilon: float) -> float:
    return within("epsilon", epsilon, 0.0, 1.0, low_open=True)


def _failure(failure: float) -> float:
    return within("failure", failure, 0.0, 1.0, low_open=True, high_open=True)
