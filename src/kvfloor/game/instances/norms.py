"""Play the spike game under an error that is bounded in the l2 norm: points of the unit ball, or signs, are hidden.

The game is that of `kvfloor.game.instances.spike`, with the hidden values of the proof of `floors.metric_space`. An
answer z of a method that keeps the guarantee |z - A|_2 <= epsilon * size, A being exact attention, is near the hidden
row of the queried token: within a radius r of a point, or with at most e wrong signs. A row is answered if that is so.
Nothing has to be decoded: whatever the message, a uniform hidden row is so near to a given answer with probability
r^dv at most, or with the share of all sign rows that differ in at most e signs. The certificate counts the rows.

The stream has as many tokens as the floor is largest for, at most n. For the metric operator the hidden matrices are
those whose operator norm is at most one that half of them have; this costs one bit.
"""

import dataclasses
import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvfloor.core.method import Method
from kvfloor.core.state import State
from kvfloor.floors.ball import ball_radius, squared_ball_norm
from kvfloor.floors.entropy import row_bits
from kvfloor.floors.levels import number_format
from kvfloor.floors.metric import NORMS, ball_bits, metric_space, noisy_row_bits, sign_norm, wrong_share
from kvfloor.floors.spike import spike_C
from kvfloor.game.engine import certificates
from kvfloor.game.engine.asking import by_reading
from kvfloor.game.engine.decode import SUCCESS, Decoded
from kvfloor.game.engine.instance import RowPerKey, agreed, keys_for
from kvfloor.game.engine.play import ALL_ROWS_UP_TO, ROWS_SAMPLED, Played, play_index
from kvfloor.game.engine.result import Result, conclude
from kvfloor.game.engine.secret import Hidden
from kvfloor.validation import one_of, whole

LEAK = 2.0**-24
"""Ratio (softmax mass off the token)/(mass on it) at which radius and wrong signs are counted; queries have half."""

_TORCH = {"fp16": torch.float16, "bf16": torch.bfloat16}
_ATTEMPTS = 256  # at a chance of a half each


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormSpike(RowPerKey):
    """Stream n public keys, each with a hidden row: a point of the unit ball of dv dimensions, or signs.

    metric   max, frobenius or operator: what the l2 error of an answer is compared with
    values   number format that points are rounded to; binary: signs
    width    number of signs in a row, in the first coordinates; the others are 0. dv for points
    wrong    signs of a row that an answer within the guarantee may get wrong; 0 for points
    radius   radius to which an answer within the guarantee tells a point; 0 for signs
    `eta` is the error epsilon of the guarantee.
    """

    barrier: ClassVar[str] = "spike"
    metric: str
    values: str
    width: int
    wrong: int = 0
    radius: float = 0.0

    @property
    def row_told(self) -> float:
        """Return the bits that an answer within the guarantee tells about its row."""
        if self.radius:
            return -self.dv * math.log2(self.radius)
        return self.width - ball_bits(self.width, self.wrong)

    @property
    def likelier_half(self) -> float:
        """Return the bits that hiding only the likelier half of all matrices costs."""
        return 1.0 if self.metric == "operator" else 0.0

    @property
    def value_bits(self) -> float:
        """Return the bits that an answer within the guarantee tells about a value; a point itself has no end."""
        return self.row_told / self.dv

    @property
    def hidden_bits(self) -> float:
        """Return the bits that answers within the guarantee tell."""
        return self.n * self.row_told

    @property
    def floor_bits(self) -> float:
        """Return a lower bound on the bits of any message from which a share SUCCESS of the rows is answered."""
        if self.radius:
            bits = row_bits(self.n, self.dv, SUCCESS, self.value_bits)
        else:
            bits = noisy_row_bits(self.n, self.width, SUCCESS, self.wrong)
        return max(0.0, bits - self.likelier_half)

    def draw(self, hidden: Hidden) -> Tensor:
        """Draw the hidden rows (n, dv), float64: points of the unit ball, or signs and zeros."""
        for attempt in range(_ATTEMPTS):
            if self.radius:
                rows, most = hidden.points(self.n, self.dv, attempt), math.sqrt(squared_ball_norm(self.n, self.dv))
            else:
                rows = torch.zeros(self.n, self.dv, dtype=torch.float64)
                rows[:, : self.width] = hidden.signs(self.n, self.width, attempt)
                most = sign_norm(self.n, self.width)
            if self.metric != "operator" or torch.linalg.matrix_norm(rows, 2).item() <= most:
                return rows
        raise AssertionError("a norm that half of all matrices keep to was exceeded by all that were drawn")

    def streamed(self, levels: Tensor) -> Tensor:
        return levels.to(_TORCH[self.values]).double() if self.radius else levels

    def queries(self, row: Tensor) -> tuple[Tensor, Tensor]:
        """Return the spike queries (m, d) of hidden rows `row` (m,), and the gaps (m,) of the rows' keys."""
        return self.public.aim(row, self.spec(), lambda gap, norm: spike_C(self.n, 0, gap, norm, LEAK / 2.0))

    def answers(self, state: State, copy: Tensor, row: Tensor) -> Tensor:
        return by_reading(state, copy, self.queries(row)[0])

    def details(self) -> dict[str, Any]:
        told = {"radius": self.radius} if self.radius else {"row_width": self.width, "wrong_per_row": self.wrong}
        return super().details() | {"metric": self.metric, "values": self.values} | told


def judge_norm(answers: Tensor, hidden: Tensor, instance: NormSpike, *, sampled_from: int | None = None) -> Decoded:
    """Compare answers (m, dv) with the hidden rows (m, dv), and certify the bits that a state's message carries.

    sampled_from  None: every row was asked once. A number n: the m rows were drawn with replacement from n
    A row is answered if the answer is within `radius` of its point, or has at most `wrong` wrong signs. The error share
    of the result counts values whose sign is not the answer's.
    """
    answers = answers.double()
    finite = torch.isfinite(answers).all(dim=1)
    other = (answers[:, : instance.width] > 0.0) != (hidden[:, : instance.width] > 0.0)
    near = other.sum(dim=1) <= instance.wrong
    if instance.radius:
        near = (answers - hidden).norm(dim=1) <= instance.radius
    answered = near & finite
    m, missed = len(answered), int((~answered).sum())
    if sampled_from is not None:
        kind, bits = "sampled rows", certificates.certified_from_sample(sampled_from, instance.row_told, missed, m)
    else:
        chance = torch.full((m,), -instance.row_told, dtype=torch.float64)
        kind, bits = "rows", certificates.certified([certificates.rows(chance, missed)])
    bits = max(0.0, bits - instance.likelier_half)
    return Decoded(bits, kind, other.double().mean().item(), answered.double().mean().item())


def play(
    method: Method | str,
    *,
    metric: str,
    epsilon: float,
    values: str,
    n: int,
    d: int,
    dv: int | None,
    seed: int,
    dtype: str,
    rows: int | None,
    hidden_seed: int | str | None,
    family: str | None,
    isolated: bool,
) -> Result:
    """Play the spike game under the guarantee max, frobenius or operator; return the result with its verdict.

    epsilon  |answer - attention|_2 is at most epsilon times the size of the metric (`floors.metric_space`), in [0, 1)
    n        most tokens of the stream; as many are streamed as the floor is largest for
    values   fp16 or bf16: format that hidden points are rounded to; binary: hidden signs
    rows     number of rows to ask, drawn with replacement if it is below all; None: 2,048 if there are more than
             16,384, else every row once
    The other arguments are those of `spike.play`. Raises ValueError naming the argument that is out of its domain.
    """
    one_of("metric", metric, NORMS)
    shared = agreed(d=d, dv=dv, bits=1, eta=epsilon, seed=seed, dtype=dtype)
    floor = metric_space(n, d, shared["dv"], metric=metric, epsilon=epsilon, p=SUCCESS, values=values)
    m = floor.constants["rows"]
    told: dict[str, Any] = {"width": shared["dv"]}
    if floor.constants["hidden"] == "signs":
        told["width"] = floor.constants["row_width"]
        share = wrong_share(metric, epsilon, m, told["width"], LEAK)
        told["wrong"] = math.floor(share * told["width"] * (1.0 + 1e-12) + 1e-12)
    else:
        rounding, size = number_format(values).rounding, 1.0 if metric == "max" else math.sqrt(m)
        if metric == "operator":
            size = math.sqrt(squared_ball_norm(m, shared["dv"])) + size * rounding
        told["radius"] = ball_radius(epsilon, size, LEAK, rounding, of_all=metric != "max")
    instance = NormSpike(**shared, n=m, public=keys_for(shared, m, family), metric=metric, values=values, **told)
    if rows is None and m > ALL_ROWS_UP_TO:
        rows = ROWS_SAMPLED
    sampled = rows if rows is not None and whole("rows", rows) < m else None
    played = play_index(method, instance, Hidden(hidden_seed), sampled, isolated=isolated)

    def judged(answers: Tensor, played: Played) -> Decoded:
        return judge_norm(answers, played.hidden, instance, sampled_from=m if played.sampled else None)

    worst = instance.queries(played.rows)[1].min().item()
    return conclude(played, instance, seed=seed, judge=judged, worst_gap=worst)
