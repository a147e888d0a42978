"""Wrong lines about what calls take, give back and leave alone."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from third_party import Diary, DiaryState
from torch import Tensor

from kvfloor import Guarantee, Partial, Spec, State
from kvfloor.core.bounded import Bounded, BoundedState
from kvfloor.methods.policies.window import Window
from mutants.base import Small


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


class WarmStartState(BoundedState):
    def _read(self, q: Tensor) -> Partial:
        part = super()._read(q)
        return replace(part, log_mass=torch.nan_to_num(part.log_mass, neginf=0.0))


class WarmStart(Small):
    """An empty memory weighs as much as one token."""

    state = WarmStartState


class WideAnswersState(BoundedState):
    def step(self, q: Tensor, k: Tensor, v: Tensor, present: Tensor | None = None) -> Tensor:
        return super().step(q, k, v, present).double()


class WideAnswers(Small):
    """Answers keep the dtype of an intermediate result."""

    state = WideAnswersState


class CountingReadsState(BoundedState):
    def __init__(self, method: Bounded, spec: Spec, budgets: list[int]) -> None:
        super().__init__(method, spec, budgets)
        self.reads = 0

    def _read(self, q: Tensor) -> Partial:
        self.reads = self.reads + int(bool(self.seen.any()))
        return super()._read(q)


class CountingReads(Small):
    """Keeps statistics on reads in its state."""

    state = CountingReadsState


class ObligingState(BoundedState):
    def _checked(self, x: Tensor, name: str, width: int, axes: int = 3, finite: bool = False) -> Tensor:
        if isinstance(x, Tensor):
            x = x.to(self.spec.dtype)
        return super()._checked(x, name, width, axes, finite)


class Obliging(Small):
    """Converts what it is given instead of refusing it."""

    state = ObligingState


class HastyClockState(BoundedState):
    def __init__(self, method: Bounded, spec: Spec, budgets: list[int]) -> None:
        super().__init__(method, spec, budgets)
        self.calls = 0

    def append(self, k: Tensor, v: Tensor, present: Tensor | None = None) -> None:
        self.calls += 1
        super().append(k, v, present)


class HastyClock(Small):
    """Counts a call before its input is checked."""

    state = HastyClockState


class NanBlindState(BoundedState):
    def _checked(self, x: Tensor, name: str, width: int, axes: int = 3, finite: bool = False) -> Tensor:
        return super()._checked(x, name, width, axes)


class NanBlind(Small):
    """Does not look for NaN in queries that bring no token."""

    state = NanBlindState


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


class InPlaceState(BoundedState):
    def read(self, q: Tensor) -> Partial:
        answer = super().read(q)
        q.mul_(3.0).div_(3.0)
        return answer


class InPlace(Small):
    """Scales its queries in place, and rounding keeps it from undoing that."""

    state = InPlaceState


class StrideBlindState(BoundedState):
    def step(self, q: Tensor, k: Tensor, v: Tensor, present: Tensor | None = None) -> Tensor:
        if isinstance(k, Tensor) and k.ndim == 3 and k.layout == torch.strided:
            k = k.as_strided(k.shape, (k.stride(0), k.stride(1), 1), k.storage_offset())
        return super().step(q, k, v, present)


class StrideBlind(Small):
    """Takes for granted that the last axis is the one that lies densely in memory."""

    state = StrideBlindState


class PadsAnsweredState(BoundedState):
    def step(self, q: Tensor, k: Tensor, v: Tensor, present: Tensor | None = None) -> Tensor:
        out = super().step(q, k, v, present)
        if present is None or not bool(present.any()):
            return out
        return torch.where(present[:, None, :, None], out, torch.ones_like(out))


class PadsAnswered(Small):
    """Leaves numbers where there was no token to answer."""

    state = PadsAnsweredState
