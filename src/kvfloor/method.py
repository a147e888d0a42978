"""The frozen side of the contract: `Spec` (what a state is opened for), `Method` (how it remembers), `Traits`."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from kvfloor.kernels.attend import compute_dtype
from kvfloor.rotation import Rotation

if TYPE_CHECKING:
    from kvfloor.budget import Budget
    from kvfloor.state import State

_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Spec:
    """What a state is opened for; everything in it is public, none of it depends on the stream.

    rows      independent streams held side by side (batch x kv head)
    d, dv     width of a key and of a value
    scale     the factor on q.k (the papers use 1, models d**-0.5)
    softcap   c in c*tanh(logit/c), or None
    row_ids   one identity per row, which keys its randomness; 0, 1, 2, ... unless given
    places    where in a model each row stands, as (layer, kv head), for methods whose trained parameters differ from
              head to head; None outside a model
    tied      a token's value is its key: both are given as one tensor, and held once
    rotation  None, or how keys and queries are turned by their place: they are given unturned, and a token's place is
              its rank among the tokens that its row holds, the oldest at 0, its own query's the same
    Raises ValueError naming the field that is out of its domain.
    """

    rows: int
    d: int
    dv: int
    scale: float = 1.0
    softcap: float | None = None
    dtype: torch.dtype = torch.float32
    device: str | torch.device = "cpu"
    seed: int = 0
    row_ids: Sequence[int] | None = None
    places: Sequence[tuple[int, int]] | None = None
    tied: bool = False
    rotation: Rotation | None = None

    def __post_init__(self) -> None:
        for name in ("rows", "d", "dv"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"Spec.{name} must be a positive integer, got {value!r}")
        if not (isinstance(self.scale, (int, float)) and math.isfinite(self.scale)):
            raise ValueError(f"Spec.scale must be a finite number, got {self.scale!r}")
        if self.softcap is not None and not (math.isfinite(self.softcap) and self.softcap > 0):
            raise ValueError(f"Spec.softcap must be None or a positive number, got {self.softcap!r}")
        if self.dtype not in _DTYPES.values():
            raise ValueError(f"Spec.dtype must be one of {', '.join(_DTYPES)}, got {self.dtype!r}")
        if self.tied and self.d != self.dv:
            raise ValueError(f"Spec.tied says that values are the keys, so dv must be d = {self.d}, got {self.dv}")
        if self.rotation is not None:
            if not isinstance(self.rotation, Rotation):
                raise ValueError(f"Spec.rotation must be None or a Rotation, got {self.rotation!r}")
            if self.rotation.stop > self.d:
                raise ValueError(
                    f"Spec.rotation turns entries up to {self.rotation.stop} of keys that have d = {self.d}"
                )
        if not isinstance(self.seed, int):
            raise ValueError(f"Spec.seed must be an integer, got {self.seed!r}")
        ids = tuple(range(self.rows)) if self.row_ids is None else tuple(int(i) for i in self.row_ids)
        if len(ids) != self.rows:
            raise ValueError(f"Spec.row_ids must have one id per row: {self.rows} rows, {len(ids)} ids")
        object.__setattr__(self, "row_ids", ids)
        if self.places is not None:
            places = tuple((int(layer), int(head)) for layer, head in self.places)
            if len(places) != self.rows:
                raise ValueError(f"Spec.places must name one place per row: {self.rows} rows, {len(places)} places")
            object.__setattr__(self, "places", places)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of logits, masses and means."""
        return compute_dtype(self.dtype)

    @cached_property
    def device_type(self) -> str:
        """The kind of the spec's device, such as "cpu"."""
        return torch.device(self.device).type

    def ids(self) -> Tensor:
        """The row ids as an int64 tensor (rows,) on the spec's device."""
        return torch.tensor(self.row_ids, dtype=torch.int64, device=self.device)

    def select(self, index: Tensor) -> Spec:
        """The spec of the rows at `index`, which keep their ids and places."""
        assert self.row_ids is not None
        chosen = [self.row_ids[i] for i in index.tolist()]
        places = None if self.places is None else [self.places[i] for i in index.tolist()]
        return replace(self, rows=len(chosen), row_ids=chosen, places=places)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready form, without the device: where a state lives is not part of what it is."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "device"}
        if not self.tied:
            del plain["tied"]
        if self.rotation is None:
            del plain["rotation"]
        else:
            plain["rotation"] = self.rotation.as_dict()
        return plain | {"dtype": str(self.dtype).removeprefix("torch."), "row_ids": list(self.row_ids or ())}

    @classmethod
    def from_dict(cls, plain: dict[str, Any], device: str | torch.device = "cpu") -> Spec:
        turn = plain.get("rotation")
        rotation = None if turn is None else Rotation.from_dict(turn)
        return cls(**(plain | {"dtype": _DTYPES[plain["dtype"]], "device": device, "rotation": rotation}))


@dataclass(frozen=True)
class Traits:
    """What a method promises; a conformance law runs where its trait is claimed.

    reference       the attention law it approximates: "softmax", "unmasked" (evicted tokens keep logit 0), or
                    "tensor" (softmax over pairs of tokens)
    normalised      answers are convex combinations of the values it was given (they stay in their hull)
    value_linear    answers are linear in the values, for fixed keys and queries
    lossy_values    values are stored with an error even while nothing was dropped
    block_causal    a query may be answered by its block rather than alone
    constant_memory nbytes never grows once opened
    turns           keys are held whole, so that they can be turned to their place among what is held (`Spec.rotation`)
    trained_for     (layers, kv heads, d) of the model whose trained parameters it carries; None: it fits any model
    """

    reference: Literal["softmax", "unmasked", "tensor"] = "softmax"
    normalised: bool = True
    value_linear: bool = True
    lossy_values: bool = False
    block_causal: bool = False
    constant_memory: bool = True
    turns: bool = False
    trained_for: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class Guarantee:
    """A bound on the error of an answer, with what it is a bound on and what it assumes.

    epsilon, delta  error and failure probability; norm says how the error is measured
    quantifier      what the probability is over ("every query", "one query fixed in advance", ...)
    assumptions     conditions on the stream, in words
    source          the theorem
    holds           False once the assumptions failed on what was seen; `why` says which
    """

    epsilon: float
    delta: float
    norm: str
    quantifier: str
    assumptions: tuple[str, ...]
    source: str
    holds: bool = True
    why: str = ""


class Method(ABC):
    """A frozen configuration from which states are opened. Subclasses are frozen dataclasses, and final."""

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    traits: Traits  # a field or a property of the subclass

    @abstractmethod
    def open(self, spec: Spec) -> State:
        """A state that has seen nothing. Raises ValueError for a budget that is unresolved or impossible."""

    @abstractmethod
    def capacity(self, n: int, prompt: int | None = None, pinned: int = 0) -> int | None:
        """The most tokens a row holds after n tokens, `prompt` of them before `seal`; None if unbounded."""

    def with_budget(self, budget: Budget) -> Method | None:
        """This method under another budget, in tokens per row; None if it cannot be bounded by one."""
        del budget
        return None

    def guarantee(self, spec: Spec) -> Guarantee | None:
        """The theorem about this configuration, or None. `State.guarantee` evaluates its assumptions."""
        del spec
        return None

    def budget_for(self, epsilon: float, delta: float, spec: Spec) -> Method:
        """The inverse of `guarantee`: this method in the least size that promises `epsilon` and `delta`.

        What the theorem assumes (a radius, a spread, a horizon) is taken from the method's own arguments, the error's
        norm and quantifier are its guarantee's. Raises ValueError where there is no theorem, where an assumption is
        not given, and where no size is enough.
        """
        if not (isinstance(epsilon, (int, float)) and isinstance(delta, (int, float)) and epsilon >= 0 <= delta < 1):
            raise ValueError(f"budget_for takes epsilon >= 0 and 0 <= delta < 1, got {epsilon!r} and {delta!r}")
        sized = self._sized_for(float(epsilon), float(delta), spec)
        stated = sized.guarantee(spec)
        if stated is None:
            raise ValueError(f"{self} has no theorem from which a size would follow, or lacks what it assumes")
        if not stated.holds or stated.epsilon > epsilon or stated.delta > delta:
            why = f" ({stated.why})" if stated.why else ""
            raise ValueError(
                f"no size of {self} promises epsilon = {epsilon:g} with probability {1 - delta:g}: "
                f"{sized} promises {stated.epsilon:.3g} with {1 - stated.delta:.3g}{why}"
            )
        return sized

    def _sized_for(self, epsilon: float, delta: float, spec: Spec) -> Method:
        """The size that `budget_for` then checks; methods without sizes to choose stay as they are."""
        del epsilon, delta, spec
        return self

    def from_bytes(self, data: bytes, device: str | torch.device = "cpu") -> State:
        """The state that `to_bytes` packed; CorruptState (a ValueError) if the bytes are not intact."""
        from kvfloor.state import restore

        return restore(data, self, device)

    def __str__(self) -> str:
        """The text that parses back to this method; a third party's class is written `module:Class`."""
        text = part_text(self, skip=("budget",))
        budget = getattr(self, "budget", None)
        return text if budget is None else f"{text}@{budget}"


def standard_law(method: Method, place: str) -> Method:
    """`method`, if it is one of standard attention; ValueError names `place`, where only such methods go."""
    if method.traits.reference == "tensor":
        raise ValueError(
            f"{method} is tensor attention, over pairs of tokens; {place} takes methods of standard attention"
        )
    return method


def call_text(name: str, config: Any, skip: tuple[str, ...] = ()) -> str:
    """`name(arg=value, ...)` with the arguments that differ from their defaults."""
    arguments = []
    for f in fields(config):
        value = getattr(config, f.name)
        if f.init and f.name not in skip and value != f.default:
            arguments.append(f"{f.name}={_literal(value)}")
    return f"{name}({','.join(arguments)})" if arguments else name


def _literal(value: Any) -> str:
    if isinstance(value, str):  # a bare word, unless it would be read as something else
        return value if value.isidentifier() and value not in ("True", "False", "None") else repr(value)
    return repr(value) if isinstance(value, float) else str(value)


def part_text(part: Any, skip: tuple[str, ...] = ()) -> str:
    """The text that parses back to this part; a third party's class is written `module:Class`."""
    kind = type(part)
    own = kind.__module__.partition(".")[0] == "kvfloor"
    return call_text(kind.name if own else f"{kind.__module__}:{kind.__qualname__}", part, skip)


def positive(owner: str, **values: int | float) -> None:
    """Raise ValueError for any given value that is not a positive finite number."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(f"{owner}: {name} must be a positive number, got {value!r}")


def count(owner: str, least: int = 0, **values: int) -> None:
    """Raise ValueError for any given value that is not a whole number >= `least`."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{owner}: {name} must be a whole number >= {least}, got {value!r}")
