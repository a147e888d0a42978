"""Decide which measurement of an audit a free worker takes next.

A measurement is a pair of a place (text or cell) and a setting (method with budget).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable

from kvfloor.audit.grid import EXACT, Pair, Place


class Handout:
    """Hand out measurements to workers, each of which keeps in memory what the settings of one place share.

    A worker stays on its place while settings are left there. Then it takes a place that no worker is on, and at last
    it helps on the place with most settings left. The first measurement of a place is that of `exact`; the others wait
    until it is recorded, as their rows are compared with its row.
    """

    def __init__(self, pairs: Iterable[Pair], recorded: Iterable[Pair]) -> None:
        """Take the pairs to measure, and those that are recorded already."""
        self._left: dict[Place, list[str]] = {}
        for place, setting in pairs:
            self._left.setdefault(place, []).append(setting)
        self._ready = {place for place, setting in recorded if setting == EXACT}
        self._on: dict[Hashable, Place] = {}

    def next(self, worker: Hashable) -> Pair | None:
        """Return a measurement for a worker; None while there is none that it could begin."""
        mine, taken = self._on.get(worker), set(self._on.values())
        able = [place for place, left in self._left.items() if left and (left[0] == EXACT or place in self._ready)]
        if not able:
            return None
        place = max(able, key=lambda one: (one == mine, one not in taken, len(self._left[one])))
        self._on[worker] = place
        return place, self._left[place].pop(0)

    def done(self, pair: Pair) -> None:
        """Note that the row of a pair is recorded."""
        if pair[1] == EXACT:
            self._ready.add(pair[0])

    def keep(self, pairs: Iterable[Pair]) -> None:
        """Hand out none but these measurements from now on."""
        wanted = set(pairs)
        for place, left in self._left.items():
            left[:] = [setting for setting in left if (place, setting) in wanted]

    def lost(self, worker: Hashable, pair: Pair | None) -> None:
        """Note that a worker died, and take back the measurement that it had."""
        self._on.pop(worker, None)
        if pair is not None:
            self._left[pair[0]].insert(0, pair[1])
