"""Play the packing game: few dimensions, logits of at most r, and as many keys as can be told apart under these limits.

Alice hides a row of dv bits under every key of a stream of n tokens, in the state of a method (the memory of a KV
cache). Bob, who restores her state from its bytes, reads each row by one query. Keys are separable if, for each of
them, a query with logits of at most r puts nearly all softmax mass on this key.
The floor, a lower bound on the bits that any method must keep, is (p dv - H2(p)) min(n, N). N = `N_dr`(d, r, eta) is a
number of separable keys of width d that is proven to exist if answers may have the relative error eta;
kvfloor/floors/norm_bounded.py states its formula. H2 is the binary entropy, p the probability that a row is answered
right (docs/floors.md, "Bounded norms"; N replaces the e^d of Haris & Onak, COLT 2025, Theorem 1 and Corollary 9).
More separable keys than N may exist, and some that are proven to exist are not made. So the game makes as many as it
finds, m, and hides m rows. Each key is
streamed n/m times (rounded down), always with the same values. As all keys are repeated equally often, the exact
answers are the same as if each key were streamed once.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

from torch import Tensor

from kvfloor.core.method import Method
from kvfloor.core.spec import DTYPES
from kvfloor.core.state import State
from kvfloor.floors.entropy import row_bits
from kvfloor.floors.norm_bounded import N_dr
from kvfloor.floors.separation import eps_s
from kvfloor.floors.spike import spike_C
from kvfloor.game.engine.asking import by_reading
from kvfloor.game.engine.instance import KeyedInstance, agreed, pieces
from kvfloor.game.engine.play import play_index
from kvfloor.game.engine.result import SUCCESS, Result, conclude
from kvfloor.game.engine.secret import Hidden
from kvfloor.game.keys.families import FAMILIES
from kvfloor.game.keys.gaps import one_sided_gaps
from kvfloor.game.keys.public import PublicKeys
from kvfloor.validation import positive, whole

_PACKED_UP_TO = 16  # dimensions in which greedy packing beats codes
_DEFAULT_D, _DEFAULT_DV = 8, 64
_MOST_KEYS = 2_048


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packing(KeyedInstance):
    """Stream m separable keys, each `repeats` times with its hidden row; no logit is above `radius`.

    Keys are separable if, for each of them, a query within this limit puts nearly all softmax mass on this key. A row
    is the dv values of a key.
    """

    barrier: ClassVar[str] = "packing"
    m: int
    repeats: int
    radius: float

    @property
    def rows(self) -> int:
        return self.m

    @property
    def length(self) -> int:
        return self.m * self.repeats

    def stream(self, values: Tensor, hidden: Hidden) -> Iterator[tuple[Tensor, Tensor]]:
        del hidden
        for _ in range(self.repeats):
            yield from pieces(self.keys, values)

    def answers(self, state: State, copy: Tensor, row: Tensor) -> Tensor:
        # Queries take the full length that the radius allows: the keys were chosen so that their gap suffices for it.
        queries = (self.keys[row].double() * self.radius).to(DTYPES[self.dtype])
        return by_reading(state, copy, queries)

    def details(self) -> dict[str, Any]:
        return {
            "radius": self.radius,
            "keys_that_exist": min(N_dr(self.d, self.radius, self.eta), 2.0**53),
            "repeats": self.repeats,
        } | super().details()


def separable(d: int, radius: float, eta: float, most: int, key_seed: int) -> tuple[str, int]:
    """Find the key family with the most separable keys, up to `most`, for queries with logits of at most `radius`.

    A key family is a rule that makes m keys of width d, such as random signs or a code; eta is the relative error that
    answers may have. Returns the family's name and the number m of keys. Keys are separable if, for each of them, a
    query leaves all other tokens together at most eps_s = (1-eta)/4 times the softmax mass on this key. The others are
    m tokens: m - 1 keys and one token that Bob may append.
    Law: keys of unit norm are separable if ln(m / eps_s) / gap <= radius. The left side is the length of the query. The
    gap of a key is its squared norm less its largest inner product with another key; the smallest gap of the m keys
    counts. `key_seed` gives the random keys. One key is always separable.
    """
    best = ("sphere", 1)
    names = ["tori", "chirp", "reed_solomon", "hypercube", "sphere", "rademacher"]
    if 2 <= d <= _PACKED_UP_TO:
        names.insert(0, "packing")
    for name in names:
        low, high = best[1], most + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if _separates(name, middle, d, radius, eta, key_seed) else (low, middle)
        if low > best[1]:
            best = (name, low)
    return best


def _separates(family: str, m: int, d: int, radius: float, eta: float, key_seed: int) -> bool:
    try:
        keys = FAMILIES[family](m, d, key_seed)
    except ValueError:  # the family has no m keys in d dimensions
        return False
    gap = one_sided_gaps(keys.float()).min().item()
    return gap > 0.0 and spike_C(m, 1, gap, 1.0, eps_s(eta)) <= radius


def play(
    method: Method | str,
    *,
    n: int = 1024,
    d: int = _DEFAULT_D,
    dv: int | None = None,
    eta: float = 0.5,
    seed: int = 0,
    radius: float | None = None,
    hidden_seed: int | str | None = None,
    isolated: bool = True,
) -> Result:
    """Play the packing game against a method: few dimensions, bounded logits, one hidden bit per value.

    method       a method or its text, such as "h2o@16"
    n, d, dv     tokens of the stream, width of a key, width of a value; dv is 64 by default, because with dv = d few
                 dimensions would hide few bits
    radius       the largest logit, 32 by default. Every key that can be singled out with such logits hides a row of dv
                 values, up to min(n, 2,048) keys
    eta          relative error that answers may have, in [0, 1)
    seed         gives the public keys and, by a one-way derivation, the seed that the method receives
    hidden_seed  repeats the hidden values; by default they are fresh from the operating system
    isolated     False: restore the state in this process; quick, but data kept outside its bytes goes undetected
    Returns a `Result`: the bits that the state's bytes provably carry (certified bits), the sizes in bytes and the
    verdict: "holds" (enough answers are right), "breaks" (too few are) or "cheats" (the bytes cannot explain them).
    Raises ValueError naming the argument that is out of its domain.
    """
    shared = agreed(d=d, dv=_DEFAULT_DV if dv is None else dv, bits=1, eta=eta, seed=seed)
    n, radius = whole("n", n), positive("radius", 32.0 if radius is None else radius)
    family, m = separable(shared["d"], radius, eta, min(n, _MOST_KEYS), shared["key_seed"])
    public = PublicKeys(family, m, shared["d"], shared["key_seed"])
    instance = Packing(**shared, m=m, repeats=n // m, radius=radius, public=public)
    played = play_index(method, instance, Hidden(hidden_seed), isolated=isolated)
    claimed = min(float(n), N_dr(shared["d"], radius, eta))
    closed_form = row_bits(int(claimed), instance.dv, SUCCESS)
    return conclude(played, instance, seed=seed, closed_form_floor_bits=closed_form)
