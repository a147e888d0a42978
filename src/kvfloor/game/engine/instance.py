"""Define the public data of the game: all that Alice and Bob agree on before any value is hidden.

Alice hides values in a method's state (the memory of a KV cache). Bob decodes the values from the message, i.e. the
bytes of that state.
    barrier  the game of one memory theorem
    stream   Alice's tokens in order; a game has `copies` independent streams, which one state holds side by side
    row      dv hidden values, which one of Bob's queries reads back
    level    hidden value x of 0..2^bits-1, streamed as the number x / (2^bits - 1)
"""

import dataclasses
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvfloor.core.method import Method, standard_law
from kvfloor.core.spec import DTYPES, Spec
from kvfloor.core.state import State
from kvfloor.floors.entropy import row_bits
from kvfloor.game.engine.decode import SUCCESS, information
from kvfloor.game.engine.secret import Hidden
from kvfloor.game.keys.public import PublicKeys
from kvfloor.validation import one_of, relative_error, whole

MOST_BITS = 24  # of a hidden value: a float32 has no more
PLAYED_IN = ("float32", "float16", "bfloat16")
_TOKENS_AT_ONCE = 1024


def derived_seed(purpose: str, seed: int | str) -> int:
    """Derive a seed for one purpose from a run's seed: 63 bits of SHA-256 over "kvfloor/barriers/v1/PURPOSE/SEED".

    PURPOSE is the argument `purpose`, a name such as "keys", and SEED the argument `seed`. Seeds for different purposes
    are unrelated, and do not reveal the run's seed.
    """
    digest = hashlib.sha256(f"kvfloor/barriers/v1/{purpose}/{seed}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Instance(ABC):
    """Define what both sides of one game know: `copies` streams, each hiding `rows` rows of dv values of `bits` bits.

    Alice appends the streams' tokens to a method's state. A hidden row is the values that one of Bob's queries reads
    back. Each barrier (the game of one memory theorem) implements `rows`, `length`, `stream` and `answers`. All fields
    are public: Bob's process receives them as JSON, and builds the instance from nothing else.
    d, dv, dtype           width of a key, width of a value, number format of both
    bits                   bits per hidden value
    eta                    relative error that answers may have
    key_seed, method_seed  seeds of the public keys and of the method, derived from the run's seed (`derived_seed`).
                           They reveal neither that seed nor hidden values
    copies                 number of independent streams, which stand for kv heads and layers
    """

    barrier: ClassVar[str]
    d: int
    dv: int
    bits: int
    eta: float
    key_seed: int
    method_seed: int
    dtype: str = "float32"
    copies: int = 1

    # ---- implemented by each barrier -----------------------------------------------------------------------

    @property
    @abstractmethod
    def rows(self) -> int:
        """Return the number of hidden rows per stream; a row is dv hidden values."""

    @property
    @abstractmethod
    def length(self) -> int:
        """Return the number of tokens that Alice appends per stream; a token that Bob appends is not counted."""

    @abstractmethod
    def stream(self, values: Tensor, hidden: Hidden) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield Alice's tokens in order, in pieces of t tokens: keys (copies, t, d) and values (copies, t, dv).

        `copies` is the number of streams. values (copies, rows, dv) are the hidden values, as numbers in [0, 1].
        `hidden` draws token positions that only Alice knows, in games that have such positions.
        """

    @abstractmethod
    def answers(self, state: State, copy: Tensor, row: Tensor) -> Tensor:
        """Return the state's answers (m, dv), float32, for hidden rows `row` (m,) of the streams `copy` (m,).

        A hidden row is the dv values in [0, 1] that one query reads, and answers are in the same unit; `copy` and `row`
        are indices.
        """

    def lift(self, method: Method) -> Method:
        """Return the method in the form that the game plays: here unchanged, for games about standard attention.

        The game about attention over pairs of tokens overrides this, and wraps the method. Raises ValueError for a
        method whose kind of attention does not fit the game.
        """
        return standard_law(method, f"barrier {self.barrier!r}")

    def take_in(self, state: State, k: Tensor, v: Tensor) -> None:
        """Append one piece of Alice's stream, k (copies, t, d) and v (copies, t, dv), to the state.

        Here no query is asked while tokens arrive. Games in which Alice asks queries as well override this method.
        """
        state.append(k, v)

    def optimum(self) -> Method:
        """Return the method of least memory that is known to answer all queries of this instance right.

        Raises ValueError if no such method is known, as here; a game that has one overrides this.
        """
        raise ValueError(f"barrier {self.barrier!r} has no known optimum to play; give a method")

    def details(self) -> dict[str, Any]:
        """Return numbers and names that describe the instance, name -> value, computed from public data alone.

        The record of a game (`Result`) shows them in its field `details`. Here there are none.
        """
        return {}

    # ---- common to all barriers ----------------------------------------------------------------------------

    @property
    def value_bits(self) -> float:
        """Return the bits that Alice hides in one value."""
        return self.bits

    @property
    def hidden_bits(self) -> float:
        """Return the number of bits that Alice hides in all streams together."""
        return self.copies * self.rows * self.dv * self.bits

    @property
    def floor_bits(self) -> float:
        """Return a lower bound on the bits of any message from which a share SUCCESS of the rows is answered.

        It is for the values that are hidden here, uniform levels of `bits` bits, and for answers within a factor 1±eta:
        with several bits, one answer may be right for several levels (`floors.row_bits`).
        """
        return row_bits(self.copies * self.rows, self.dv, SUCCESS, *information(self.bits, self.eta))

    def draw(self, hidden: Hidden) -> Tensor:
        """Draw the hidden levels (copies * rows, dv), int64, that Alice streams."""
        return hidden.levels(self.copies * self.rows, self.dv, self.bits)

    def streamed(self, levels: Tensor) -> Tensor:
        """Return the numbers, float64, that hidden levels are streamed as: level x as x / (2^bits - 1)."""
        return levels.double() / (2**self.bits - 1)

    def spec(self) -> Spec:
        """Return the sizes, dtype, scale and seed for which the method opens Alice's state.

        The scale is 1: logits are q.k, as in the theorems, not q.k / sqrt(d).
        """
        return Spec(rows=self.copies, d=self.d, dv=self.dv, scale=1.0, seed=self.method_seed, dtype=DTYPES[self.dtype])

    def feed(self, state: State, levels: Tensor, hidden: Hidden) -> None:
        """Append all of Alice's tokens to the state in order, then seal the state, which marks the end of the prompt.

        levels (copies * rows, dv) are the hidden levels, which become values (`streamed`). `hidden` draws token
        positions that only Alice knows, in games that have such positions.
        """
        values = self.streamed(levels).view(self.copies, self.rows, self.dv).to(DTYPES[self.dtype])
        for k, v in self.stream(values, hidden):
            self.take_in(state, k, v)
        state.seal()

    def ask(self, state: State, rows: Tensor | None) -> Tensor:
        """Return the state's answers (m, dv), float32, for hidden rows `rows` (m,), or for all rows in order if None.

        A hidden row is the dv values in [0, 1] that one query reads, and answers are in the same unit. Rows are
        numbered across streams: the first stream's rows come first.
        """
        rows = torch.arange(self.copies * self.rows) if rows is None else rows
        return self.answers(state, rows // self.rows, rows % self.rows).float().contiguous()


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyedInstance(Instance):
    """Define an instance whose tokens have public keys of one family, such as random signs or a code.

    public  the family, number, width and seed of the keys, from which Alice and Bob make the same keys
    """

    public: PublicKeys

    def __post_init__(self) -> None:
        if isinstance(self.public, dict):  # as it comes from JSON
            object.__setattr__(self, "public", PublicKeys(**self.public))

    @property
    def keys(self) -> Tensor:
        """Return the public keys (n, d), in the instance's dtype."""
        return self.public.table

    def details(self) -> dict[str, Any]:
        return {"family": self.public.family}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowPerKey(KeyedInstance):
    """Define an instance that streams n public keys once, in order, each with a hidden row."""

    n: int

    @property
    def rows(self) -> int:
        return self.n

    @property
    def length(self) -> int:
        return self.n

    def stream(self, values: Tensor, hidden: Hidden) -> Iterator[tuple[Tensor, Tensor]]:
        del hidden
        yield from pieces(self.keys, values)


def keys_for(shared: dict[str, Any], n: int, family: str | None = None) -> PublicKeys:
    """Return n public keys for an instance whose common fields (the dict that `agreed` returns) are `shared`.

    family  name of the rule that makes the keys, such as "chirp" or "sphere"; None: the rule whose keys have the
            largest smallest gap
    The gap of a key is its squared norm less its largest inner product with another key. The larger it is, the better a
    query along the key singles it out. Raises ValueError where there is no such family, or none with n keys of positive
    gap.
    """
    return PublicKeys.chosen(family, n, shared["d"], shared["key_seed"], shared["dtype"])


def agreed(*, d: int, dv: int | None, bits: int, eta: float, seed: int, dtype: str = "float32") -> dict[str, Any]:
    """Check the arguments that all instances share, and return them as fields of an instance: name -> value.

    d, dv  widths of a key and a value; dv is d unless given
    bits   hidden bits per value, 1 to 24
    eta    relative error that answers may have
    seed   the run's seed. The result does not have it, but two seeds derived from it: key_seed and method_seed
    dtype  float32, float16 or bfloat16
    Raises ValueError naming the argument that is out of its domain.
    """
    d = whole("d", d)
    if whole("bits", bits) > MOST_BITS:
        raise ValueError(f"bits must lie in 1..{MOST_BITS}, got {bits}")
    one_of("dtype", dtype, PLAYED_IN)
    seed = whole("seed", seed, least=0)
    return {
        "d": d, "dv": d if dv is None else whole("dv", dv), "bits": bits, "eta": relative_error(eta), "dtype": dtype,
        "key_seed": derived_seed("keys", seed), "method_seed": derived_seed("method", seed),
    }  # fmt: skip


def pieces(k: Tensor, v: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the tokens of all streams in pieces of up to 1,024: keys (copies, t, d) and values (copies, t, dv).

    Every stream has the same keys k (n, d) and its own values v (copies, n, dv).
    """
    k = k.unsqueeze(0).expand(v.shape[0], -1, -1)
    yield from zip(k.split(_TOKENS_AT_ONCE, dim=1), v.split(_TOKENS_AT_ONCE, dim=1), strict=True)
