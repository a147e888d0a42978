"""Compute confidence intervals for shares of right answers and for their paired differences.

The two-sided intervals (Wilson, Tango) are score intervals: they invert a test instead of estimating a standard error.
So they keep a positive width at 0 and at n of n, where a Wald interval or a bootstrap has width zero. In a paired
difference, a method is compared with a reference (such as exact attention) on the same samples.
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

    It is the largest e with Pr[Binomial(drawn, e) <= wrong] >= alpha, and holds with probability 1 - alpha.

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
    """Return Pr[Binomial(n, e) <= k] for k < n. Terms are scaled by the largest, so that the sum does not underflow."""
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
    """Return (mean, low, high): the mean of all values and its confidence interval, given the output of `blocks`.

    Values within a block may depend on each other; the blocks are resampled with replacement. The interval inverts the
    resampled t statistics (bootstrap-t), so its two sides may differ in length, as skewed values such as divergences
    require. It has width 0 if all blocks have the same mean. With `resamples` None there are 2,000, or as many as put
    ten of them beyond each end. Coverage is tested in `tests/audit/test_statistics.py`.

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
    """Return the mean sum(sums) / sum(sizes) over the last axis of blocks (..., b), and its standard error.

    The standard error is that of a ratio of two means, to first order (delta method).
    """
    count, total = sums.shape[-1], sizes.sum(-1)
    mean = sums.sum(-1) / total
    residual = sums - mean[..., None] * sizes
    return mean, np.sqrt((residual**2).sum(-1) * count / (count - 1)) / total


def confidence_of_look(confidence: float, look: int) -> float:
    """Return the confidence of the interval at the k-th look (k from 1) at data that grow between the looks.

    The error 1 - confidence is divided as 1 / (k (k + 1)), which sums to 1 over all k. So all intervals together hold
    with `confidence`, however many looks there are, and one may stop after any of them (union bound).
    Raises ValueError for a confidence outside (0, 1) and a look below 1.
    """
    _quantile(confidence)
    whole("look", look)
    return 1 - (1 - confidence) / (look * (look + 1))


def mean_exceeds(values: Sequence[float], limit: float, error: float) -> bool:
    """Return True if it is shown that the mean of these non-negative values exceeds a limit.

    The answer may be asked for after every value, and the first True may be taken: if each value's mean, given the
    values before it, is at most `limit`, a True ever comes with a probability of at most `error`. No bound on the
    values is assumed, and no number of values.

    The values bet against the limit. A share s of the capital is staked on each value x, which multiplies the capital
    by 1 + s (x / limit - 1); the mean capital over several shares s exceeds 1 / error at most that often.

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
    """Return the confidence interval (low, high) of the difference of two shares of right answers, over `n` pairs.

    It is two-sided. The difference is a method's share minus a reference's; a pair is one sample, answered by both.

    gained, lost: the samples that only the method has right, and those that only the reference has right (discordant
    pairs). The other pairs agree and enter by their number alone. The interval holds every difference D that Tango's
    score test does not reject, with the discordant shares re-estimated under D. With no discordant pair it is
    +-z^2 / (n + z^2), for z the normal quantile: +-0.107 at n = 32, never zero.

    Source: Tango, "Equivalence test and confidence interval for the difference in proportions for the
    paired-sample design", Statistics in Medicine 17 (1998), 891-908. Coverage at n = 32 and 95 %, enumerated
    over every outcome on a grid of discordant shares: 0.967 on average, 0.934 at worst
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

    A pair is one sample, answered by two methods. gained is the number of pairs, out of `n`, that only the first method
    has right; lost is the number that only the second has right. The statistic is standard normal under the
    hypothesis, and falls as `difference` grows. Its variance uses the maximum-likelihood shares of gained and lost
    pairs among all shares with this difference.
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
