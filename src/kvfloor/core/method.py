"""Define cache methods: a method is the frozen configuration of a KV cache, with its promises and a text that names it.

A state is the memory that a method keeps of its streams, opened for a spec (sizes, dtype and constants). A row is one
(batch item, kv head) stream. A whole token is one whose own key and value are kept. A block is the tokens of a row
between two evictions. A part of a method is its policy (chooses tokens to evict), summary (compressed form of evicted
tokens) or selector (chooses the tokens that a query reads). A text such as "h2o(recent=64)@512" names a method; `parse`
reads it.
"""

from __future__ import annotations

import keyword
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from kvfloor.core import message
from kvfloor.core.spec import Spec

if TYPE_CHECKING:
    from kvfloor.core.policy import Policy
    from kvfloor.core.selector import Selector
    from kvfloor.core.state import State
    from kvfloor.core.store import Store
    from kvfloor.core.summary import Summary

Budget = int | str | tuple[int, ...]  # tokens per row | "25%" | "64MiB" | one number of tokens per row


@dataclass(frozen=True)
class Traits:
    """Record what a method promises and what it does not; `kvfloor check` tests each promise that a method makes.

    reference       the kind of attention that is approximated: "softmax", "unmasked" (evicted tokens stay in the
                    softmax, with logit 0), or "tensor" (softmax over pairs of tokens)
    normalised      answers are convex combinations of the given values (they stay in their hull)
    value_linear    answers are linear in the values, for fixed keys and queries
    lossy_values    values are stored with an error even while no token was dropped
    block_causal    an answer may depend on later tokens of the query's own block
    constant_memory the bytes of a state (`nbytes`) never grow after the state was opened
    pins            a span of tokens can be protected from eviction for good (`State.pin`)
    turns           keys and queries can be rotated (RoPE, `Spec.rotation`) by rank, the token's index among the held
                    tokens, instead of position in the stream
    trained_for     (layers, kv heads, d) of the model that the method's parameters were trained for; None: any model
    """

    reference: Literal["softmax", "unmasked", "tensor"] = "softmax"
    normalised: bool = True
    value_linear: bool = True
    lossy_values: bool = False
    block_causal: bool = False
    constant_memory: bool = True
    pins: bool = False
    turns: bool = False
    trained_for: tuple[int, int, int] | None = None


def lossy(traits: Traits) -> Traits:
    """Return the traits of a method that keeps its tokens in few bits per number."""
    return replace(traits, normalised=False, value_linear=False, lossy_values=True, turns=False)


@dataclass(frozen=True)
class Guarantee:
    """Record a proved bound on the error of answers, with the norm of the error and the assumptions.

    epsilon, delta  the error is at most epsilon, with probability at least 1 - delta
    norm            the measure of the error, such as "max norm"
    quantifier      the queries for which this holds ("every query", "one query fixed in advance", ...)
    assumptions     conditions on the stream, in words
    source          the theorem
    holds           False once an assumption failed on the tokens seen; `why` names it
    """

    epsilon: float
    delta: float
    norm: str
    quantifier: str
    assumptions: tuple[str, ...]
    source: str
    holds: bool = True
    why: str = ""


class Parts(NamedTuple):
    """Hold the policy, summary and selector that a method is composed of; None for a part that it does not have."""

    policy: Policy | None = None
    summary: Summary | None = None
    selector: Selector | None = None
    store: Store | None = None


class _Usual:
    """Hold the default value of a `Method` attribute: the instances have it, the class itself does not.

    This is a descriptor. If the class had the value too, a dataclass would take it for the default of a subclass's own
    field of that name.
    """

    def __init__(self, value: Any) -> None:
        self.value = value

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        if instance is None:
            raise AttributeError("a subclass declares this member, or its instances have the usual value")
        return self.value


class Method(ABC):
    """Define the frozen configuration of a KV cache, from which states (the caches themselves) are opened.

    traits   the method's promises
    budget   tokens per row, a share ("25%") or bytes ("64MiB"); None: no budget, or none chosen yet
    block    number of a row's tokens between two evictions
    parts    the policy, summary and selector of a method that is composed of them
    wants_rotation  True: a model's cache looks for the rotation of its keys (`Spec.applied`), which the method reads
    Subclasses are frozen dataclasses, and final. Each attribute is a field or a property of the subclass; all but
    `traits` have a default where the subclass declares none.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    traits: Traits
    budget: Budget | None = _Usual(None)  # type: ignore[assignment]
    block: int = _Usual(32)  # type: ignore[assignment]
    parts: Parts = _Usual(Parts())  # type: ignore[assignment]
    wants_rotation: bool = _Usual(False)  # type: ignore[assignment]

    @abstractmethod
    def open(self, spec: Spec) -> State:
        """Return an empty state for the rows of `spec`.

        Raises ValueError for a budget that is a share or in bytes (`resolve` makes it tokens), and for one that the
        method cannot keep.
        """

    @abstractmethod
    def capacity(self, n: int, prompt: int | None = None, pinned: int = 0) -> int | None:
        """Return the most whole tokens that a row can hold after n tokens; None if the method sets no bound.

        prompt  number of tokens before the end of the prompt; None: the prompt has not ended
        pinned  number of tokens that are protected from eviction for good
        A method whose capacity follows from its budget raises ValueError if the budget is a share or bytes: convert it
        to tokens first (`kvfloor.resolve`).
        """

    @property
    def kinds(self) -> tuple[Method, ...]:
        """Return the methods of a model's layers, each once: this one alone, unless it has one per layer."""
        return (self,)

    def of_layer(self, place: int) -> Method:
        """Return the method of the layer with index `place` among the compressed layers of a model.

        It is this method, unless this method has one per layer.
        """
        del place
        return self

    def each(self, change: Callable[[Method], Method]) -> Method:
        """Return this method with `change` applied to the method of every layer: to this one, unless it has several."""
        return change(self)

    def with_budget(self, budget: Budget) -> Method | None:
        """Return a copy of this method with another budget; None if no budget can bound the method."""
        del budget
        return None

    def with_summary(self, summary: Summary) -> Method | None:
        """Return a copy of this method with another summary of evicted tokens; None if the method takes no summary."""
        del summary
        return None

    def with_store(self, store: Store) -> Method | None:
        """Return a copy of this method whose slots keep their numbers by another store; None if it has no slots."""
        del store
        return None

    def with_error(self, epsilon: float) -> Method | None:
        """Return a copy of this method each of whose answers has a bound on its own error of at most `epsilon`.

        The bound is relative to the largest norm of a value that the query sees, for any keys, values and queries, up
        to rounding. None if the method computes no such bounds, as for methods that evict tokens.
        """
        del epsilon
        return None

    def guarantee(self, spec: Spec) -> Guarantee | None:
        """Return the error bound that is proved for this configuration, or None.

        A state tests the bound's assumptions on the tokens that it has seen (`State.guarantee`).
        """
        del spec
        return None

    def budget_for(self, epsilon: float, delta: float, spec: Spec) -> Method:
        """Return a copy of this method with the least memory for which a theorem bounds its error by `epsilon`.

        The bound may fail with probability `delta`. The argument that fixes the memory, such as a sample count or a
        rank, gets its least sufficient value. Values that the theorem assumes, such as a bound on the number of tokens,
        are taken from this method's arguments. `guarantee` tells the error's norm, and for which queries the bound
        holds. Raises ValueError if there is no theorem, if an assumed value is not given, or if no size is enough.
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
        """Return a copy of this method with the least sample count, rank or the like for an error of at most `epsilon`.

        The error may be larger with probability `delta`. A method with no such number returns itself. The result need
        not keep to the error: the caller, `budget_for`, checks its guarantee.
        """
        del epsilon, delta, spec
        return self

    def from_bytes(self, data: bytes, device: str | torch.device = "cpu") -> State:
        """Return the state that was saved as `data`; raise CorruptState (a ValueError) if the bytes are damaged.

        `State.to_bytes` makes the bytes.
        """
        with torch.inference_mode(False), torch.no_grad():  # inference tensors could not be written to later
            header, fields = message.unpack(data)
            text = header.get("method")
            if text != str(self):
                raise message.CorruptState(f"this is a state of {text!r}, not of {str(self)!r}")
            return rebuilt(self, header.get("spec"), fields, device)

    def __str__(self) -> str:
        """Return the text from which `parse` makes this method; a class from outside kvfloor is `module:Class`."""
        text = part_text(self, skip=("budget",))
        return text if self.budget is None else f"{text}@{budget_text(self.budget)}"


def rebuilt(method: Method, plain: Any, fields: Any, device: str | torch.device) -> State:
    """Return a state of `method` restored from `fields`, the saved state's attributes by name.

    `plain` is the saved state's spec (sizes, dtype and constants) as a dict. Raises CorruptState if the fields are not
    those of this release's state, or do not fit the method, the spec and each other: the saved state's digest detects
    damage, but not fields that somebody changed together with the digest.
    """
    try:
        if plain["rows"] > _numbers(fields):  # before anything is allocated for so many rows
            raise ValueError(f"{plain['rows']} rows cannot be remembered in {_numbers(fields)} numbers")
        state = method.open(Spec.from_dict(plain, device))
        state.require(fields)
        state.adopt(fields)
    except message.CorruptState:
        raise
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as cause:
        why = str(cause) or type(cause).__name__
        raise message.CorruptState(f"this is no state of {str(method)!r}: {why}") from cause
    return state


def _numbers(fields: Any) -> int:
    """Return the number of entries of all tensors in nested fields."""
    if isinstance(fields, dict):
        return sum(_numbers(value) for value in fields.values())
    return fields.numel() if isinstance(fields, Tensor) else 0


def standard_law(method: Method, place: str) -> Method:
    """Return `method` if it computes standard attention, over single tokens; raise ValueError for tensor attention.

    Tensor attention is softmax over pairs of tokens. place: name of the caller that needs standard attention, for the
    error.
    """
    if method.traits.reference == "tensor":
        raise ValueError(
            f"{method} is tensor attention, over pairs of tokens; {place} takes methods of standard attention"
        )
    return method


def call_text(name: str, config: Any, skip: tuple[str, ...] = ()) -> str:
    """Return the text `name(arg=value, ...)`, with the arguments of `config` that differ from their defaults.

    `config` is a dataclass object, such as a method or a part of one. An example is "h2o(recent=64)". Arguments named
    in `skip` are left out.
    """
    arguments = []
    for f in fields(config):
        value = getattr(config, f.name)
        if f.init and f.name not in skip and value != f.default:
            arguments.append(f"{f.name}={_literal(value)}")
    return f"{name}({','.join(arguments)})" if arguments else name


def _literal(value: Any) -> str:
    if isinstance(value, str):  # a bare word, unless Python reads it as something else
        bare = value.isascii() and value.isidentifier() and not keyword.iskeyword(value)
        return value if bare else repr(value)
    return repr(value) if isinstance(value, float) else str(value)


def budget_text(budget: Budget) -> str:
    """Return the text of a budget, as it follows the "@" in a method's text.

    Examples: "512" tokens per row, "25%" of the context, "64MiB" for the whole cache, "64:128" with one number per row.
    """
    return ":".join(map(str, budget)) if isinstance(budget, tuple) else str(budget)


def part_text(part: Any, skip: tuple[str, ...] = ()) -> str:
    """Return the text of a method, policy, summary or selector with its arguments, as `parse` takes it.

    A class from outside kvfloor is written `module:Class`. Arguments named in `skip` are left out.
    """
    return call_text(part_name(part), part, skip)


def part_name(part: Any) -> str:
    """Return the name of a method, policy, summary or selector: `module:Class` if its class is from outside kvfloor."""
    kind = type(part)
    own = kind.__module__.partition(".")[0] == "kvfloor"
    return kind.name if own else f"{kind.__module__}:{kind.__qualname__}"
