"""Keep an audit within its minutes: decide which texts and cells still fit, and name those that were left out.

A setting is a method with its budget; the exact cache keeps every token. Settings are measured on texts (next-token
predictions) and on cells: a cell is a task at a context length under a protocol (question asked before or after the
compression). An audit does whole texts and cells only, so that every setting is measured on the same ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from kvfloor.audit.format import counted

SLOWER = 2.0
"""Assumed ratio of a method's time to that of the model's own attention, until the methods were timed."""

CLOSER = 9.0
"""Assumed ratio of the time of errors by head and example answers to that of one text's exact predictions."""


@dataclass
class Clock:
    """Time the texts and cells of an audit, and decide which further ones fit into its time limit.

    minutes    time limit of the audit, counted from `begin`; None: no limit
    announce   function that is called with one line of text: the expected time, before the work begins
    begin      start of the audit, a reading of `time.perf_counter`
    left_out   names of the texts and cells that did not fit
    reserved   seconds kept free for what is measured last: errors by head and example answers
    per_token  seconds that all settings together took per token of the last text or cell; None: nothing was timed
    """

    minutes: float | None
    announce: Callable[[str], None]
    begin: float = field(default_factory=time.perf_counter)
    left_out: list[str] = field(default_factory=list)
    per_token: float | None = None
    reserved: float = 0.0

    def expect(self, exact_seconds: float, tokens: int, settings: int, pieces: int, must: bool = True) -> None:
        """Estimate the time of all texts from the exact cache's time on the first one, and announce the estimate.

        A setting is assumed to take SLOWER (2) times as long as the exact cache. The estimate also sets `per_token` and
        `reserved`.

        exact_seconds  seconds that the exact cache's predictions on the first text took
        tokens         number of tokens of one text
        settings       number of settings that read each text
        pieces         number of texts to read
        must           True if the audit has no rows yet, so that the first text is needed; False if it may be left out
        Raises ValueError if `must` is True and even half the estimate for one text exceeds the time left.
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
        """Return True if all settings can be measured on a text or cell of `tokens` tokens in the time left.

        If they cannot, `name` is added to `left_out`.

        name: what the report calls the text or cell; None for an optional text, which is not reported when left out.
        """
        if self.has_room_for(tokens):
            return True
        if name is not None:
            self.left_out.append(name)
        return False

    def has_room_for(self, tokens: int) -> bool:
        """Return True if all settings can be measured on `tokens` tokens in the time left.

        The answer is True if the audit has no limit, and while nothing was timed yet.
        """
        return self.minutes is None or self.per_token is None or self.per_token * tokens <= self._left()

    def took(self, seconds: float, tokens: int) -> None:
        """Record the seconds that all settings took on one text or cell, to estimate the time of the next one.

        tokens: number of tokens of that text or cell.
        """
        self.per_token = seconds / tokens

    def note(self) -> tuple[str, ...]:
        """Return one sentence that names the texts and cells left out, in a tuple; an empty tuple if there are none."""
        if not self.left_out or self.minutes is None:
            return ()
        return (f"Left out to stay within {_minutes(60 * self.minutes)}: {'; '.join(self.left_out)}.",)

    def _left(self) -> float:
        assert self.minutes is not None
        return 60 * self.minutes - self.reserved - (time.perf_counter() - self.begin)


def _minutes(seconds: float) -> str:
    """Write a number of seconds as minutes, e.g. `5 min`; as seconds below two minutes, e.g. `90 s`."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
