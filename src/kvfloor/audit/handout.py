"""Decide which measurement of an audit a free worker takes next.

A measurement is a pair of a place (text or cell) and a setting (method with budget); its result is a row. A cell is a
task at a context length under a protocol. The setting `exact` keeps every token.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable

from kvfloor.audit.grid import EXACT, Pair, Place


class Handout:
    """Hand out measurements to workers, each of which keeps in memory the data that the settings of one place share.

    A worker stays on its place while settings are left there. Then it goes to a place that no worker is on. If there is
    none, it goes to the place with the most settings left. The first measurement on a place is that of `exact`. The
    others wait until its row is recorded, as their rows are compared with it.
    """

    def __init__(self, pairs: Iterable[Pair], recorded: Iterable[Pair]) -> None:
        """Store the list of measurements to hand out.

        pairs     the measurements; `exact` comes first among those of a place, unless its row is recorded
        recorded  measurements whose rows are recorded already; if `exact` is among them, its place need not wait for it
        """
        self._left: dict[Place, list[str]] = {}
        for place, setting in pairs:
            self._left.setdefault(place, []).append(setting)
        self._ready = {place for place, setting in recorded if setting == EXACT}
        self._on: dict[Hashable, Place] = {}

    def next(self, worker: Hashable) -> Pair | None:
        """Choose a measurement for a free worker, remove it from the list, and return it.

        The result is None if none can begin now: none is left, or all that are left wait for a row of `exact`.
        """
        mine, taken = self._on.get(worker), set(self._on.values())
        able = [place for place, left in self._left.items() if left and (left[0] == EXACT or place in self._ready)]
        if not able:
            return None
        place = max(able, key=lambda one: (one == mine, one not in taken, len(self._left[one])))
        self._on[worker] = place
        return place, self._left[place].pop(0)

    def done(self, pair: Pair) -> None:
        """Note that the row of a measurement is recorded; after `exact`, the other settings of its place can begin."""
        if pair[1] == EXACT:
            self._ready.add(pair[0])

    def keep(self, pairs: Iterable[Pair]) -> None:
        """Drop the measurements that are left and not among `pairs`, so that they are never handed out."""
        wanted = set(pairs)
        for place, left in self._left.items():
            left[:] = [setting for setting in left if (place, setting) in wanted]

    def lost(self, worker: Hashable, pair: Pair | None) -> None:
        """Note that a worker died, and put the measurement that it was making back on the list.

        pair: that measurement; None if the worker was making none.
        """
        self._on.pop(worker, None)
        if pair is not None:
            self._left[pair[0]].insert(0, pair[1])
