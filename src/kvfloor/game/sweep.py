"""Play series of small games of growing difficulty, and record the bits certified for a method in each.

In a game, Alice hides values in the state of a method (the memory of a KV cache) and sends its bytes, the message, from
which Bob decodes the values. The certified bits are the hidden bits that the message provably carries.
precision  plays the spike game (one hidden row per key) with ever finer values
packings   plays the packing game (few dimensions, bounded logits) at several widths of a key and several radii; the
           radius is the largest logit allowed
The message is restored in this process. This is quick, but does not detect data that a method keeps outside its
message.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from kvfloor.core.method import Method
from kvfloor.floors.entropy import row_bits
from kvfloor.floors.norm_bounded import N_dr
from kvfloor.game.engine.result import Verdict
from kvfloor.game.instances import packing, spike

BITS = (1, 2, 4, 6, 8, 10, 12, 16, 20, 24)
DIMENSIONS = (2, 4, 8, 16)
RADII = (8.0, 16.0, 32.0, 64.0, 128.0)


@dataclass(frozen=True)
class Precision:
    """Record the precision of values that a method kept in one spike game (one hidden row of values per key).

    hidden     bits hidden per value
    certified  bits per value that the message, i.e. the bytes of a method's state, provably carries
    verdict    the game's verdict: "holds", "breaks" or "cheats" (more was answered than the bytes can hold)
    """

    hidden: float
    certified: float
    verdict: Verdict


@dataclass(frozen=True)
class Packed:
    """Record one packing game, which hides a row of dv values under each key of a separable set.

    A set of keys is separable if each key has a query that puts nearly all softmax mass on this key with no logit above
    `radius`.
    d               width of a key
    radius          largest logit allowed
    hidden_bits     number of hidden bits
    certified_bits  bits that the message (the bytes of the state) provably carries
    floor_bits      lower bound, by a formula, on the bits of any method that answers for the game's n tokens
    """

    d: int
    radius: float
    hidden_bits: float
    certified_bits: float
    floor_bits: float


def precision(method: Method | str, seed: int = 0, bits: Sequence[int] = BITS, n: int = 128) -> list[Precision]:
    """Play the spike game at `n` tokens with ever finer values, to measure the precision that a method keeps.

    bits  the numbers of hidden bits per value, one game each
    seed  gives the public keys
    Returns one record per game. Certified bits per value are those that the message (the state's bytes) provably
    carries. Where they fall below the hidden bits per value, the method's precision ends.
    """
    games = (spike.play(method, n=n, bits=b, seed=seed, isolated=False) for b in bits)
    return [Precision(game.bits, game.bits_per_value, game.verdict) for game in games]


def packings(
    method: Method | str,
    seed: int = 0,
    dimensions: Sequence[int] = DIMENSIONS,
    radii: Sequence[float] = RADII,
    n: int = 512,
    dv: int = 64,
) -> list[Packed]:
    """Play the packing game at every key width and logit radius, with at most `n` keys; return one record per game.

    dimensions  the widths of a key
    radii       the largest logits allowed
    seed        gives the public keys
    The game hides a row of `dv` values under each key of a separable set: each key has a query that puts nearly all
    softmax mass on this key, with no logit above the radius.
    """
    found = []
    for d in dimensions:
        for radius in radii:
            game = packing.play(method, n=n, d=d, dv=dv, radius=radius, seed=seed, isolated=False)
            floor = row_bits(int(min(float(n), N_dr(d, radius, game.eta))), dv, 0.9)
            found.append(Packed(d, radius, game.hidden_bits, game.certified_bits, floor))
    return found
