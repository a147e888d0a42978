"""Compute confidence intervals for shares of right answers and for their paired differences.

The two-sided intervals (Wilson, Tango) are score intervals: they invert a test instead of estimating a standard error.
So they keep a positive width at 0 and at n of n, where a Wald interval or a bootstrap has width zero. In a paired
difference, a method's share is compared with that of a reference (such as exact attention) on the same samples.
"""

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np

from kvfloor.validation import whole, within

MIN_SAMPLES = 32
"""Require at least this many samples for each share of right answers in an audit, a comparison of methods on tasks."""

MIN_BLOCKS = 8
"""Require at least this many blocks of values for the interval of their mean."""

LEAST_FOR_MEDIAN = 6
"""Require at least this many values for a 95 % interval of their median."""

_STAKES = np.array([1 / 64, 1 / 16, 1 / 4, 1 / 2, 3 / 4])
"""Shares of the capital that `mean_exceeds` stakes: small ones for close calls, large ones for clear ones."""

_BEYOND = 10
"""Resamples that must lie beyond each end of an interval of a mean."""


def wilson_interval(right: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the two-sided confidence interval (low, high) for a share, given `right` of `n` independent samples.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927).
    Raises ValueError where the counts or the confidence are impossible.
    """
    if n < 1 or not 0 <= right <= n:
        raise ValueError(f"{right} right of {n} samples is impossible: give n >= 1 and 0 <= right <= n")
    z = _quantile(confidence)
    share = right / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low = 0.0 if right == 0 else max(0.0, centre - half)
    high = 1.0 if right == n else min(1.0, centre + half)
    return low, high


def clopper_pearson_limit(wrong: int, drawn: int, alpha: float) -> float:
    """Return an upper confidence limit on the share of wrong items, given `wrong` of `drawn` independent draws.

    The true share is at most this limit with probability 1 - alpha. The limit is the largest e with
    Pr[Binomial(drawn, e) <= wrong] >= alpha.

    Source: Clopper and Pearson, "The use of confidence or fiducial limits", Biometrika 26 (1934).
    """
    wrong, drawn = whole("wrong", wrong, least=0), whole("drawn", drawn)
    alpha = within("alpha", alpha, 0.0, 1.0, low_open=True)
    if wrong > drawn:
        raise ValueError(f"wrong must be at most drawn = {drawn}, got {wrong}")
    if wrong == drawn:
        return 1.0
    low, high = wrong / drawn, 1.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if _binomial_cdf(wrong, drawn, middle) >= alpha else (low, middle)
    return high


def _binomial_cdf(k: int, n: int, e: float) -> float:
    """Return Pr[Binomial(n, e) <= k] for k < n. The terms are summed relative to the largest, against underflow."""
    if e <= 0.0:
        return 1.0
    if e >= 1.0:
        return 0.0
    log_odds = math.log(e) - math.log1p(-e)
    choose = math.lgamma(n + 1)
    logs = [
        choose - math.lgamma(i + 1) - math.lgamma(n - i + 1) + i * log_odds + n * math.log1p(-e) for i in range(k + 1)
    ]
    top = max(logs)
    return math.exp(top) * math.fsum(math.exp(term - top) for term in logs)


def blocks(values: Sequence[float], size: int) -> list[tuple[float, int]]:
    """Cut a sequence of values into blocks of about `size` values, and return each block's (sum, number of values).

    The blocks differ by at most one value in length; fewer than `size` values make one block.
    """
    parts = np.array_split(np.asarray(values, dtype=np.float64), max(1, len(values) // size))
    return [(float(part.sum()), len(part)) for part in parts]


def mean_interval(
    observed: Sequence[tuple[float, int]], confidence: float = 0.95, resamples: int | None = None, seed: int = 0
) -> tuple[float, float, float]:
    """Return (mean, low, high): the mean of all values and its confidence interval, from the values' sums over blocks.

    observed   (sum of the values, number of values) of each block of successive values, as `blocks` returns them
    resamples  number of bootstrap resamples; None: 2,000, or more at high confidence
    seed       seed of the resampling
    Values within a block may depend on each other; whole blocks are resampled with replacement. The interval inverts
    the resampled t statistics (bootstrap-t), so its two sides may differ in length, as skewed values such as
    divergences require. It has width 0 if all blocks have the same mean. Coverage is tested in
    `tests/audit/test_statistics.py`.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 12; blocks as one observation:
    Kuensch, Annals of Statistics 17 (1989).

    Raises ValueError for fewer than MIN_BLOCKS blocks, too few to estimate their spread.
    """
    _quantile(confidence)
    if len(observed) < MIN_BLOCKS:
        raise ValueError(f"an interval needs at least {MIN_BLOCKS} blocks of values, got {len(observed)}")
    sums, sizes = (np.array(column, dtype=np.float64) for column in zip(*observed, strict=True))
    if resamples is None:
        resamples = max(2000, math.ceil(2 * _BEYOND / (1 - confidence)))
    draws = np.random.default_rng(seed).integers(len(sums), size=(resamples, len(sums)))
    mean, error = _ratio(sums, sizes)
    means, errors = _ratio(sums[draws], sizes[draws])
    t = (means - mean) / np.where(errors > 0, errors, np.inf)
    least, most = np.quantile(t, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(mean), float(mean - most * error), float(mean - least * error)


def _ratio(sums: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean of all values, sum(sums) / sum(sizes), and its standard error, both of shape (...).

    sums and sizes (..., b) hold the sum and the number of values of each of b blocks. The standard error is that of a
    ratio of two means, to first order (delta method).
    """
    count, total = sums.shape[-1], sizes.sum(-1)
    mean = sums.sum(-1) / total
    residual = sums - mean[..., None] * sizes
    return mean, np.sqrt((residual**2).sum(-1) * count / (count - 1)) / total


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Return a two-sided confidence interval (low, high) for the median of the distribution of independent `values`.

    The ends are the k-th smallest and the k-th largest value, with the largest k such that the two miss the median with
    probability at most 1 - confidence: Pr[Binomial(n, 1/2) < k] <= (1 - confidence) / 2. This holds for every
    distribution. Raises ValueError for too few values: at 95 %, fewer than LEAST_FOR_MEDIAN, 6.
    """
    n, most = len(values), (1 - within("confidence", confidence, 0.0, 1.0, low_open=True, high_open=True)) / 2
    k = 0
    while k < n // 2 and _binomial_cdf(k, n, 0.5) <= most:
        k += 1
    if k == 0:
        raise ValueError(f"{n} values are too few for an interval of their median at confidence {confidence}")
    ordered = sorted(values)
    return ordered[k - 1], ordered[n - k]


def confidence_of_look(confidence: float, look: int) -> float:
    """Return the confidence that an interval must have at its k-th computation (look k, from 1) on growing data.

    With these confidences, all intervals together hold with probability `confidence`, however often the interval is
    computed, so one may stop after any computation. Look k gets the share 1 / (k (k + 1)) of the error 1 - confidence;
    these shares sum to 1 (union bound).

    Raises ValueError for a confidence outside (0, 1) and a look below 1.
    """
    _quantile(confidence)
    whole("look", look)
    return 1 - (1 - confidence) / (look * (look + 1))


def mean_exceeds(values: Sequence[float], limit: float, error: float) -> bool:
    """Return True if a sequential test shows that the mean of these non-negative values exceeds a limit.

    The test may be repeated after every new value, and the first True may be taken: if each value's expectation, given
    the values before it, is at most `limit`, the probability that a True ever comes is at most `error`. The values need
    no upper bound, and their number need not be fixed beforehand.

    The test is a bet against the limit. It starts with a capital of 1; each value x multiplies the capital by
    1 + s (x / limit - 1), where s is the share of the capital that is staked. The result is True once the capital,
    averaged over several s, has reached 1 / error.

    Source: Ville's inequality; betting for means: Waudby-Smith and Ramdas, "Estimating means of bounded random
    variables by betting", JRSS B 86 (2024), whose lower bounds need no upper bound on the values.
    Raises ValueError for a negative value, a limit of 0 or less, and an error outside (0, 1).
    """
    error = within("error", error, 0.0, 1.0, low_open=True, high_open=True)
    x = np.asarray(values, dtype=np.float64)
    if not limit > 0 or not (x >= 0).all():
        raise ValueError(f"limit {limit} must be above 0, and every value at least 0")
    growth = np.log1p(_STAKES[:, None] * (x / limit - 1)).cumsum(1)
    return bool((np.logaddexp.reduce(growth, 0) - math.log(len(_STAKES)) >= -math.log(error)).any())


def paired_counts(outcomes: Sequence[int], reference: Sequence[int]) -> tuple[int, int]:
    """Return (gained, lost): how many samples only `outcomes` has right, and how many only `reference` has right.

    Both hold 1 (right) or 0 per sample, in the same order. Raises ValueError if they differ in length.
    """
    if len(outcomes) != len(reference):
        raise ValueError(
            f"{len(outcomes)} outcomes cannot be paired with {len(reference)}: run both methods on the same samples"
        )
    gained = sum(1 for a, b in zip(outcomes, reference, strict=True) if a and not b)
    lost = sum(1 for a, b in zip(outcomes, reference, strict=True) if b and not a)
    return gained, lost


def paired_difference_interval(gained: int, lost: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the two-sided confidence interval (low, high) of the difference of two shares of right answers.

    The difference is a method's share minus a reference's, over `n` samples that both have answered.

    gained, lost: numbers of samples that only the method has right, and that only the reference has right. On all other
    samples the method and the reference agree, so only the number of these matters. The interval holds every difference
    that Tango's score test does not reject. If gained = lost = 0 it is +-z^2 / (n + z^2), with z the normal quantile:
    +-0.107 at n = 32 and 95 %, never zero.

    Source: Tango, "Equivalence test and confidence interval for the difference in proportions for the
    paired-sample design", Statistics in Medicine 17 (1998), 891-908. The interval covers the true difference, at n = 32
    and 95 %, with probability 0.967 on average and 0.934 at worst over a grid of true shares of gained and lost
    (`tests/audit/test_statistics.py`).

    Raises ValueError where the counts or the confidence are impossible.
    """
    if n < 1 or gained < 0 or lost < 0 or gained + lost > n:
        raise ValueError(f"{gained} gained and {lost} lost of {n} pairs is impossible: the two must sum to at most n")
    z = _quantile(confidence)
    estimate = (gained - lost) / n

    def score(difference: float) -> float:
        return tango_score(gained, lost, n, difference)

    low = -1.0 if lost == n else _bisect(score, -1.0, estimate, z)
    high = 1.0 if gained == n else _bisect(score, estimate, 1.0, -z)
    return low, high


def tango_score(gained: int, lost: int, n: int, difference: float) -> float:
    """Return Tango's score statistic for the hypothesis that two paired shares differ by `difference`.

    Two methods have answered the same `n` samples. gained is the number that only the first has right, lost the number
    that only the second has right; the difference is the first method's share minus the second's. Under the hypothesis
    the statistic is approximately standard normal. It falls as `difference` grows. Its variance uses the most likely
    shares of gained and lost samples that differ by `difference`.
    """
    deviation = gained - lost - n * difference
    a = 2 * n
    b = -gained - lost + (2 * n - gained + lost) * difference
    c = -lost * difference * (1 - difference)
    lost_share = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
    variance = n * (2 * lost_share + difference * (1 - difference))
    if variance > 0:
        return deviation / math.sqrt(variance)
    return math.copysign(math.inf, deviation) if deviation else 0.0


def _bisect(falling: Callable[[float], float], low: float, high: float, target: float) -> float:
    """Return the x in [low, high] at which a falling function equals `target`, to 2^-60 of the interval's length."""
    for _ in range(60):
        middle = (low + high) / 2
        if falling(middle) > target:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _quantile(confidence: float) -> float:
    """Return the normal quantile z of a two-sided interval: 1.96 for confidence 0.95.

    Raises ValueError unless the confidence lies strictly between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence {confidence} is impossible: give a share strictly between 0 and 1, e.g. 0.95")
    return NormalDist().inv_cdf((1 + confidence) / 2)


def student_quantile(confidence: float, freedom: int) -> float:
    """Return t such that Student's variable of so many degrees of freedom lies in [-t, t] with this probability.

    Law: the probability is a finite sum of powers of cos(theta), theta = atan(t / sqrt(freedom)); bisection inverts it.
    """
    confidence = within("confidence", confidence, 0.0, 1.0, low_open=True, high_open=True)
    low, high = 0.0, 0.5 * math.pi
    for _ in range(200):
        theta = 0.5 * (low + high)
        low, high = (theta, high) if _inside(theta, freedom) < confidence else (low, theta)
    return math.sqrt(freedom) * math.tan(low)


def _inside(theta: float, freedom: int) -> float:
    """Return P(|T| < sqrt(freedom) tan(theta)) for Student's T."""
    cosine, odd = math.cos(theta), freedom % 2
    term, total = (cosine if odd else 1.0), 0.0
    for j in range(freedom // 2):
        total += term
        term *= cosine * cosine * ((2 * j + 2) / (2 * j + 3) if odd else (2 * j + 1) / (2 * j + 2))
    return 2.0 / math.pi * (theta + math.sin(theta) * total) if odd else math.sin(theta) * total
