"""Play tensor attention, in which every pair of tokens is a key, so that no cache of pairs or of tokens can be small.

Alice hides rows of dv values in the stream, which a method keeps in its state (the memory of a KV cache). Bob, who
restores the state from its bytes, reads each row by a query that puts nearly all softmax mass on one pair of tokens.
Four caches: a token has a key in each of K1 and K2, and a value in each of V1 and V2. The key and the value of a pair
(i, j) are the entry-by-entry products K1[i] * K2[j] and V1[i] * V2[j]. 2(n-1) rows are hidden. Token 0 has values 1;
the other tokens hide the rows X1 in V1 and X2 in V2. The query at pair (i, 0) reads X1[i], and that at pair (0, i)
reads X2[i].
Two caches: the n^2 products of a key of K1 and a key of K2 are streamed as keys, with arbitrary values; n^2 rows are
hidden. Any method can play, because the pairs are ordinary tokens.
Chen et al. 2025 (arXiv 2503.11108) claim Omega(nd) bits for four caches and Omega(n^2 d) for two; instances and
constants: docs/floors.md.
"""

import dataclasses
from collections.abc import Iterator
from functools import cached_property
from math import ceil, isqrt
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from kvfloor.core.method import Method
from kvfloor.core.spec import DTYPES
from kvfloor.core.state import State
from kvfloor.floors.spike import spike_C
from kvfloor.game.engine.asking import by_reading
from kvfloor.game.engine.decode import leak_ratio
from kvfloor.game.engine.instance import Instance, agreed, derived_seed, pieces
from kvfloor.game.engine.result import Result, run
from kvfloor.game.engine.secret import Hidden
from kvfloor.game.keys.families import rademacher
from kvfloor.game.keys.public import aim
from kvfloor.methods.grammar import parse
from kvfloor.methods.variants.tensor import TensorAttention, products
from kvfloor.validation import whole

_ALL_ROWS_UP_TO = 512
_ROWS_SAMPLED = 256
_MOST_TOKENS = 1024
_PAIRS_AT_ONCE = 2**22
_LENGTH_STEP = 64.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class FourCaches(Instance):
    """Stream n tokens with two keys of signs ±1 and two values each, for tensor attention over pairs of tokens.

    Each of the two values of a token 1..n-1 is a hidden row of dv numbers; token 0 has values 1.
    """

    barrier: ClassVar[str] = "tensor"
    n: int

    @property
    def rows(self) -> int:
        return 2 * (self.n - 1)

    @property
    def length(self) -> int:
        return self.n

    @cached_property
    def keys(self) -> tuple[Tensor, Tensor]:
        """Return the public keys K1, K2, each (n, d) of signs ±1.

        Products of two keys are signs too, so the keys of pairs have norm sqrt(d).
        """
        first, second = self.key_seed, derived_seed("second keys", self.key_seed)
        # exactly ±1, not a rounded sqrt(d) / sqrt(d)
        k1, k2 = (torch.sign(rademacher(self.n, self.d, seed)) for seed in (first, second))
        return k1.to(DTYPES[self.dtype]), k2.to(DTYPES[self.dtype])

    def lift(self, method: Method) -> Method:
        """Return the method in a form that takes tokens of two keys and two values, with queries that attend to pairs.

        A method of standard attention is wrapped; a method of tensor attention is returned as it is.
        """
        return method if method.traits.reference == "tensor" else TensorAttention(method)

    def stream(self, values: Tensor, hidden: Hidden) -> Iterator[tuple[Tensor, Tensor]]:
        del hidden
        one = values.new_ones(self.copies, 1, self.dv)
        first, second = values.split(self.n - 1, dim=1)
        v = torch.cat([torch.cat([one, first], dim=1), torch.cat([one, second], dim=1)], dim=-1)
        yield from pieces(torch.cat(self.keys, dim=-1), v)

    def aimed(self, row: Tensor) -> tuple[Tensor, Tensor]:
        """Return the spike queries (m, d) of hidden rows `row` (m,), and the gaps (m,) of the keys of the rows' pairs.

        A hidden row is read at one pair of tokens. Its spike query gives this pair nearly all softmax mass. The gap of
        a pair is 1 - s/d, where s is the largest inner product of the pair's key with the key of any other of the n^2
        pairs. Raises ValueError where a gap is not positive.
        """
        k1, k2 = (k.double() for k in self.keys)
        token = row % (self.n - 1) + 1
        i1, i2 = torch.where(row < self.n - 1, token, 0), torch.where(row < self.n - 1, 0, token)
        direction = k1[i1] * k2[i2]
        gaps = torch.empty(len(row), dtype=torch.float64)
        for part in torch.arange(len(row)).split(max(1, _PAIRS_AT_ONCE // self.n**2)):
            turned = direction[part].unsqueeze(1) * k1  # (p, n, d)
            scores = turned @ k2.T / self.d
            scores[torch.arange(len(part)), i1[part], i2[part]] = -torch.inf
            gaps[part] = 1.0 - scores.flatten(1).amax(dim=1)
        worst = gaps.min().item()
        if worst <= 0.0:
            raise ValueError(
                f"two pairs of the {self.n} tokens have the same product key in d={self.d}: take d above 6 ln n"
            )
        ratio = leak_ratio(self.bits, self.eta)
        lengths = [ceil(_LENGTH_STEP * spike_C(self.n**2, 0, gap, 1.0, ratio)) / _LENGTH_STEP for gap in gaps.tolist()]
        length = torch.tensor(lengths, dtype=torch.float64) / (self.d * self.spec().scale)
        return (direction * length.unsqueeze(1)).to(DTYPES[self.dtype]), gaps

    def answers(self, state: State, copy: Tensor, row: Tensor) -> Tensor:
        return by_reading(state, copy, self.aimed(row)[0])

    def details(self) -> dict[str, Any]:
        return {"caches": 4, "tokens": self.n, "pairs": self.n**2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoCaches(Instance):
    """Stream all n^2 products of keys as tokens of standard attention, each with its own hidden row of dv values."""

    barrier: ClassVar[str] = "tensor"
    n: int

    @property
    def rows(self) -> int:
        return self.n**2

    @property
    def length(self) -> int:
        return self.n**2

    @cached_property
    def keys(self) -> Tensor:
        """Return the keys of all pairs: K1[i] * K2[j] / sqrt(d) entry by entry, (n^2, d), of unit norm.

        K1 and K2 are two sets of n keys with entries ±1.
        """
        first, second = self.key_seed, derived_seed("second keys", self.key_seed)
        k1, k2 = (torch.sign(rademacher(self.n, self.d, seed)).unsqueeze(0) for seed in (first, second))
        return (products(k1, k2)[0] / self.d**0.5).to(DTYPES[self.dtype])

    def stream(self, values: Tensor, hidden: Hidden) -> Iterator[tuple[Tensor, Tensor]]:
        del hidden
        yield from pieces(self.keys, values)

    def answers(self, state: State, copy: Tensor, row: Tensor) -> Tensor:
        ratio = leak_ratio(self.bits, self.eta)
        queries, _ = aim(self.keys, row, self.spec(), lambda gap, norm: spike_C(self.rows, 0, gap, norm, ratio))
        return by_reading(state, copy, queries)

    def details(self) -> dict[str, Any]:
        return {"caches": 2, "tokens": self.n, "pairs": self.n**2}


def play(
    method: Method | str,
    *,
    n: int = 1024,
    d: int = 64,
    dv: int | None = None,
    bits: int = 1,
    eta: float = 0.5,
    seed: int = 0,
    caches: Literal[2, 4] | None = None,
    dtype: str = "float32",
    hidden_seed: int | str | None = None,
    isolated: bool = True,
) -> Result:
    """Play tensor attention, in which pairs of tokens are keys, against a method.

    method       a method or its text, such as "h2o@16"
    n            with two caches the number of pairs, rounded down to the square of a number of tokens; with four caches
                 the number of tokens, up to 1,024. With four caches and more than 512 hidden rows of dv values, 256
                 sampled rows are queried
    d, dv        width of a key, width of a value (dv = d by default)
    caches       4: the method keeps tokens, and queries attend to pairs of them; 2: the pairs are streamed as tokens.
                 By default 4 for a method that keeps whole tokens or reads pairs of them, 2 for any other
    bits         hidden bits per value, 1 to 24
    eta          relative error that answers may have, in [0, 1)
    seed         gives the public keys and, by a one-way derivation, the seed that the method receives
    dtype        float32, float16 or bfloat16: type of the keys and values that the method receives
    hidden_seed  repeats the hidden values; by default they are fresh from the operating system
    isolated     False: restore the state in this process; quick, but data kept outside its bytes goes undetected
    Returns a `Result`: the bits that the state's bytes provably carry (certified bits), the sizes in bytes and the
    verdict: "holds" (enough answers are right), "breaks" (too few are) or "cheats" (the bytes cannot explain them).
    Raises ValueError naming the argument that is out of its domain.
    """
    shared = agreed(d=d, dv=dv, bits=bits, eta=eta, seed=seed, dtype=dtype)
    if caches not in (None, 2, 4):
        raise ValueError(f"caches must be 2 or 4, got {caches!r}")
    n = whole("n", n, least=4)
    if caches == 4 or (caches is None and _pairs_tokens(method)):
        if n > _MOST_TOKENS:
            raise ValueError(f"n must be at most {_MOST_TOKENS} tokens for four caches (n^2 pairs are read), got {n}")
        instance: Instance = FourCaches(**shared, n=n)
    else:
        instance = TwoCaches(**shared, n=isqrt(n))
    sampled = _ROWS_SAMPLED if isinstance(instance, FourCaches) and instance.rows > _ALL_ROWS_UP_TO else None
    return run(method, instance, seed=seed, hidden_seed=hidden_seed, sampled=sampled, isolated=isolated)


def _pairs_tokens(method: Method | str) -> bool:
    try:
        method = parse(method) if isinstance(method, str) else method
        return method.traits.reference == "tensor" or TensorAttention(method) is not None
    except ValueError:
        return False
