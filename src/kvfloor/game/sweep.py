"""Many small games over one argument: what a method certifies as the instance grows harder.

They restore the message in this process: the game of the report's table is the isolated one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from kvfloor.core.method import Method
from kvfloor.floors.entropy import row_bits
from kvfloor.floors.norm_bounded import N_dr
from kvfloor.game.instances import packing, spike

BITS = (1, 2, 4, 6, 8, 10, 12, 16, 20, 24)
DIMENSIONS = (2, 4, 8, 16)
RADII = (8.0, 16.0, 32.0, 64.0, 128.0)


@dataclass(frozen=True)
class Precision:
    """`certified` bits per value came back of `hidden` bits per value."""

    hidden: int
    certified: float


@dataclass(frozen=True)
class Packed:
    """A game at (d, radius): bits hidden, certified, and the closed-form floor at the same n."""

    d: int
    radius: float
    hidden_bits: int
    certified_bits: float
    floor_bits: float


def precision(method: Method | str, seed: int = 0, bits: Sequence[int] = BITS, n: int = 128) -> list[Precision]:
    """The spike at n = 128 with ever finer values: where the curve leaves the diagonal is what a method keeps."""
    games = (spike.play(method, n=n, bits=b, seed=seed, isolated=False) for b in bits)
    return [Precision(game.bits, game.bits_per_value) for game in games]


def packings(
    method: Method | str,
    seed: int = 0,
    dimensions: Sequence[int] = DIMENSIONS,
    radii: Sequence[float] = RADII,
    n: int = 512,
    dv: int = 64,
) -> list[Packed]:
    """The packing game at every (d, radius), with at most n = 512 keys."""
    found = []
    for d in dimensions:
        for radius in radii:
            game = packing.play(method, n=n, d=d, dv=dv, radius=radius, seed=seed, isolated=False)
            floor = row_bits(int(min(float(n), N_dr(d, radius, game.eta))), dv, 0.9)
            found.append(Packed(d, radius, game.hidden_bits, game.certified_bits, floor))
    return found
