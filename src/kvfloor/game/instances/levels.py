"""Play the spike game with the values of a number format: as many levels as answers of the allowed error tell apart.

The game is that of `kvfloor.game.instances.spike`, but a hidden value is one of L numbers of the format. Under a
relative error eta they go from 0 over its least positive to its largest number, under an additive error (metric
additive) they are about equally far apart, of both signs. L is the number that `floors.space` claims at this error, so
the floor that is played is that floor.
"""

import dataclasses
import functools
from typing import Any, ClassVar

from torch import Tensor

from kvfloor.core.method import Method
from kvfloor.core.state import State
from kvfloor.floors.entropy import row_bits
from kvfloor.floors.spike import spike_C
from kvfloor.game.engine.asking import by_reading
from kvfloor.game.engine.decode import SUCCESS, Decoded
from kvfloor.game.engine.instance import RowPerKey, agreed, keys_for
from kvfloor.game.engine.level_answers import AdditiveTable, LevelTable, judge_levels, table_of
from kvfloor.game.engine.play import Played, play_index
from kvfloor.game.engine.public_bits import PublicBits
from kvfloor.game.engine.result import Result, conclude
from kvfloor.game.engine.secret import Hidden
from kvfloor.validation import one_of, whole

FORMATS = {"float32": ("fp16", "bf16"), "float16": ("fp16",), "bfloat16": ("bf16",)}
"""Map each dtype of a method's inputs to the formats of hidden values that it holds without rounding."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LevelSpike(RowPerKey):
    """Stream n public keys, each with a hidden row of dv numbers of the format `values`.

    `bits` is the number of bits that a level takes, log2 of their number rounded up. `eta` is the error that answers
    may have: relative to each number (metric entrywise), or to the format's largest number (additive).
    """

    barrier: ClassVar[str] = "spike"
    values: str
    metric: str = "entrywise"

    @functools.cached_property
    def level_table(self) -> LevelTable | AdditiveTable:
        """Return the table of hidden numbers."""
        return table_of(self.metric, self.values, self.eta)

    @property
    def value_bits(self) -> float:
        return self.level_table.told

    @property
    def hidden_bits(self) -> float:
        return self.copies * self.rows * self.dv * self.value_bits

    @property
    def floor_bits(self) -> float:
        """Return a lower bound on the bits of any message from which a share SUCCESS of the rows is answered."""
        return row_bits(self.copies * self.rows, self.dv, SUCCESS, self.value_bits)

    def draw(self, hidden: Hidden) -> Tensor:
        return hidden.choices(self.copies * self.rows, self.dv, len(self.level_table.numbers))

    def streamed(self, levels: Tensor) -> Tensor:
        return self.level_table.numbers[levels]

    def queries(self, row: Tensor) -> tuple[Tensor, Tensor]:
        """Return the spike queries (m, d) of hidden rows `row` (m,), and the gaps (m,) of the rows' keys."""
        ratio = self.level_table.leak
        return self.public.aim(row, self.spec(), lambda gap, norm: spike_C(self.n, 0, gap, norm, ratio))

    def answers(self, state: State, copy: Tensor, row: Tensor) -> Tensor:
        return by_reading(state, copy, self.queries(row)[0])

    def optimum(self) -> Method:
        return PublicBits(self.public.family, self.n, self.key_seed, self.bits, self.values, self.eta, self.metric)

    def details(self) -> dict[str, Any]:
        told = {"values": self.values, "levels": len(self.level_table.numbers)}
        return super().details() | told | ({} if self.metric == "entrywise" else {"metric": self.metric})


def play(
    method: Method | str,
    *,
    values: str,
    n: int,
    d: int,
    dv: int | None,
    eta: float,
    seed: int,
    heads: int,
    layers: int,
    dtype: str,
    rows: int,
    hidden_seed: int | str | None,
    family: str | None,
    isolated: bool,
    metric: str = "entrywise",
) -> Result:
    """Play the spike game with numbers of the format `values`, fp16 or bf16; return the result with its verdict.

    metric  entrywise: `eta` is the relative error that answers may have; additive: their error relative to the format's
            largest number
    The other arguments are those of `spike.play`, all given; `rows` is the number of rows to ask. Raises ValueError
    naming the argument that is out of its domain, and for a format that `dtype` does not hold.
    """
    shared = agreed(d=d, dv=dv, bits=1, eta=eta, seed=seed, dtype=dtype)
    one_of(f"values with dtype={dtype}", values, FORMATS[dtype])
    count = len(table_of(metric, values, shared["eta"]).numbers)
    shared["bits"] = max(1, (count - 1).bit_length())
    n, copies = whole("n", n), whole("heads", heads) * whole("layers", layers)
    public = keys_for(shared, n, family)
    instance = LevelSpike(**shared, n=n, values=values, metric=metric, public=public, copies=copies)
    total = copies * n
    played = play_index(method, instance, Hidden(hidden_seed), rows if rows < total else None, isolated=isolated)

    def judged(answers: Tensor, played: Played) -> Decoded:
        sampled_from = total if played.sampled else None
        return judge_levels(answers, played.hidden, instance.level_table, sampled_from=sampled_from)

    worst = instance.queries(played.rows % n)[1].min().item()
    return conclude(played, instance, seed=seed, judge=judged, worst_gap=worst)


def format_of(dtype: str) -> str:
    """Return the number format whose levels are hidden unless a format is given: that of dtype, fp16 for float32.

    Raises ValueError unless dtype is float32, float16 or bfloat16.
    """
    return FORMATS[one_of("dtype", dtype, tuple(FORMATS))][0]
