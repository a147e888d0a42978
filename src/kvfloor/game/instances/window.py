"""Play the sliding window game: n - W tokens of zeros, then W tokens with hidden values; W is the width of the window.

Alice streams the tokens into the state of a method (the memory of a KV cache). Bob restores her state from its bytes,
and reads each hidden row (the dv values of one of the last tokens) by a query. The tokens of zeros have zero key and
value, so their logit is 0. A masked window leaves them out of the softmax; an unmasked window and full attention count
them. The query is so long that its key outweighs them in either case.
If Bob appends a token before he asks (append=True, as published), this token pushes the oldest of the W tokens out of
the window, so W - 1 rows are hidden. If he only asks, W rows are hidden. The game is of Haris & Onak (COLT 2025),
Theorems 17 and 25, with a corrected constant (docs/floors.md).
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvfloor.core.method import Method
from kvfloor.core.state import State
from kvfloor.floors.spike import window_C
from kvfloor.game.engine.asking import by_appending, by_reading
from kvfloor.game.engine.decode import leak_ratio
from kvfloor.game.engine.instance import KeyedInstance, agreed, keys_for, pieces
from kvfloor.game.engine.result import Result, run
from kvfloor.game.engine.secret import Hidden
from kvfloor.validation import whole


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowInstance(KeyedInstance):
    """Stream n - W tokens with zero key and value, then W tokens with public keys and hidden values; W is `window`.

    append  True: Bob, the receiver of the state, appends a token before he asks. It pushes the first of the W tokens
            out of the window, so that token has value 0 and hides nothing
    """

    barrier: ClassVar[str] = "window"
    n: int
    window: int
    append: bool

    @property
    def rows(self) -> int:
        return self.window - 1 if self.append else self.window

    @property
    def length(self) -> int:
        return self.n

    def stream(self, values: Tensor, hidden: Hidden) -> Iterator[tuple[Tensor, Tensor]]:
        del hidden
        zeros = self.n - self.window
        yield from pieces(self.keys.new_zeros(zeros, self.d), values.new_zeros(self.copies, zeros, self.dv))
        pushed_out = values.new_zeros(self.copies, self.window - self.rows, self.dv)
        yield from pieces(self.keys, torch.cat([pushed_out, values], dim=1))

    def answers(self, state: State, copy: Tensor, row: Tensor) -> Tensor:
        ratio, extra = leak_ratio(self.bits, self.eta), 2 if self.append else 0
        queries, _ = self.public.aim(
            row + self.window - self.rows,
            self.spec(),
            lambda gap, norm: window_C(self.window, self.n, extra, gap, ratio, norm),
        )
        return (by_appending if self.append else by_reading)(state, copy, queries)

    def details(self) -> dict[str, Any]:
        return {"window": self.window, "append": self.append} | super().details()


def play(
    method: Method | str,
    *,
    n: int = 1024,
    d: int = 64,
    dv: int | None = None,
    bits: int = 1,
    eta: float = 0.5,
    seed: int = 0,
    window: int | None = None,
    append: bool = False,
    dtype: str = "float32",
    hidden_seed: int | str | None = None,
    family: str | None = None,
    isolated: bool = True,
) -> Result:
    """Play the sliding window game against a method: tokens of zeros, then a window of tokens with hidden values.

    method       a method or its text, such as "h2o@16"
    n, d, dv     tokens of the stream, width of a key, width of a value (dv = d by default)
    window       number of tokens with hidden values, at the end of the n tokens, n/4 by default; the others have zero
                 key and value
    append       True: Bob, who reads the hidden values, appends a token with zero key and value before each query, each
                 time on a fresh copy of the state
    bits         hidden bits per value, 1 to 24
    eta          relative error that answers may have, in [0, 1)
    seed         gives the public keys and, by a one-way derivation, the seed that the method receives
    dtype        float32, float16 or bfloat16: type of the keys and values that the method receives
    hidden_seed  repeats the hidden values; by default they are fresh from the operating system
    family       rule that makes the keys ("chirp", "sphere", ...); by default the one that separates the keys best
    isolated     False: restore the state in this process; quick, but data kept outside its bytes goes undetected
    Returns a `Result`: the bits that the state's bytes provably carry (certified bits), the sizes in bytes and the
    verdict: "holds" (enough answers are right), "breaks" (too few are) or "cheats" (the bytes cannot explain them).
    Raises ValueError naming the argument that is out of its domain.
    """
    shared = agreed(d=d, dv=dv, bits=bits, eta=eta, seed=seed, dtype=dtype)
    n = whole("n", n)
    least = 2 if append else 1
    window = max(least, n // 4) if window is None else whole("window", window, least=least)
    if window > n:
        raise ValueError(f"window must be at most n = {n}, got {window}")
    instance = WindowInstance(**shared, n=n, window=window, append=append, public=keys_for(shared, window, family))
    return run(method, instance, seed=seed, hidden_seed=hidden_seed, isolated=isolated)
