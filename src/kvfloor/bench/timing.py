"""Time versions of the same work in turns within one process, so that the machine's drift affects all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from kvfloor.statistics import LEAST_FOR_MEDIAN

CROWDED = 0.8
"""Below this share of its threads' time on a processor, a run is called crowded: other work ran beside it."""

_WITNESS_SIDE = 768
_WITNESS_EVERY = 0.25  # seconds of timed work between two calls of the witness


@dataclass(frozen=True)
class Timed:
    """Hold the milliseconds of every version in every turn.

    ms       milliseconds per call, one number per turn; all versions have the same number of turns
    threads  torch's threads
    share    of the threads' time while a witness ran, the part that they were on a processor; 1 on an idle machine
    """

    ms: Mapping[str, tuple[float, ...]]
    threads: int
    share: float

    @property
    def crowded(self) -> bool:
        """Return True if other work took processors from this one."""
        return self.share < CROWDED

    def ratios(self, name: str, baseline: str) -> tuple[float, ...]:
        """Return the baseline's time over this version's, turn by turn: above 1, the version is the faster one."""
        return tuple(b / a for a, b in zip(self.ms[name], self.ms[baseline], strict=True))


class Witness:
    """Run a product of matrices that keeps all threads busy, to see whether they are on a processor all the time.

    The measured code cannot tell: its threads wait for one another even on an idle machine.
    """

    def __init__(self) -> None:
        self.matrix = torch.ones(_WITNESS_SIDE, _WITNESS_SIDE)
        self.wall = self.used = 0.0
        torch.matmul(self.matrix, self.matrix)

    def look(self) -> None:
        """Run the product three times, and add its wall time and its processor time to the sums."""
        wall, used = time.perf_counter(), time.process_time()
        for _ in range(3):
            torch.matmul(self.matrix, self.matrix)
        self.used += time.process_time() - used
        self.wall += time.perf_counter() - wall

    @property
    def share(self) -> float:
        """Return processor time over the threads' wall time."""
        return self.used / (self.wall * torch.get_num_threads()) if self.wall else 1.0


def interleaved(
    versions: Mapping[str, Callable[[], object]], turns: int, seconds: float, witness: Witness | None = None
) -> Timed:
    """Time the versions in turns, after one uncounted call of each.

    Every turn calls each version once; turn i starts with version i, so that none always follows the same one.
    turns    most turns
    seconds  no turn begins after so many seconds; LEAST_FOR_MEDIAN turns are made in any case
    witness  what tells whether other work ran beside; a new one unless given
    """
    witness = witness or Witness()
    order = list(versions)
    ms: dict[str, list[float]] = {name: [] for name in order}
    for call in versions.values():
        call()
    witness.look()
    begun = looked = time.perf_counter()
    for turn in range(max(turns, LEAST_FOR_MEDIAN)):
        if turn >= LEAST_FOR_MEDIAN and time.perf_counter() - begun > seconds:
            break
        for at in range(len(order)):
            name = order[(turn + at) % len(order)]
            start = time.perf_counter()
            versions[name]()
            ms[name].append((time.perf_counter() - start) * 1e3)
        if time.perf_counter() - looked > _WITNESS_EVERY:
            witness.look()
            looked = time.perf_counter()
    return Timed({name: tuple(values) for name, values in ms.items()}, torch.get_num_threads(), witness.share)
