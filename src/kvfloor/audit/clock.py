"""Keep an audit within its minutes: decide which texts and cells still fit, and name those that were left out.

A cell is a task at a context length under a protocol. An audit does whole texts and cells only, so that every setting
(method with budget) is measured on the same ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from kvfloor.audit.format import counted

SLOWER = 2.0
"""Time of a method's forward over that of the model's own attention, before any method was timed."""

CLOSER = 9.0
"""Time of what follows the rows (`audit/closer.py`) over that of one text's exact predictions."""


@dataclass
class Clock:
    """Time the texts and cells of an audit, and decide which further ones fit into its time limit.

    minutes      time limit of the audit, from `begin` on; None: no limit
    announce     called with one line of text: the expected time, before the work begins
    left_out     the texts and cells that did not fit, in words
    reserved     seconds that are kept free for what follows the rows: errors by head and example answers
    per_token    seconds that all settings together took per token of the last text or cell; None: nothing was timed
    """

    minutes: float | None
    announce: Callable[[str], None]
    begin: float = field(default_factory=time.perf_counter)
    left_out: list[str] = field(default_factory=list)
    per_token: float | None = None
    reserved: float = 0.0

    def expect(self, exact_seconds: float, tokens: int, settings: int, pieces: int, must: bool = True) -> None:
        """Announce the expected time of all `pieces` texts, from the time of the exact cache on the first text.

        exact_seconds  seconds that the exact cache's predictions on the first text took
        tokens         number of tokens of one text
        settings       number of settings that read each text
        must           False if other texts are measured already, so that this one may be left out
        Raises ValueError if not even one text fits into the time limit, and `must` is True.
        """
        one = exact_seconds * (1 + SLOWER * settings)
        self.per_token = one / tokens
        self.reserved = CLOSER * exact_seconds
        on = counted(pieces, "text")
        self.announce(
            f"{settings} settings on {on} of {tokens:,} tokens: about {_minutes(one * pieces + self.reserved)}"
            + ("" if self.minutes is None else f", limited to {_minutes(60 * self.minutes)}")
        )
        if must and self.minutes is not None and one / 2 > self._left():
            raise ValueError(
                f"--minutes {self.minutes:g} is too short: one text of {tokens:,} tokens under {settings} settings "
                f"takes about {_minutes(one)}; give more minutes, fewer methods or smaller contexts"
            )

    def fits(self, name: str | None, tokens: int) -> bool:
        """Return True if a text or cell of `tokens` tokens fits into the time left; else add `name` to `left_out`.

        name: None for a text that need not be read.
        """
        if self.has_room_for(tokens):
            return True
        if name is not None:
            self.left_out.append(name)
        return False

    def has_room_for(self, tokens: int) -> bool:
        """Return True if work on so many tokens, by all settings together, fits into the time left."""
        return self.minutes is None or self.per_token is None or self.per_token * tokens <= self._left()

    def took(self, seconds: float, tokens: int) -> None:
        """Record the time of one text or cell under all settings, to estimate that of the next one."""
        self.per_token = seconds / tokens

    def note(self) -> tuple[str, ...]:
        """Return a tuple of one sentence that names the texts and cells left out; it is empty if there are none."""
        if not self.left_out or self.minutes is None:
            return ()
        return (f"Left out to stay within {_minutes(60 * self.minutes)}: {'; '.join(self.left_out)}.",)

    def _left(self) -> float:
        assert self.minutes is not None
        return 60 * self.minutes - self.reserved - (time.perf_counter() - self.begin)


def _minutes(seconds: float) -> str:
    """Write a time in minutes, or in seconds below two minutes."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
