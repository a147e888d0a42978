"""Time versions of the same work in turn within one process, so that the machine's drift affects all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence


def interleaved(
    versions: dict[str, Callable[[], object]],
    repeats: int,
    summary: Callable[[Sequence[float]], float] = statistics.median,
    clock: Callable[[], float] = time.perf_counter,
    seconds: float = float("inf"),
) -> dict[str, float]:
    """Return the milliseconds per call of each version; versions take turns after one uncounted call each.

    summary  makes one number of a version's milliseconds in all turns
    clock    returns seconds
    seconds  from this wall time on, no turn begins after the third
    """
    times: dict[str, list[float]] = {name: [] for name in versions}
    for call in versions.values():
        call()
    begun = time.perf_counter()
    for turn in range(repeats):
        if turn >= 3 and time.perf_counter() - begun > seconds:
            break
        for name, call in versions.items():
            start = clock()
            call()
            times[name].append((clock() - start) * 1e3)
    return {name: summary(values) for name, values in times.items()}
