"""Play the spike game with every attention row concentrated on one token (one-sparse); the floor stays the same.

In the spike game, Alice hides a row of values under each public key, in the state of a method (the memory of a KV
cache). Bob reads each row by a spike query, which gives one key nearly all softmax mass. The floor is the theorem's
lower bound on the bits that any method must keep. By Haris & Onak (COLT 2025), Corollary 16, it stays the same if
nearly all attention scores are negligible, unless the method is told which.
In the plain spike game Alice asks no queries. Here she asks the spike query q_t = C k_t at every token t, k_t its key
and C the length of the query. So every softmax row, hers and Bob's, has nearly all its mass on one token. Her queries
do not depend on the hidden bits, so the proof is unchanged (docs/floors.md).
"""

import dataclasses
from collections.abc import Iterator
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvfloor.core.method import Method
from kvfloor.core.state import State
from kvfloor.floors.spike import spike_C
from kvfloor.game.engine.asking import by_reading
from kvfloor.game.engine.decode import leak_ratio
from kvfloor.game.engine.instance import RowPerKey, agreed, keys_for, pieces
from kvfloor.game.engine.result import Result, run
from kvfloor.game.engine.secret import Hidden
from kvfloor.validation import whole

_NEGLIGIBLE = 1e-3  # share of the row's largest score below which a score counts as close to zero
_ROWS_MEASURED = 512
_MOST_TOKENS = 16_384


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sparse(RowPerKey):
    """Stream n public keys; Alice asks each token's spike query as she appends it, and Bob asks all of them at the end.

    A spike query gives one key nearly all softmax mass. Alice hides a row of dv values under each key, and Bob decodes
    the rows from the answers to his queries.
    """

    barrier: ClassVar[str] = "sparse"

    @cached_property
    def queries(self) -> Tensor:
        """Return the spike query of every key, (n, d), which Alice asks when the key is appended and Bob at the end.

        A spike query gives its key nearly all softmax mass.
        """
        ratio = leak_ratio(self.bits, self.eta)
        everything = torch.arange(self.n)
        return self.public.aim(everything, self.spec(), lambda gap, norm: spike_C(self.n, 0, gap, norm, ratio))[0]

    def stream(self, values: Tensor, hidden: Hidden) -> Iterator[tuple[Tensor, Tensor]]:
        del hidden
        yield from pieces(self.keys, values)

    def take_in(self, state: State, k: Tensor, v: Tensor) -> None:
        """Append a piece of Alice's stream, k (copies, t, d) and v (copies, t, dv), to her state, with spike queries.

        The spike query q_t = C k_t of token t gives the token's own key nearly all softmax mass. So eviction policies,
        which choose the tokens to drop, observe softmax weights that are nearly one-sparse.
        """
        start = int(state.seen[0])
        q = self.queries[start : start + k.shape[1]].expand(self.copies, 1, -1, -1)
        state.step(q, k, v)

    def answers(self, state: State, copy: Tensor, row: Tensor) -> Tensor:
        return by_reading(state, copy, self.queries[row])

    def details(self) -> dict[str, Any]:
        """Measure the shares of scores q.k and softmax weights near zero, on up to 512 rows of causal attention.

        A row is that of one query q over the keys k up to its own token. A score is near zero if it is below 1e-3 of
        its row's largest score in size, a softmax weight if it is below 1e-3. Returns name -> value:
            family             name of the rule that makes the keys
            scores_near_zero   share of scores near zero
            softmax_near_zero  share of softmax weights near zero
            least_top_weight   the least, over the rows, of a row's largest weight: 1 if every row puts all its weight
                               on one token
        """
        rows = torch.linspace(0, self.n - 1, min(self.n, _ROWS_MEASURED)).long().unique()
        scores = self.queries[rows].double() @ self.keys.double().T
        later = torch.arange(self.n) > rows.unsqueeze(1)
        seen = ~later
        top = scores.masked_fill(later, -torch.inf).amax(dim=1, keepdim=True)
        weights = scores.masked_fill(later, -torch.inf).softmax(-1)
        return {
            **super().details(),
            "scores_near_zero": ((scores.abs() < _NEGLIGIBLE * top) & seen).sum().item() / seen.sum().item(),
            "softmax_near_zero": ((weights < _NEGLIGIBLE) & seen).sum().item() / seen.sum().item(),
            "least_top_weight": weights.amax(dim=1).min().item(),
        }


def play(
    method: Method | str,
    *,
    n: int = 1024,
    d: int = 64,
    dv: int | None = None,
    bits: int = 1,
    eta: float = 0.5,
    seed: int = 0,
    dtype: str = "float32",
    hidden_seed: int | str | None = None,
    family: str | None = None,
    isolated: bool = True,
) -> Result:
    """Play the sparse game against a method: the spike game with one-sparse attention at every token, n at most 16,384.

    One-sparse attention puts nearly all softmax mass on one token.
    method       a method or its text, such as "h2o@16"
    n, d, dv     number of keys, width of a key, width of a value (dv = d by default)
    bits         hidden bits per value, 1 to 24
    eta          relative error that answers may have, in [0, 1)
    seed         gives the public keys and, by a one-way derivation, the seed that the method receives
    dtype        float32, float16 or bfloat16: type of the keys and values that the method receives
    hidden_seed  repeats the hidden values; by default they are fresh from the operating system
    family       rule that makes the keys ("chirp", "sphere", ...); by default the one that separates the keys best
    isolated     False: restore the state in this process; quick, but data kept outside its bytes goes undetected
    Returns a `Result`: the bits that the state's bytes provably carry (certified bits), the sizes in bytes and the
    verdict: "holds" (enough answers are right), "breaks" (too few are) or "cheats" (the bytes cannot explain them).
    Its `details` have three numbers about sparsity: the share of scores q.k below 1e-3 of the largest in their row, the
    share of softmax weights below 1e-3, and the least weight that any row puts on its one token. Raises ValueError
    naming the argument that is out of its domain.
    """
    shared = agreed(d=d, dv=dv, bits=bits, eta=eta, seed=seed, dtype=dtype)
    if whole("n", n) > _MOST_TOKENS:
        raise ValueError(f"n must be at most {_MOST_TOKENS} for barrier 'sparse', got {n}")
    instance = Sparse(**shared, n=n, public=keys_for(shared, n, family))
    return run(method, instance, seed=seed, hidden_seed=hidden_seed, isolated=isolated)
