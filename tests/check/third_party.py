"""Define a third party's parts: one method whose state writes `_append` and `_read` only, and one policy."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvfloor import Guarantee, Method, Partial, Spec, State, Traits
from kvfloor.core.policy import Held, Policy


@dataclass(frozen=True)
class Diary(Method):
    """Keep every token in one growing tensor."""

    name: ClassVar[str] = "diary"
    paper: ClassVar[str] = "an example"
    traits: ClassVar[Traits] = Traits(constant_memory=False)  # type: ignore[misc]

    def open(self, spec: Spec) -> State:
        return DiaryState(self, spec)

    def capacity(self, n: int, prompt: int | None = None, pinned: int = 0) -> int | None:
        return None

    def guarantee(self, spec: Spec) -> Guarantee | None:
        return Guarantee(0.0, 0.0, "max norm", "every query", (), "the definition of attention")


class DiaryState(State):
    """Hold k (rows, columns, d) and v (rows, columns, dv); real (rows, columns) is True at a row's tokens."""

    def __init__(self, method: Method, spec: Spec) -> None:
        super().__init__(method, spec)
        self.k = torch.zeros(spec.rows, 0, spec.d, dtype=spec.dtype)
        self.v = torch.zeros(spec.rows, 0, spec.dv, dtype=spec.dtype)
        self.real = torch.zeros(spec.rows, 0, dtype=torch.bool)

    @property
    def held(self) -> Tensor:
        return self.real.sum(1)

    def _append(self, k: Tensor, v: Tensor, take: Tensor) -> None:
        real = torch.arange(k.shape[1]) < take.unsqueeze(1)
        self.k, self.v = torch.cat([self.k, k], 1), torch.cat([self.v, v], 1)
        self.k[:, -k.shape[1] :][~real], self.v[:, -k.shape[1] :][~real] = 0, 0
        self.real = torch.cat([self.real, real], 1)
        self.seen = self.seen + take

    def _read(self, q: Tensor) -> Partial:
        return Partial.over(q, self.k, self.v, self.spec, hide=~self.real.unsqueeze(1))


@dataclass(frozen=True)
class EverySecond(Policy):
    """Evict the oldest token at an odd position first, then those at even positions."""

    name: ClassVar[str] = "every_second"
    paper: ClassVar[str] = "an example"

    def priority(self, held: Held) -> Tensor:
        return (held.position % 2 == 0).double() * 2**40 + held.position
