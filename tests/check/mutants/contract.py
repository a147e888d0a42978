"""Break the inputs, the outputs and the side effects of calls."""

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
    """Break the text form: it names another method."""

    def __str__(self) -> str:
        return "window(block=4)@16"


class Thawed(Small):
    """Break immutability: fields can be set."""

    __setattr__ = object.__setattr__


@dataclass(frozen=True)
class Undocumented(Small):
    pass


@dataclass(frozen=True)
class UnsourcedWindow(Window):
    """Evict the oldest token, without naming a source."""

    paper: ClassVar[str] = ""


@dataclass(frozen=True)
class Unsourced(Small):
    """Break documentation: the policy names no source."""

    policy: UnsourcedWindow = UnsourcedWindow()


class Boastful(Small):
    """Break the guarantee: state a bound without a theorem."""

    def guarantee(self, spec: Spec) -> Guarantee:
        return Guarantee(0.1, 0.0, "max norm", "every query", (), source="")


class WarmStartState(BoundedState):
    def _read(self, q: Tensor) -> Partial:
        part = super()._read(q)
        return replace(part, log_mass=torch.nan_to_num(part.log_mass, neginf=0.0))


class WarmStart(Small):
    """Break the empty state: it has the mass of one token."""

    state = WarmStartState


class WideAnswersState(BoundedState):
    def step(self, q: Tensor, k: Tensor, v: Tensor, present: Tensor | None = None) -> Tensor:
        return super().step(q, k, v, present).double()


class WideAnswers(Small):
    """Break the dtype of answers: keep that of an intermediate result."""

    state = WideAnswersState


class CountingReadsState(BoundedState):
    def __init__(self, method: Bounded, spec: Spec, budgets: list[int]) -> None:
        super().__init__(method, spec, budgets)
        self.reads = 0

    def _read(self, q: Tensor) -> Partial:
        self.reads = self.reads + int(bool(self.seen.any()))
        return super()._read(q)


class CountingReads(Small):
    """Break the purity of `read`: count the reads in the state."""

    state = CountingReadsState


class ObligingState(BoundedState):
    def _checked(self, x: Tensor, name: str, width: int, axes: int = 3, finite: bool = False) -> Tensor:
        if isinstance(x, Tensor):
            x = x.to(self.spec.dtype)
        return super()._checked(x, name, width, axes, finite)


class Obliging(Small):
    """Break the refusal of wrong input: convert another dtype instead."""

    state = ObligingState


class HastyClockState(BoundedState):
    def __init__(self, method: Bounded, spec: Spec, budgets: list[int]) -> None:
        super().__init__(method, spec, budgets)
        self.calls = 0

    def append(self, k: Tensor, v: Tensor, present: Tensor | None = None) -> None:
        self.calls += 1
        super().append(k, v, present)


class HastyClock(Small):
    """Break the refusal of wrong input: count a call before its input is checked."""

    state = HastyClockState


class NanBlindState(BoundedState):
    def _checked(self, x: Tensor, name: str, width: int, axes: int = 3, finite: bool = False) -> Tensor:
        return super()._checked(x, name, width, axes)


class NanBlind(Small):
    """Break the refusal of NaN: do not search for it in queries without tokens."""

    state = NanBlindState


class AdoptingState(DiaryState):
    def _append(self, k: Tensor, v: Tensor, take: Tensor) -> None:
        first = self.v.shape[1] == 0
        super()._append(k, v, take)
        if first and bool(self.real.all()):
            self.v = v


class Adopting(Diary):
    """Break the copying of inputs: keep the caller's tensor of the first values."""

    def open(self, spec: Spec) -> State:
        return AdoptingState(self, spec)


class InPlaceState(BoundedState):
    def read(self, q: Tensor) -> Partial:
        answer = super().read(q)
        q.mul_(3.0).div_(3.0)
        return answer


class InPlace(Small):
    """Break the caller's queries: scale them in place and back, which rounds them."""

    state = InPlaceState


class StrideBlindState(BoundedState):
    def step(self, q: Tensor, k: Tensor, v: Tensor, present: Tensor | None = None) -> Tensor:
        if isinstance(k, Tensor) and k.ndim == 3 and k.layout == torch.strided:
            k = k.as_strided(k.shape, (k.stride(0), k.stride(1), 1), k.storage_offset())
        return super().step(q, k, v, present)


class StrideBlind(Small):
    """Break other memory layouts: assume that the last axis of keys has stride 1."""

    state = StrideBlindState


class PadsAnsweredState(BoundedState):
    def step(self, q: Tensor, k: Tensor, v: Tensor, present: Tensor | None = None) -> Tensor:
        out = super().step(q, k, v, present)
        if present is None or not bool(present.any()):
            return out
        return torch.where(present[:, None, :, None], out, torch.ones_like(out))


class PadsAnswered(Small):
    """Break padding: give answers other than zero at absent tokens."""

    state = PadsAnsweredState


class MarkInFinallyState(BoundedState):
    def step(self, q: Tensor, k: Tensor, v: Tensor, present: Tensor | None = None) -> Tensor:
        try:
            return super().step(q, k, v, present)
        finally:
            self._underway = None


class MarkInFinally(Small):
    """Break the mark of a running step: remove it even if the step fails."""

    state = MarkInFinallyState


class LateClockState(BoundedState):
    def _advance(self, take: Tensor) -> None:
        self._underway = None
        super()._advance(take)


class LateClock(Small):
    """Break the mark of a running call: remove it once the tokens are stored, before the block is closed."""

    state = LateClockState
