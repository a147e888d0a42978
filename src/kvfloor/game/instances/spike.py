"""Play the spike game: one hidden row per public key, read by a query that gives this key nearly all softmax mass.

Alice hides the rows (dv values each) in the state of a method (the memory of a KV cache). Bob restores the state from
its bytes, the message, and decodes the rows from the answers to the queries. The stream is that of the proofs of Haris
& Onak (COLT 2025), Theorems 6 (eta = 0) and 8, with exact constants (docs/floors.md). The floor is the theorem's lower
bound on the bits that any method must keep. Independent copies of the game in one state stand for kv heads and layers:
their floors add up.
"""

import dataclasses
from typing import ClassVar

from torch import Tensor

from kvfloor.core.method import Method
from kvfloor.core.state import State
from kvfloor.floors.metric import NORMS
from kvfloor.floors.question import METRICS
from kvfloor.floors.spike import spike_C
from kvfloor.game.engine.asking import by_reading
from kvfloor.game.engine.decode import leak_ratio
from kvfloor.game.engine.instance import RowPerKey, agreed, keys_for
from kvfloor.game.engine.play import ALL_ROWS_UP_TO, ROWS_SAMPLED, play_index
from kvfloor.game.engine.public_bits import PublicBits
from kvfloor.game.engine.result import Result, conclude
from kvfloor.game.engine.secret import Hidden
from kvfloor.game.instances.codebook import play as play_codebook
from kvfloor.game.instances.levels import FORMATS, format_of
from kvfloor.game.instances.levels import play as play_levels
from kvfloor.game.instances.norms import play as play_norms
from kvfloor.validation import one_of, whole, within


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spike(RowPerKey):
    """Stream n public keys, each with a hidden row of dv values; Bob appends no token before he asks."""

    barrier: ClassVar[str] = "spike"

    def queries(self, row: Tensor) -> tuple[Tensor, Tensor]:
        """Return the spike queries (m, d) of hidden rows `row` (m,), and the gaps (m,) of the rows' keys.

        Each hidden row has one key, and its spike query gives this key nearly all softmax mass. A gap is the key's
        squared norm less its largest inner product with another key.
        """
        ratio = leak_ratio(self.bits, self.eta)
        return self.public.aim(row, self.spec(), lambda gap, norm: spike_C(self.n, 0, gap, norm, ratio))

    def answers(self, state: State, copy: Tensor, row: Tensor) -> Tensor:
        return by_reading(state, copy, self.queries(row)[0])

    def optimum(self) -> Method:
        return PublicBits(self.public.family, self.n, self.key_seed, self.bits)


def play(
    method: Method | str,
    *,
    n: int = 1024,
    d: int = 64,
    dv: int | None = None,
    bits: int = 1,
    eta: float = 0.5,
    seed: int = 0,
    heads: int = 1,
    layers: int = 1,
    dtype: str = "float32",
    rows: int | None = None,
    hidden_seed: int | str | None = None,
    family: str | None = None,
    codebook: int | None = None,
    values: str | None = None,
    metric: str = "entrywise",
    epsilon: float | None = None,
    isolated: bool = True,
) -> Result:
    """Play the spike game against a method and certify the bits that its message, the bytes of its state, carries.

    method       a method or its text, or the word "optimum": the smallest method (`PublicBits`), which stores only the
                 packed hidden values. It shows that the floor cannot be much higher
    n, d, dv     number of keys, width of a key, width of a value (dv = d by default)
    bits         hidden bits per value, 1 to 24. With many bits, the result's field bits_per_value is the precision that
                 a method keeps
    eta          relative error that answers may have, in [0, 1)
    heads        number of kv heads; heads * layers independent instances lie side by side in one state
    layers       number of layers
    dtype        float32, float16 or bfloat16: type of the keys and values that the method receives
    rows         how many hidden rows (dv values of one key) to ask, drawn with replacement; by default 2,048 if there
                 are more than 16,384, else every row once
    seed         gives the public keys and, by a one-way derivation, the seed that the method receives
    hidden_seed  repeats the hidden values; by default they are fresh from the operating system. They never derive from
                 anything that the method sees, also where hidden_seed equals seed
    family       rule that makes the keys, such as "chirp" or "sphere"; by default the one that separates n keys of
                 width d best
    codebook     size of a public set from which Alice chooses the n keys in secret, so that the keys hide bits too
                 (`kvfloor.game.instances.codebook`); None: all n public keys are streamed
    values       fp16 or bf16: hide as many numbers of this format as answers within 1±eta tell apart, as the floor of
                 `floors.space` does, in place of 2^bits equally spaced ones (`kvfloor.game.instances.levels`). None:
                 values of `bits` bits
    metric       entrywise: answers err by a factor 1±eta. Or the error that `epsilon` bounds: additive, each number of
                 an answer errs by at most epsilon times the largest value; max, frobenius or operator, the l2 error of
                 an answer is relative to the values' size (`floors.metric_space`). Then as many levels, points of the
                 unit ball or signs are hidden as the floor counts (`kvfloor.game.instances.levels` and `.norms`),
                 in `values`, by default the format of dtype; values="binary" hides signs. max, frobenius and operator
                 stream as many tokens as the floor is largest for, at most n
    epsilon      error of these metrics, in [0, 1)
    isolated     False: restore the message in this process; quick, but data kept outside the state goes undetected
    Returns a `Result`: the bits that the state's bytes provably carry (certified bits), the sizes in bytes and the
    verdict: "holds" (enough answers are right), "breaks" (too few are) or "cheats" (the bytes cannot explain them).
    Raises ValueError naming the argument that is out of its domain, or the reason that the method cannot be rebuilt.
    """
    if values is not None and (codebook is not None or bits != 1):
        raise ValueError(f"values={values!r} says how many levels are hidden: leave bits and codebook out")
    one_of("metric", metric, METRICS)
    if (metric == METRICS[0]) != (epsilon is None):
        raise ValueError(f"epsilon is the error of the metrics {', '.join(METRICS[1:])}: give both or none")
    if epsilon is not None:
        within("epsilon", epsilon, 0.0, 1.0, high_open=True)
        if bits != 1 or codebook is not None:
            raise ValueError(f"metric={metric!r} says what is hidden: leave bits and codebook out")
        values = format_of(dtype) if values is None else values
    if epsilon is not None and values is not None and metric in NORMS:
        if heads != 1 or layers != 1:
            raise ValueError(f"metric={metric!r} plays one head: leave heads and layers out")
        if values != "binary":
            one_of(f"values with dtype={dtype}", values, FORMATS[dtype])
        return play_norms(
            method, metric=metric, epsilon=epsilon, values=values, n=n, d=d, dv=dv, seed=seed, dtype=dtype, rows=rows,
            hidden_seed=hidden_seed, family=family, isolated=isolated,
        )  # fmt: skip
    if codebook is not None:
        if heads != 1 or layers != 1 or rows is not None:
            raise ValueError("codebook plays one head and asks for every key: leave heads, layers and rows out")
        return play_codebook(
            method, codebook=codebook, n=n, d=d, dv=dv, bits=bits, eta=eta, seed=seed, dtype=dtype,
            hidden_seed=hidden_seed, family=family, isolated=isolated,
        )  # fmt: skip
    n, copies = whole("n", n), whole("heads", heads) * whole("layers", layers)
    if rows is None:
        rows = copies * n if copies * n <= ALL_ROWS_UP_TO else ROWS_SAMPLED
    whole("rows", rows)
    if values is not None:
        return play_levels(
            method, values=values, n=n, d=d, dv=dv, eta=eta if epsilon is None else epsilon, seed=seed, heads=heads,
            layers=layers, dtype=dtype, rows=rows, hidden_seed=hidden_seed, family=family, isolated=isolated,
            metric=metric,
        )  # fmt: skip
    shared = agreed(d=d, dv=dv, bits=bits, eta=eta, seed=seed, dtype=dtype)
    instance = Spike(**shared, n=n, public=keys_for(shared, n, family), copies=copies)
    sampled = rows if rows < copies * n else None
    played = play_index(method, instance, Hidden(hidden_seed), sampled, isolated=isolated)
    row = played.rows % n
    worst = instance.queries(row)[1].min().item()
    return conclude(played, instance, seed=seed, worst_gap=worst)
