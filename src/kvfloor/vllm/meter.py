"""Write, every few seconds, a log line about the tokens that the running requests have seen and still hold."""

from __future__ import annotations

import time

from torch import Tensor

from kvfloor.core.pool import Pool


class LogTimer:
    """Tell when the next log line is due."""

    def __init__(self, seconds: float) -> None:
        """Start with a line due after this many seconds; infinite: never."""
        self._seconds, self._next = seconds, time.monotonic() + seconds

    def due(self) -> bool:
        """Return True once the seconds are over, and start again."""
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + self._seconds
        return True


def line(pool: Pool, blocks: Tensor) -> str:
    """Return the log line about the requests in these blocks (n,) of one layer."""
    seen, held = int(pool.seen(blocks).sum()), float(pool.held(blocks).double().mean(1).sum())
    return (
        f"kvfloor: {len(blocks)} requests in this step, {seen:,} tokens seen, {held:,.0f} held per kv head of layer "
        f"0, {seen - held:,.0f} evicted"
    )
