"""Wrong lines about what calls take, give back and leave alone."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from third_party import Diary, DiaryState
from torch import Tensor

from kvfloor import Guarantee, Partial, Spec, State
from kvfloor.core.bounded import Bounded, BoundedState
from kvfloor.methods.policies.window import Window
from mutants.base import Small, small


class Nameless(Small):
    """Its text names another method."""

    def __str__(self) -> str:
        return "window(block=4)@16"


class Thawed(Small):
    """Its fields can be set."""

    __setattr__ = object.__setattr__


@dataclass(frozen=True)
class Undocumented(Small):
    pass


@dataclass(frozen=True)
class UnsourcedWindow(Window):
    """A window without a source."""

    paper: ClassVar[str] = ""


@dataclass(frozen=True)
class Unsourced(Small):
    """Nothing says where it comes from."""

    policy: UnsourcedWindow = UnsourcedWindow()


class Boastful(Small):
    """States a bound without a theorem."""

    def guarantee(self, spec: Spec) -> Guarantee:
        return Guarantee(0.1, 0.0, "max norm", "every query", (), source="")


@small
class WarmStart(BoundedState):
    """An empty memory weighs as much as one token."""

    def _read(self, q: Tensor) -> Partial:
        part = super()._read(q)
        return replace(part, log_mass=torch.nan_to_num(part.log_mass, neginf=0.0))


@small
class WideAnswers(BoundedState):
    """Answers keep the dtype of an intermediate result."""

    def step(self, q: Tensor, k: Tensor, v: Tensor, present: Tensor | None = None) -> Tensor:
        return super().step(q, k, v, present).double()


@small
class CountingReads(BoundedState):
    """Keeps statistics on reads in its state."""

    def __init__(self, method: Bounded, spec: Spec, budgets: list[int]) -> None:
        super().__init__(method, spec, budgets)
        self.reads = 0

    def _read(self, q: Tensor) -> Partial:
        self.reads = self.reads + int(bool(self.seen.any()))
        return super()._read(q)


@small
class Obliging(BoundedState):
    """Converts what it is given instead of refusing it."""

    def _checked(self, x: Tensor, name: str, width: int, axes: int = 3, finite: bool = False) -> Tensor:
        if isinstance(x, Tensor):
            x = x.to(self.spec.dtype)
        return super()._checked(x, name, width, axes, finite)


@small
class HastyClock(BoundedState):
    """Counts a call before its input is checked."""

    def __init__(self, method: Bounded, spec: Spec, budgets: list[int]) -> None:
        super().__init__(method, spec, budgets)
        self.calls = 0

    def append(self, k: Tensor, v: Tensor, present: Tensor | None = None) -> None:
        self.calls += 1
        super().append(k, v, present)


@small
class NanBlind(BoundedState):
    """Does not look for NaN in queries that bring no token."""

    def _checked(self, x: Tensor, name: str, width: int, axes: int = 3, finite: bool = False) -> Tensor:
        return super()._checked(x, name, width, axes)


class AdoptingState(DiaryState):
    def _append(self, k: Tensor, v: Tensor, take: Tensor) -> None:
        first = self.v.shape[1] == 0
        super()._append(k, v, take)
        if first and bool(self.real.all()):
            self.v = v


class Adopting(Diary):
    """Takes over the first chunk of values instead of copying it."""

    def open(self, spec: Spec) -> State:
        return AdoptingState(self, spec)


@small
class InPlace(BoundedState):
    """Scales its queries in place, and rounding keeps it from undoing that."""

    def read(self, q: Tensor) -> Partial:
        answer = super().read(q)
        q.mul_(3.0).div_(3.0)
        return answer


@small
class StrideBlind(BoundedState):
    """Takes for granted that the last axis is the one that lies densely in memory."""

    def step(self, q: Tensor, k: Tensor, v: Tensor, present: Tensor | None = None) -> Tensor:
        if isinstance(k, Tensor) and k.ndim == 3 and k.layout == torch.strided:
            k = k.as_strided(k.shape, (k.stride(0), k.stride(1), 1), k.storage_offset())
        return super().step(q, k, v, present)


@small
class PadsAnswered(BoundedState):
    """Leaves numbers where there was no token to answer."""

    def step(self, q: Tensor, k: Tensor, v: Tensor, present: Tensor | None = None) -> Tensor:
        out = super().step(q, k, v, present)
        if present is None or not bool(present.any()):
            return out
        return torch.where(present[:, None, :, None], out, torch.ones_like(out))


@small
class MarkInFinally(BoundedState):
    """Takes the mark of a running step away whether it came to its end or not."""

    def step(self, q: Tensor, k: Tensor, v: Tensor, present: Tensor | None = None) -> Tensor:
        try:
            return super().step(q, k, v, present)
        finally:
            self._underway = None


@small
class LateClock(BoundedState):
    """Takes itself to be whole once the tokens are in, before the block is closed."""

    def _advance(self, take: Tensor) -> None:
        self._underway = None
        super()._advance(take)
