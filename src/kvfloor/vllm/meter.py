"""Make the log line that tells, every few seconds, how many tokens the running requests have seen and still hold."""

from __future__ import annotations

import time

from torch import Tensor

from kvfloor.core.pool import Pool


class LogTimer:
    """Tell when the next log line is due."""

    def __init__(self, seconds: float) -> None:
        """Set the seconds until the first log line and between two lines; infinite: no line is ever due."""
        self._seconds, self._next = seconds, time.monotonic() + seconds

    def due(self) -> bool:
        """Return True if a log line is due, and then start to wait for the next one; else return False."""
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + self._seconds
        return True


def line(pool: Pool, blocks: Tensor) -> str:
    """Return the log line about the requests whose KV caches are in the blocks with these indices (n,).

    It gives the number of requests; then, summed over them, the tokens seen, held per kv head, and evicted per kv head.
    pool: the pool of layer 0, which reads the caches of that layer.
    """
    seen, held = int(pool.seen(blocks).sum()), float(pool.held(blocks).double().mean(1).sum())
    return (
        f"kvfloor: {len(blocks)} requests in this step, {seen:,} tokens seen, {held:,.0f} held per kv head of layer "
        f"0, {seen - held:,.0f} evicted"
    )
