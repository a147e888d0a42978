"""Play the time game: a method that does not read the keys on arrival must read Omega(n) scores for the last answer.

A bit that Alice hides chooses the case of each stream: all keys zero, or one heavy key, which takes nearly all softmax
mass, at a secret position. Bob decodes the bit from a method's answer, given from the message (the bytes of the
method's state, i.e. of its KV cache). The scores q.k that the method reads per query are counted. The method's success,
the share of streams answered right, is compared with that of simple readers: rules that choose positions beforehand and
look up the scores q.k there.
The game is that of Haris & Onak (COLT 2025), Theorems 19 and 26, on corrected streams. With the streams as printed,
answers separate the two cases only at relative errors below 1/3, and each case has its own query (docs/floors.md,
"Time").
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvfloor.core.method import Method
from kvfloor.core.spec import DTYPES
from kvfloor.core.state import State
from kvfloor.floors.separation import tau
from kvfloor.game.engine.asking import by_reading
from kvfloor.game.engine.decode import leak_ratio
from kvfloor.game.engine.instance import Instance, agreed
from kvfloor.game.engine.play import play_index
from kvfloor.game.engine.probing_readers import as_rows, curve, success_bound
from kvfloor.game.engine.result import SUCCESS, Result, conclude
from kvfloor.game.engine.secret import Hidden
from kvfloor.statistics import wilson_interval
from kvfloor.validation import whole

_TOKENS_AT_ONCE = 1024
_NUMBERS_AT_MOST = 2**25  # keys and values of all streams together
_RUNS, _RUNS_OF_READERS = 256, 2048
_PROBES_OF_READERS = 2**24  # in all runs together, roughly
_SHARES = (1 / 64, 1 / 16, 1 / 4, 1 / 2, 3 / 4, 1.0)  # of n - 1: probes at which the readers are measured


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probing(Instance):
    """Make `copies` independent streams of n tokens, with one hidden bit each.

    Bit 1: all keys are zero, and exact attention is 1. Bit 0: one heavy key takes nearly all softmax mass, and exact
    attention is 1/(n-1).
    """

    barrier: ClassVar[str] = "probing"
    n: int

    @property
    def rows(self) -> int:
        return 1

    @property
    def length(self) -> int:
        return self.n

    def stream(self, values: Tensor, hidden: Hidden) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the tokens of all streams in pieces of t tokens: keys (copies, t, d) and values (copies, t, dv).

        The argument `values` (copies, 1, 1) has the hidden bit of each stream. A stream with bit 0 has a heavy key,
        which takes nearly all softmax mass, at a secret position drawn from `hidden`. In the values that are yielded,
        token 0 has n, all other tokens 0.
        """
        place, planted = 1 + hidden.places(self.n - 1, self.copies), values[:, 0, 0] == 0
        for start in range(0, self.n, _TOKENS_AT_ONCE):
            position = torch.arange(start, min(self.n, start + _TOKENS_AT_ONCE))
            heavy = (position == place.unsqueeze(1)) & planted.unsqueeze(1)
            k = heavy.unsqueeze(-1).expand(-1, -1, self.d).to(values.dtype)
            v = (self.n * (position == 0)).view(1, -1, 1).expand(self.copies, -1, self.dv).to(values.dtype)
            yield k, v

    def answers(self, state: State, copy: Tensor, row: Tensor) -> Tensor:
        """Return the answers (m, dv), float32, to a fixed query with (2/d) ln(n-1) in every coordinate.

        All streams are asked this query, with or without a heavy key. copy (m,) holds the indices of the streams; `row`
        is not used.
        """
        q = torch.full((len(copy), self.d), 2.0 * math.log(self.n - 1) / self.d)
        return by_reading(state, copy, q.to(DTYPES[self.dtype]))


def play(
    method: Method | str,
    *,
    n: int = 1024,
    d: int = 64,
    eta: float = 0.5,
    seed: int = 0,
    runs: int | None = None,
    hidden_seed: int | str | None = None,
    isolated: bool = True,
) -> Result:
    """Play the time game against a method: one heavy key or none in each stream; values are single numbers.

    A heavy key takes nearly all softmax mass, and the hidden bit of a stream says whether there is one.
    method       a method or its text, such as "h2o@16"
    n, d         tokens of a stream, at least 16; width of a key
    eta          relative error that answers may have, in [0, 1)
    seed         gives the seed that the method receives, and the positions that the simple readers look up
    runs         independent streams, 256 by default, fewer where n d is large
    hidden_seed  repeats the hidden bits and positions; by default they are fresh from the operating system
    isolated     False: restore the state in this process; quick, but data kept outside its bytes goes undetected
    Returns a `Result`: the bits that the state's bytes provably carry (certified bits), the sizes in bytes and the
    verdict: "holds" (enough answers are right), "breaks" (too few are) or "cheats" (the bytes cannot explain them).
    Its `details` include these numbers, in which success is the share of streams answered right:
    probes_per_query  scores q.k that the method reads to answer one query, of keys in however few bits
    bound             largest success of a method that has not read the keys on arrival and reads as many scores
    floor_probes      scores that any such method must read for success p = 0.9: (2 - 1/p)(n - 1)
    adaptive          True if the success of the method played is above `bound` with 99.9 % confidence, so that it must
                      have read the keys on arrival
    readers           success of simple readers, which look up scores q.k at positions chosen beforehand
    Raises ValueError naming the argument that is out of its domain.
    """
    shared = agreed(d=d, dv=1, bits=1, eta=eta, seed=seed)
    n = whole("n", n, least=16)
    # A (1±eta) answer to the heavy case, at most (1+eta)/(n-1), must stay below the threshold.
    least = 1 + math.ceil((1.0 + shared["eta"]) / tau(shared["eta"], leak_ratio(1, shared["eta"])))
    if n < least:
        raise ValueError(f"n must be at least {least} for barrier 'probing' at eta={eta}, got {n}")
    if runs is None:
        runs = max(16, min(_RUNS, _NUMBERS_AT_MOST // (n * (shared["d"] + 1))))
    instance, hidden = Probing(**shared, n=n, copies=whole("runs", runs)), Hidden(hidden_seed)
    played = play_index(method, instance, hidden, isolated=isolated)
    probes = played.scores_read / instance.copies
    shares = sorted({max(1, round(share * (n - 1))) for share in _SHARES})
    readers = curve(n, shares, max(_RUNS, min(_RUNS_OF_READERS, _PROBES_OF_READERS // n)), hidden, seed)
    result = conclude(
        played, instance, seed=seed,
        probes_per_query=probes, bound=success_bound(n, probes), floor_probes=(2.0 - 1.0 / SUCCESS) * (n - 1),
        readers=as_rows(readers),
    )  # fmt: skip
    sure = wilson_interval(round(result.row_success * instance.copies), instance.copies, 0.999)[0]
    extra: dict[str, Any] = {"tokens": n, "adaptive": sure > result.details["bound"]}
    return dataclasses.replace(result, details=result.details | extra)
