"""Fit a power law to the divergence of a cache that keeps the newest tokens, and predict the window for a target.

Divergence is the mean KL from exact predictions to the cache's, in nats per token, as `kvfloor audit` measures it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kvfloor.statistics import student_quantile
from kvfloor.validation import positive

LEAST_WINDOWS = 4


@dataclass(frozen=True)
class WindowLaw:
    """Hold the law nats = constant * window^-exponent, as fitted, and how far it can be trusted.

    exponent, constant   alpha and C
    low, high            ends of the 95 % interval of the exponent, of Student's t with `points` - 2 degrees of freedom
    deviation            root mean square of the errors in log nats, with `points` - 2 in the denominator
    points               number of windows fitted
    middle, spread       mean of log window, and sum of squares about it
    """

    exponent: float
    constant: float
    low: float
    high: float
    deviation: float
    points: int
    middle: float
    spread: float

    def nats(self, window: float) -> float:
        """Predict the divergence, in nats per token, of a window of this many tokens."""
        return self.constant * positive("window", window) ** -self.exponent

    def nats_interval(self, window: float, confidence: float = 0.95) -> tuple[float, float]:
        """Return the ends of the interval in which one more measured divergence at this window is expected."""
        x = math.log(positive("window", window))
        reach = self.deviation * math.sqrt(1.0 + 1.0 / self.points + (x - self.middle) ** 2 / self.spread)
        factor = math.exp(student_quantile(confidence, self.points - 2) * reach)
        return self.nats(window) / factor, self.nats(window) * factor

    def window(self, nats: float) -> int:
        """Predict the least window whose divergence is at most `nats`: (constant / nats)^(1 / exponent), rounded up.

        Raises ValueError where the fitted divergence does not fall with the window.
        """
        nats = positive("nats", nats)
        if self.exponent <= 0:
            raise ValueError(f"the divergence does not fall with the window: the exponent is {self.exponent:.3g}")
        power = (math.log(self.constant) - math.log(nats)) / self.exponent
        if power > 60.0:
            raise ValueError(f"{nats:g} nats take a window of more than e^60 tokens at exponent {self.exponent:.3g}")
        return max(1, math.ceil(math.exp(power) * (1.0 - 1e-12)))


def fit_window_law(windows: Sequence[float], nats: Sequence[float]) -> WindowLaw:
    """Fit nats = C window^-alpha by least squares of log nats on log window; windows in tokens, nats per token.

    A prediction, no floor. arXiv 2605.25085 (known by its abstract) assumes such a law for the sensitivity of the
    next-token distribution to truncated context: a window of O(eps^(-1/alpha)) tokens then suffices for a divergence
    eps, and is necessary for caches that keep a suffix, under a further condition on the Bayes risk. Neither assumption
    is tested here: only the residuals speak. Without attention sinks the law misses a model that has them.
    Raises ValueError for fewer than 4 different windows, for lengths that differ, and for numbers <= 0.
    """
    if len(windows) != len(nats):
        raise ValueError(f"windows and nats must be equally many, got {len(windows)} and {len(nats)}")
    x = [math.log(positive("window", window)) for window in windows]
    y = [math.log(positive("nats", one)) for one in nats]
    if len(set(x)) < LEAST_WINDOWS:
        raise ValueError(f"the law needs at least {LEAST_WINDOWS} different windows, got {len(set(x))}: measure more")
    n, middle, level = len(x), math.fsum(x) / len(x), math.fsum(y) / len(x)
    spread = math.fsum((one - middle) ** 2 for one in x)
    slope = math.fsum((a - middle) * (b - level) for a, b in zip(x, y, strict=True)) / spread
    rest = math.fsum((b - level - slope * (a - middle)) ** 2 for a, b in zip(x, y, strict=True))
    deviation = math.sqrt(rest / (n - 2))
    half = student_quantile(0.95, n - 2) * deviation / math.sqrt(spread)
    constant = math.exp(level - slope * middle)
    return WindowLaw(-slope, constant, -slope - half, -slope + half, deviation, n, middle, spread)
