"""Define the smallest method for the spike game: the keys are public, so only the levels of the values are stored.

In the game, Alice hides whole numbers (levels) of `bits` bits in the values of tokens with public keys, and sends the
bytes of a state, the message. Bob restores the state, and reads the values of each token by one query. This method
needs hardly more memory than the game's floor, a lower bound on the bits of any method; so the floor is tight.
"""

import dataclasses
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from kvfloor.core.fields import Field
from kvfloor.core.method import Method, Traits
from kvfloor.core.partial import Partial
from kvfloor.core.spec import Spec
from kvfloor.core.state import State
from kvfloor.game.engine.level_answers import table_of
from kvfloor.game.keys.families import FAMILIES
from kvfloor.validation import one_of, whole


@dataclasses.dataclass(frozen=True)
class PublicBits(Method):
    """Store only the hidden levels of n tokens with public keys, packed into n * dv * bits bits per stream.

    `values` names the number format of the levels, if they are those that answers within a factor 1±`eta` tell apart
    (`floors.level_values`), or, with the metric additive, within an error of `eta` times the largest number
    (`floors.additive_values`); else they are equally spaced in [0, 1].
    `family` (name of the rule that makes the keys, such as "chirp"), `n` and `key_seed` define the keys, so keys need
    no memory. The method accepts only a stream of exactly these keys, in order, with values on the 2^bits levels of [0,
    1]; other keys raise ValueError. With one bit per value, the message without its header has as many bits (in whole
    bytes) as the floor for p = 1, i.e. for methods whose answers are all right.
    """

    name: ClassVar[str] = "public_bits"
    paper: ClassVar[str] = "the trivial upper bound of the INDEX game"
    family: str
    n: int
    key_seed: int
    bits: int = 1
    values: str = ""
    eta: float = 0.0
    metric: str = "entrywise"

    def __post_init__(self) -> None:
        whole("n", self.n)
        whole("bits", self.bits)
        if self.family not in FAMILIES:
            raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {self.family!r}")
        one_of("metric", self.metric, ("entrywise", "additive"))
        if self.values:
            self.numbers()

    def numbers(self) -> Tensor:
        """Return the numbers (levels,), float64, that hidden levels are streamed as, ascending."""
        if self.values:
            return table_of(self.metric, self.values, self.eta).numbers
        return torch.arange(2**self.bits, dtype=torch.float64) / (2**self.bits - 1)

    @property
    def traits(self) -> Traits:
        return Traits(lossy_values=True)

    def open(self, spec: Spec) -> "PublicBitsState":
        return PublicBitsState(self, spec)

    def capacity(self, n: int, prompt: int | None = None, pinned: int = 0) -> int | None:
        return 0  # no token is kept whole


class PublicBitsState(State[PublicBits]):
    """Hold the levels of all values in one packed bit array per stream; public keys are not counted as memory.

    A level is a hidden value, a whole number of `bits` bits.
    """

    def __init__(self, method: PublicBits, spec: Spec) -> None:
        super().__init__(method, spec)
        self.shared["keys"] = FAMILIES[method.family](method.n, spec.d, method.key_seed).to(spec.dtype)
        size = -(-method.n * spec.dv * method.bits // 8)
        self.packed = torch.zeros(spec.rows, size, dtype=torch.uint8)

    def _levels(self) -> np.ndarray[Any, Any]:
        """Return all levels as bits 0 and 1: (rows, n, dv, bits), most significant bit first. A row is one stream."""
        plan, spec = self.method, self.spec
        flat = np.unpackbits(self.packed.numpy(), axis=1, count=plan.n * spec.dv * plan.bits)
        return flat.reshape(spec.rows, plan.n, spec.dv, plan.bits)

    def _require_tokens(self, k: Tensor, v: Tensor, take: Tensor) -> None:
        plan, start, count = self.method, int(self.seen[0]), int(take[0])
        if bool((take != count).any()) or start + count > plan.n:
            raise ValueError(f"public_bits takes {plan.n} tokens in every row alike")
        if not torch.equal(k[:, :count], self.shared["keys"][start : start + count].expand_as(k[:, :count])):
            raise ValueError("public_bits answers for the public keys only, in their order; these keys differ")

    def _append(self, k: Tensor, v: Tensor, take: Tensor) -> None:
        plan, start, count = self.method, int(self.seen[0]), int(take[0])
        if plan.values:
            levels = torch.searchsorted(plan.numbers(), v[:, :count].double().contiguous()).numpy()
        else:
            levels = (v[:, :count].double() * (2**plan.bits - 1)).round().long().numpy()
        bits = self._levels()
        bits[:, start : start + count] = levels[..., None] >> np.arange(plan.bits)[::-1] & 1
        self.packed = torch.from_numpy(np.packbits(bits.reshape(self.spec.rows, -1), axis=1))
        self.seen = self.seen + take

    def _read(self, q: Tensor) -> Partial:
        plan, seen = self.method, int(self.seen[0])
        levels = torch.from_numpy(self._levels() @ (1 << np.arange(plan.bits)[::-1]))[:, :seen]
        values = plan.numbers()[levels] if plan.values else levels.double() / (2**plan.bits - 1)
        values = values.to(self.spec.dtype)
        keys = self.shared["keys"][:seen].expand(self.spec.rows, -1, -1)
        return Partial.over(q, keys, values, self.spec)

    def export(self) -> dict[str, Any]:
        """Return the fields from which the message, i.e. the bytes of the state, is packed: name -> value.

        The token count `seen` is among them as one int, because it is the same for all streams. Ints go into the
        message's header, which is not counted as hidden information; this count is public.
        """
        return super().export() | {"seen": int(self.seen[0])}

    def fields(self) -> dict[str, Any]:
        return super().fields() | {"seen": Field(int, least=0, most=self.method.n)}

    def adopt(self, fields: dict[str, Any]) -> None:
        super().adopt({name: value for name, value in fields.items() if name != "seen"})
        self.seen = torch.full((self.spec.rows,), int(fields["seen"]), dtype=torch.int64)
