"""Tensor attention as standard attention, for the conformance suite: the other side's keys and values are ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from kvfloor.method import Guarantee, Method, Spec, Traits
from kvfloor.partial import Partial
from kvfloor.registry import parse
from kvfloor.state import State


@dataclass(frozen=True)
class Ones(Method):
    """`inner`, a method of tensor attention, fed with ones beside the keys and values of its side `side` (1 or 2)."""

    name: ClassVar[str] = "ones"
    paper: ClassVar[str] = "Alman and Song 2023: with K2 = V2 = 1 tensor attention is standard attention"
    inner: str
    side: int = 1

    @property
    def kept(self) -> Method:
        return parse(self.inner)

    @property
    def traits(self) -> Traits:
        return replace(self.kept.traits, reference="softmax")

    @property
    def block(self) -> int:
        return getattr(self.kept, "block", 32)

    def open(self, spec: Spec) -> OnesState:
        return OnesState(self, spec)

    def capacity(self, n: int, prompt: int | None = None, pinned: int = 0) -> int | None:
        return self.kept.capacity(n, prompt, pinned)

    def guarantee(self, spec: Spec) -> Guarantee | None:
        return self.kept.guarantee(spec)


class OnesState(State):
    def __init__(self, method: Ones, spec: Spec) -> None:
        super().__init__(method, spec)
        self.inner = method.kept.open(spec)

    def _beside(self, x: Tensor) -> Tensor:
        assert isinstance(self.method, Ones)
        return torch.cat([x, torch.ones_like(x)][:: 1 if self.method.side == 1 else -1], -1)

    @property
    def held(self) -> Tensor:
        return self.inner.held

    def _append(self, k: Tensor, v: Tensor, take: Tensor) -> None:
        self.inner._append(self._beside(k), self._beside(v), take)
        self.seen = self.seen + take

    def _step(self, k: Tensor, v: Tensor, q: Tensor, take: Tensor) -> Tensor:
        out = self.inner._step(self._beside(k), self._beside(v), q, take)
        self.seen = self.seen + take
        return out

    def _read(self, q: Tensor) -> Partial:
        """Every token's mass is there once per token of ones."""
        part = self.inner._read(q)
        ones = torch.log(self.seen.clamp_min(1)).to(part.log_mass).unsqueeze(1)
        return Partial(part.mean, part.log_mass - ones)
