"""Break the inputs, the outputs and the side effects of calls."""

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


@small
class WarmStart(BoundedState):
    """Break the empty state: it has the mass of one token."""

    def _read(self, q: Tensor) -> Partial:
        part = super()._read(q)
        return replace(part, log_mass=torch.nan_to_num(part.log_mass, neginf=0.0))


@small
class WideAnswers(BoundedState):
    """Break the dtype of answers: keep that of an intermediate result."""

    def step(self, q: Tensor, k: Tensor, v: Tensor, present: Tensor | None = None) -> Tensor:
        return super().step(q, k, v, present).double()


@small
class CountingReads(BoundedState):
    """Break the purity of `read`: count the reads in the state."""

    def __init__(self, method: Bounded, spec: Spec, budgets: list[int]) -> None:
        super().__init__(method, spec, budgets)
        self.reads = 0

    def _read(self, q: Tensor) -> Partial:
        self.reads = self.reads + int(bool(self.seen.any()))
        return super()._read(q)


@small
class Obliging(BoundedState):
    """Break the refusal of wrong input: convert another dtype instead."""

    def _checked(self, x: Tensor, name: str, width: int, axes: int = 3, finite: bool = False) -> Tensor:
        if isinstance(x, Tensor):
            x = x.to(self.spec.dtype)
        return super()._checked(x, name, width, axes, finite)


@small
class HastyClock(BoundedState):
    """Break the refusal of wrong input: count a call before its input is checked."""

    def __init__(self, method: Bounded, spec: Spec, budgets: list[int]) -> None:
        super().__init__(method, spec, budgets)
        self.calls = 0

    def append(self, k: Tensor, v: Tensor, present: Tensor | None = None) -> None:
        self.calls += 1
        super().append(k, v, present)


@small
class NanBlind(BoundedState):
    """Break the refusal of NaN: do not search for it in queries without tokens."""

    def _checked(self, x: Tensor, name: str, width: int, axes: int = 3, finite: bool = False) -> Tensor:
        return super()._checked(x, name, width, axes)


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


@small
class InPlace(BoundedState):
    """Break the caller's queries: scale them in place and back, which rounds them."""

    def read(self, q: Tensor) -> Partial:
        answer = super().read(q)
        q.mul_(3.0).div_(3.0)
        return answer


@small
class StrideBlind(BoundedState):
    """Break other memory layouts: assume that the last axis of keys has stride 1."""

    def step(self, q: Tensor, k: Tensor, v: Tensor, present: Tensor | None = None) -> Tensor:
        if isinstance(k, Tensor) and k.ndim == 3 and k.layout == torch.strided:
            k = k.as_strided(k.shape, (k.stride(0), k.stride(1), 1), k.storage_offset())
        return super().step(q, k, v, present)


@small
class PadsAnswered(BoundedState):
    """Break padding: give answers other than zero at absent tokens."""

    def step(self, q: Tensor, k: Tensor, v: Tensor, present: Tensor | None = None) -> Tensor:
        out = super().step(q, k, v, present)
        if present is None or not bool(present.any()):
            return out
        return torch.where(present[:, None, :, None], out, torch.ones_like(out))


@small
class MarkInFinally(BoundedState):
    """Break the mark of a running step: remove it even if the step fails."""

    def step(self, q: Tensor, k: Tensor, v: Tensor, present: Tensor | None = None) -> Tensor:
        try:
            return super().step(q, k, v, present)
        finally:
            self._underway = None


@small
class LateClock(BoundedState):
    """Break the mark of a running call: remove it once the tokens are stored, before the block is closed."""

    def _advance(self, take: Tensor) -> None:
        self._underway = None
        super()._advance(take)
