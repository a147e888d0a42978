"""Play the visual game: all maps of an image hide bits, and the queries of one further map read the bits, all at once.

The game tests methods (ways to keep a KV cache) for visual autoregression, in which an image grows map by map. A map is
one square scale of the image pyramid, whose tokens are appended together. Alice streams the maps into a method's state,
the memory that it keeps; every token has a hidden row of dv values. Bob restores the state from its bytes and appends
one more map, whose queries read the rows, each by putting nearly all softmax mass on one token.
By Cao, Li, Ke, Liang, Shi and Song 2025 (arXiv 2503.14881), visual autoregression needs Omega(n^2 d) memory for a last
map of n x n: every token of every map must be remembered. Instance and constants, derived: docs/floors.md.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvfloor.core.method import Method
from kvfloor.core.state import State
from kvfloor.floors.spike import spike_C
from kvfloor.game.engine.decode import leak_ratio
from kvfloor.game.engine.instance import KeyedInstance, agreed, keys_for
from kvfloor.game.engine.result import Result, run
from kvfloor.game.engine.secret import Hidden
from kvfloor.methods.variants.visual import NextScale, scale_by_scale, tokens_in
from kvfloor.validation import whole


@dataclasses.dataclass(frozen=True, kw_only=True)
class Visual(KeyedInstance):
    """Stream the maps (scales) of an image pyramid with the given `sides`; every token hides a row of dv values.

    Bob, who reads the rows from the state, appends one more map, as large as the last. Its tokens have zero keys and
    values, and spike queries: each gives the key of one hidden row nearly all softmax mass.
    """

    barrier: ClassVar[str] = "visual"
    sides: tuple[int, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "sides", tuple(self.sides))  # a list where it comes from JSON

    @property
    def rows(self) -> int:
        return tokens_in(self.sides)

    @property
    def length(self) -> int:
        return self.rows

    @property
    def asked_at_once(self) -> int:
        """Return the number of queries in the map that Bob appends to read hidden rows; they are asked at once."""
        return self.sides[-1] ** 2

    def stream(self, values: Tensor, hidden: Hidden) -> Iterator[tuple[Tensor, Tensor]]:
        del hidden
        keys = self.keys.unsqueeze(0).expand(self.copies, -1, -1)
        yield from zip(scale_by_scale(self.sides, keys), scale_by_scale(self.sides, values), strict=True)

    def take_in(self, state: State, k: Tensor, v: Tensor) -> None:
        """Append one map of Alice's stream, k (copies, t, d) and v (copies, t, dv), to the state.

        The queries of the map are zero: they carry no information.
        """
        NextScale(state).step(k.new_zeros(self.copies, 1, *k.shape[1:]), k, v)

    def answers(self, state: State, copy: Tensor, row: Tensor) -> Tensor:
        """Return the answers (m, dv), float32, for hidden rows `row` (m,), read by one or more maps of queries.

        Bob appends each such map to a fresh copy of the state. A map has as many tokens as Alice's last map, with zero
        keys and values. Each of its queries gives the key of one hidden row nearly all softmax mass. `copy` is not
        used: there is one stream.
        """
        ratio, zeros = leak_ratio(self.bits, self.eta), self.asked_at_once
        queries, _ = self.public.aim(row, self.spec(), lambda gap, norm: spike_C(self.rows, zeros, gap, norm, ratio))
        answers = []
        for part in queries.split(zeros):
            fork = state.clone()
            k = part.new_zeros(self.copies, zeros, self.d)
            v = part.new_zeros(self.copies, zeros, self.dv)
            q = part.new_zeros(self.copies, 1, zeros, self.d)
            q[:, 0, : len(part)] = part
            answers.append(NextScale(fork).step(q, k, v)[0, 0, : len(part)].float())
        return torch.cat(answers)

    def details(self) -> dict[str, Any]:
        own = tokens_in(self.sides[:-1]) if len(self.sides) > 1 else 0
        return {
            "sides": list(self.sides),
            "rows_read_at_once": self.asked_at_once,
            "rows_if_the_last_scale_asks": own,
        } | super().details()


def doubling(tokens: int) -> tuple[int, ...]:
    """Return the sides 1, 2, 4, ... of the largest pyramid of square maps with at most `tokens` tokens."""
    sides = [1]
    while tokens_in([*sides, 2 * sides[-1]]) <= tokens:
        sides.append(2 * sides[-1])
    return tuple(sides)


def play(
    method: Method | str,
    *,
    n: int = 1024,
    d: int = 64,
    dv: int | None = None,
    bits: int = 1,
    eta: float = 0.5,
    seed: int = 0,
    sides: Sequence[int] | None = None,
    dtype: str = "float32",
    hidden_seed: int | str | None = None,
    family: str | None = None,
    isolated: bool = True,
) -> Result:
    """Play the visual game against a method: all maps of an image hide bits, and one more map reads the bits at once.

    method       a method or its text, such as "h2o@16"
    n            largest number of tokens of all maps together, unless `sides` is given
    d, dv        width of a key, width of a value (dv = d by default)
    sides        sides of the square maps, in order; by default 1, 2, 4, ... with at most n tokens in all
    bits         hidden bits per value, 1 to 24
    eta          relative error that answers may have, in [0, 1)
    seed         gives the public keys and, by a one-way derivation, the seed that the method receives
    dtype        float32, float16 or bfloat16: type of the keys and values that the method receives
    hidden_seed  repeats the hidden values; by default they are fresh from the operating system
    family       name of the rule that makes the keys, such as "sphere"; by default the one with which a query along a
                 key singles it out best
    isolated     False: restore the state in this process; quick, but data kept outside its bytes goes undetected
    Returns a `Result`: the bits that the state's bytes provably carry (certified bits), the sizes in bytes and the
    verdict: "holds" (enough answers are right), "breaks" (too few are) or "cheats" (the bytes cannot explain them).
    Raises ValueError naming the argument that is out of its domain.
    """
    shared = agreed(d=d, dv=dv, bits=bits, eta=eta, seed=seed, dtype=dtype)
    if sides is not None and not sides:
        raise ValueError("sides must hold the side of at least one map, got none")
    sides = doubling(whole("n", n)) if sides is None else tuple(whole("side", side) for side in sides)
    instance = Visual(**shared, sides=sides, public=keys_for(shared, tokens_in(sides), family))
    return run(method, instance, seed=seed, hidden_seed=hidden_seed, isolated=isolated)
