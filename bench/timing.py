"""Time versions of the same work in turn within one process, so that the machine's drift affects all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def interleaved(versions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return the median milliseconds per call of each version; versions take turns after one uncounted call each."""
    times: dict[str, list[float]] = {name: [] for name in versions}
    for call in versions.values():
        call()
    for _ in range(repeats):
        for name, call in versions.items():
            begin = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - begin) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}
