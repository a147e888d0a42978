"""Present a tensor-attention method as standard attention, so that the conformance checks can test it.

Tensor attention is softmax over pairs of tokens; each token has two keys K1, K2 and two values V1, V2. The checks give
one key and one value per token. The others are filled with 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor

from kvfloor.core.budget import Budget
from kvfloor.core.method import Guarantee, Method, Traits
from kvfloor.core.partial import Partial
from kvfloor.core.spec import Spec
from kvfloor.core.state import State
from kvfloor.methods.grammar import parse


@dataclass(frozen=True)
class Ones(Method):
    """Wrap a tensor-attention method `inner` as a method of standard attention: fill one key and one value with 1.

    If `side` is 1, the stream gives K1 and V1, and K2 and V2 are filled with 1; if it is 2, the reverse. With K2 and V2
    all ones, tensor attention over n tokens equals standard attention on (K1, V1), but its softmax mass is n times as
    large.
    """

    name: ClassVar[str] = "ones"
    paper: ClassVar[str] = "Alman and Song 2023 (arXiv 2310.04064)"
    inner: Method | str
    side: Literal[1, 2] = 1

    def __post_init__(self) -> None:
        if isinstance(self.inner, str):
            object.__setattr__(self, "inner", parse(self.inner))

    @property
    def kept(self) -> Method:
        """Return `inner` as a Method object; if it was given as text, it was parsed on construction."""
        return cast(Method, self.inner)

    @property
    def traits(self) -> Traits:
        return replace(self.kept.traits, reference="softmax")

    @property
    def block(self) -> int:
        return self.kept.block

    @property
    def budget(self) -> Budget | None:
        return self.kept.budget

    def open(self, spec: Spec) -> OnesState:
        return OnesState(self, spec)

    def capacity(self, n: int, prompt: int | None = None, pinned: int = 0) -> int | None:
        return self.kept.capacity(n, prompt, pinned)

    def with_budget(self, budget: Budget) -> Ones | None:
        inner = self.kept.with_budget(budget)
        return None if inner is None else replace(self, inner=inner)

    def guarantee(self, spec: Spec) -> Guarantee | None:
        return self.kept.guarantee(spec)

    def __str__(self) -> str:
        return f"{type(self).__module__}:{type(self).__name__}(inner={str(self.inner)!r},side={self.side})"


class OnesState(State[Ones]):
    """Hold the state of a wrapped tensor-attention method, and serve as a state of standard attention.

    Each token goes to the inner state with its other key and value filled with 1. The inner state's answers are
    returned. Where they contain the softmax mass, it is scaled to that of standard attention.
    """

    def __init__(self, method: Ones, spec: Spec) -> None:
        super().__init__(method, spec)
        self.inner = method.kept.open(spec)
        self.shared = self.inner.shared

    @property
    def held(self) -> Tensor:
        return self.inner.held

    def guarantee(self) -> Guarantee | None:
        return self.inner.guarantee()

    def _select_rows(self, index: Tensor) -> None:
        super()._select_rows(index)
        self.method = replace(self.method, inner=self.inner.method)  # budgets per row travel with their rows

    def _beside(self, x: Tensor) -> Tensor:
        both = [x, torch.ones_like(x)]
        return torch.cat(both if self.method.side == 1 else both[::-1], -1)

    def _append(self, k: Tensor, v: Tensor, take: Tensor) -> None:
        self.inner._append(self._beside(k), self._beside(v), take)
        self.seen = self.seen + take

    def _step(self, k: Tensor, v: Tensor, q: Tensor, take: Tensor) -> Tensor:
        out = self.inner._step(self._beside(k), self._beside(v), q, take)
        self.seen = self.seen + take
        return out

    def _read(self, q: Tensor) -> Partial:
        return self._counted_once(self.inner._read(q))

    def _attend(self, q: Tensor) -> Partial:
        return self._counted_once(self.inner._attend(q))

    def _seal(self) -> None:
        self.inner.seal()

    def _counted_once(self, part: Partial) -> Partial:
        """Scale the softmax mass of a tensor-attention result so that each token counts once, as in standard attention.

        `part` is the result: the mean of values and the log of the softmax mass. With n tokens each counts in n pairs,
        so the mass is divided by n: the tokens held or, if the method stores values with an error
        (`Traits.lossy_values`), all tokens seen.
        """
        paired = self.seen if self.method.traits.lossy_values else self.held
        return Partial(part.mean, part.log_mass - torch.log(paired.clamp_min(1)).to(part.log_mass).unsqueeze(1))


def beside_ones(method: Method) -> list[Method]:
    """Return the methods to test in place of `method`: itself, or for tensor attention two wrappers (`Ones`) of it.

    One wrapper gives the stream as K1 and V1 and fills K2 and V2 with 1, the other the reverse.
    """
    return [method] if method.traits.reference != "tensor" else [Ones(method, 1), Ones(method, 2)]
