"""Raise an exception at a chosen torch operation inside a state's call, and record how the state behaves afterwards.

A state is a method's memory of the tokens that it was given. A call is a function of a state that makes one call on it,
e.g. `lambda state: state.append(k, v)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kvfloor.core.broken import BrokenState
from kvfloor.core.state import State

Call = Callable[[State], Tensor | None]


class Injected(Exception):
    """Signal an injected failure: `Faults` raises this exception, and no library code catches it by name."""


class Faults(TorchDispatchMode):
    """Raise `Injected` after a chosen torch operation inside a `with` block.

    at    number of the chosen operation, from 1; None: raise nothing
    done  number of torch operations so far in the block
    """

    def __init__(self, at: int | None = None) -> None:
        super().__init__()
        self.at, self.done = at, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.done += 1
        if self.done == self.at:
            raise Injected(f"at operation {self.at}, {func}")
        return out


def operations(call: Callable[[], object]) -> int:
    """Run `call`, a function without arguments, and return the number of its torch operations."""
    with Faults() as faults:
        call()
    return faults.done


def spread_out(operations: int, most: int | None) -> list[int]:
    """Return the numbers 1 .. operations, or a choice of them at even distances, the first and the last included.

    most: largest count of numbers to return; None: return all.
    """
    if most is None or operations <= most:
        return list(range(1, operations + 1))
    return sorted({round(1 + i * (operations - 1) / (most - 1)) for i in range(most)})


@dataclass
class FaultTally:
    """Count failures of calls by what became of the state. For a model's forward pass, the state is the model's cache.

    as_before  number of failures after which the state was as before the call, and the call made again succeeded
    taken_in   number of failures of a forward pass after which every layer of the cache held the new tokens, so that
               the cache can be used further
    refused    number of failures after which every further call raises BrokenState
    silent     one sentence for each failure with any other outcome, which is a fault
    """

    as_before: int = 0
    taken_in: int = 0  # caches only: the forward broke off after its last layer, so the cache holds all its tokens
    refused: int = 0
    silent: list[str] = field(default_factory=list)

    @property
    def points(self) -> int:
        return self.as_before + self.taken_in + self.refused + len(self.silent)

    def count(self, verdict: str) -> None:
        if verdict in ("as before", "taken in", "refused"):
            name = verdict.replace(" ", "_")
            setattr(self, name, getattr(self, name) + 1)
        else:
            self.silent.append(verdict)


def broken_at(state: State, call: Call, points: Iterable[int]) -> FaultTally:
    """Make the call fail at each torch operation in `points`, each time on a clone of `state`, and count the outcomes.

    A failure has one of these outcomes:
    as_before  the clone's saved form (`to_bytes`) has the same bytes as before the call, and the call made again gives
               the same bits as a call without failure
    refused    every public call on the clone raises BrokenState
    silent     neither of the two; a sentence says what happened instead
    """
    before, twin, tally = state.to_bytes(), state.clone(), FaultTally()
    answer = call(twin)
    after = twin.to_bytes()
    for at in points:
        trial = state.clone()
        try:
            with Faults(at):
                call(trial)
        except Injected as fault:
            tally.count(_verdict(trial, call, before, answer, after, str(fault)))
    return tally


def _verdict(trial: State, call: Call, before: bytes, answer: Tensor | None, after: bytes, where: str) -> str:
    try:
        message = trial.to_bytes()
    except BrokenState:
        answering = [name for name, again in public_calls(trial).items() if not _refuses(again)]
        return f"{where}: it refuses, but not {', '.join(answering)}" if answering else "refused"
    if message != before:
        return f"{where}: its message has changed, and it goes on"
    again = call(trial)
    same = answer is None or (again is not None and torch.equal(again, answer))
    if not same or trial.to_bytes() != after:
        return f"{where}: its message is as before, but the call made again gives something else"
    return "as before"


def public_calls(state: State) -> dict[str, Callable[[], object]]:
    """Return {name: call} for the public methods of a state, such as `append`, `read` and `to_bytes`.

    Each call is a function without arguments that makes the call with valid input.
    """
    spec = state.spec
    like = {"dtype": spec.dtype, "device": spec.device}
    k, v = torch.ones(spec.rows, 1, state.key_width, **like), torch.ones(spec.rows, 1, state.value_width, **like)
    q = torch.ones(spec.rows, 1, 1, spec.d, **like)
    calls: dict[str, Callable[[], object]] = {
        "append": lambda: state.append(k, v),
        "step": lambda: state.step(q, k, v),
        "step_partial": lambda: state.step_partial(q, k, v),
        "read": lambda: state.read(q[:, 0]),
        "attend": lambda: state.attend(q),
        "seal": state.seal,
        "guarantee": state.guarantee,
        "to_bytes": state.to_bytes,
        "export": state.export,
        "clone": state.clone,
        "select_rows": lambda: state.select_rows(torch.tensor([0])),
    }
    pin = getattr(state, "pin", None)
    if pin is not None:
        calls["pin"] = lambda: pin(0, 1)
    return calls


def _refuses(call: Callable[[], object]) -> bool:
    try:
        call()
    except BrokenState:
        return True
    except Exception:
        return False
    return False
