"""Keep a promise about the error of each answer, layer by layer: fetch more, count what breaks it, or raise.

An answer's error is the 2-norm of its difference from exact attention, divided by the largest norm of a value that its
query sees. A certified method bounds it for each answer (docs/certificates.md). The promise is about one attention
layer's output, for each query by itself; it is none about logits. With a method whose delta is above 0 the promise is
statistical: a bound may fail with that probability, and `certified_entry` counts the answers with such bounds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from kvfloor.core.method import Method
from kvfloor.core.state import State
from kvfloor.methods.tiered.tiered import TieredState
from kvfloor.validation import within

OnViolation = Literal["fallback", "flag", "raise"]


class PromiseBroken(RuntimeError):
    """Report that a layer could not bound the error of an answer by the `max_error` that its cache promised.

    Some layers have stored the forward's tokens and others have not, so the cache refuses use until it is reset.
    """


@dataclass(frozen=True)
class Promise:
    """Hold the largest error that was promised, and what happens to an answer whose bound is larger.

    max_error     the largest bound, relative to the largest norm of a value that the query sees
    on_violation  "fallback": the method fetches exact tokens until the bound holds; "flag": the answer is given, and
                  counted; "raise": PromiseBroken
    """

    max_error: float
    on_violation: OnViolation = "fallback"

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_error", within("max_error", self.max_error, 0.0, math.inf, high_open=True))
        if self.on_violation not in get_args(OnViolation):
            allowed = ", ".join(get_args(OnViolation))
            raise ValueError(f"on_violation must be one of {allowed}, got {self.on_violation!r}")

    def kept_by(self, method: Method) -> Method:
        """Return the method with which a cache keeps this promise: for "fallback" one that fetches until it holds.

        Raises ValueError for a method that computes no bound on the error of its answers.
        """

        def bounding(one: Method) -> Method:
            bounded = one.with_error(self.max_error)
            if bounded is None:
                raise ValueError(
                    f"max_error needs a method that bounds the error of its own answers, such as tiered; {one} does "
                    f"not: no bound follows from a small state of evicted tokens (docs/certificates.md, What is "
                    f"promised)"
                )
            return bounded if self.on_violation == "fallback" else one

        return method.each(bounding)

    def watch(self, state: State) -> int:
        """Have the state count answers whose bound is larger from now on; return how many it has counted before."""
        if not isinstance(state, TieredState):
            return 0
        state.tally.limit = self.max_error
        return state.tally.broken

    def check(self, state: State, before: int, layer: int) -> None:
        """Raise PromiseBroken, for "raise" alone, if the state has counted more answers than `before`.

        layer: index of the layer in the model, for the error.
        """
        if self.on_violation != "raise" or not isinstance(state, TieredState):
            return
        count = state.tally.broken - before
        if count:
            raise PromiseBroken(
                f"layer {layer}: {count} answers have a bound above max_error = {self.max_error:g}; the largest so far "
                f"is {state.tally.largest:.3g}. This cache refuses further use: reset() it. Take a smaller epsilon, or "
                f'on_violation="fallback"'
            )


def certified_entry(state: State | None, promise: Promise | None) -> dict[str, Any] | None:
    """Return what a certified layer tells in `CompressedCache.report`; None for a layer that certifies nothing."""
    if not isinstance(state, TieredState):
        return None
    tally = state.tally
    return {
        "hot_bytes": state.nbytes,
        "cold_bytes": state.cold_nbytes,
        "queries": tally.queries,
        "unfetched": tally.unfetched,
        "tokens_fetched": tally.tokens,
        "bytes_fetched": tally.bytes,
        "cold_bytes_read": state.cold_read_bytes,
        "largest_bound": tally.largest,
        "max_error": None if promise is None else promise.max_error,
        "violations": tally.broken,
        "statistical": tally.chance,
        "delta": state.method.delta,
    }


def joined_entries(entries: list[dict[str, Any] | None]) -> dict[str, Any] | None:
    """Return one entry for the kv heads of all ranks, from every rank's `certified_entry` of a layer."""
    told = [entry for entry in entries if entry is not None]
    if not told:
        return None
    alike = ("max_error", "delta")
    whole = {name: sum(entry[name] for entry in told) for name in told[0] if name not in ("largest_bound", *alike)}
    largest = max(entry["largest_bound"] for entry in told)
    return {name: whole.get(name, largest) for name in told[0]} | {name: told[0][name] for name in alike}
