"""Define when a search for a read floor is to stop: after some seconds, or after some tokens.

A read floor is a lower bound on the bits of a state that answers queries. A search that stops early returns the largest
floor that it has proved by then.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import NamedTuple

from kvfloor.validation import positive, whole


class Stopped(NamedTuple):
    """Hold how far a search came that stopped early: the queries of `weighed` of the `given` tokens were weighed."""

    weighed: int
    given: int

    def __str__(self) -> str:
        return f"stopped after {self.weighed:,} of {self.given:,} tokens"


class Enough(Exception):
    """Report that the time of a search is over; `readable_within` catches it."""


@dataclasses.dataclass(frozen=True)
class Limit:
    """Hold when a search is to stop. It stops at whatever comes first, after the step in hand (a fraction of a second).

    seconds  most seconds from the call on, by `clock`; None: any number. Results then depend on the machine's speed
    tokens   most tokens whose queries are weighed; None: all. Results depend on nothing else
    clock    returns seconds from any origin; tests inject their own
    Raises ValueError for numbers that are not positive.
    """

    seconds: float | None = None
    tokens: int | None = None
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        if self.seconds is not None:
            positive("seconds", self.seconds)
        if self.tokens is not None:
            whole("tokens", self.tokens)

    def started(self) -> Watch:
        """Return a `Watch` that counts from now on."""
        return Watch(self)


class Watch:
    """Count the time and the tokens of one search, and tell when its limit is reached. `weighed` counts the tokens."""

    def __init__(self, limit: Limit) -> None:
        self._limit = limit
        self._end = None if limit.seconds is None else limit.clock() + limit.seconds
        self.weighed = 0

    @property
    def left(self) -> int | None:
        """Return how many tokens may still be weighed: 0 once the time is over, None for any number."""
        if self._end is not None and self._limit.clock() >= self._end:
            return 0
        return None if self._limit.tokens is None else max(0, self._limit.tokens - self.weighed)

    def look(self) -> None:
        """Raise Enough once the time is over."""
        if self._end is not None and self._limit.clock() >= self._end:
            raise Enough


def unwatched() -> None:
    """Do nothing, in the place of `Watch.look`, where no limit is set."""
